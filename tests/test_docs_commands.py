"""Every command of the documentation runs, in a copy of the repository and with tiny stand-ins for models and data.

So a command that is new in a page runs too, without a change here. What cannot run here is in `docs_runs.NOT_HERE`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prm_hf.demo import build_demo
from prm_hf.experiments.data import BUILT_IN_WAIT

from .docs_commands import calls_of, check_call
from .docs_runs import NOT_HERE, PROGRAMS, shortened
from .test_docs import PAGES, ROOT, blocks_of, inline_code, name_of


MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "models/qwen")
PAIRS = ("gsm8k_pairs", "pairs")  # files of a user, as FILE.train.jsonl and FILE.test.jsonl
HUB_PAIRS, HUB_ANSWERS = "trl-lib/ultrafeedback_binarized", "openai/gsm8k"
STAND_IN = '#!/bin/bash\nexec "{python}" "{script}" "{program}" "$@"\n'
# As in an installation with the extras of the README: transformers imports these if they are there, and they talk.
HIDDEN = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name in ("deepspeed", "torchao") else find(name, *rest))
"""


RUN = re.compile(r"\w+_lr[\d.e-]+_seed\d +accuracy \S+ .*\(\d+ s(, in another process)?\)")


def commands_in(page: Path) -> set[str]:
    """The commands within the sentences of a page: no names of programs, and nothing with a part left out."""
    whole = re.compile(r"(accelerate launch .|python -?\w|pip install|pytest -|prm-hf \w+ -)(?!.*…)")
    return {code for text in inline_code(page) if whole.match(code := " ".join(text.split()))} - {"python -m prm_hf"}


README = ROOT / "README.md"  # whose commands run in full
COMMANDED = [page for page in PAGES if page.name != "CHANGELOG.md"]
WITH_BLOCKS = [page for page in COMMANDED if blocks_of(page, "bash")]
IN_SENTENCES = sorted(set().union(*map(commands_in, COMMANDED)))


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with the models and the data that commands name: those of the hub, and those of a user."""
    folder, demo = (
        tmp_path_factory.mktemp("stand_ins"),
        build_demo(),
    )  # whose tokenizer is read from a folder as it was
    for model in MODELS:
        shutil.copytree(demo.model_path, folder / model)
    sides = ("prompt", "chosen", "rejected")
    pairs = [{side: row[side][-1]["content"] for side in sides} for row in demo.train.select(range(60))]
    heldout = set(sorted({row["prompt"] for row in pairs})[::3])
    splits = {
        "train": [row for row in pairs if row["prompt"] not in heldout],
        "test": [row for row in pairs if row["prompt"] in heldout],
    }
    for split, rows in splits.items():
        for name in PAIRS:
            write_rows(folder / f"{name}.{split}.jsonl", rows)
        write_rows(folder / HUB_PAIRS / f"{split}.jsonl", rows)
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "decisions.jsonl", [{"row": i, "decision": word} for i, word in enumerate(("keep", "flip"))])
    more = {"votes": [1, 1, -1], "unanimous": True}  # of three raters; the completions have checkable answers
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", [{**row, "completion": row["chosen"], **more} for row in rows])
    answers = {row["prompt"]: {"question": row["prompt"], "answer": f"#### {row['chosen']}"} for row in pairs}
    write_rows(folder / HUB_ANSWERS / "train.jsonl", list(answers.values()))
    parts = "configs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl"
    (folder / HUB_ANSWERS / "README.md").write_text(f"---\n{parts}\n---\n")
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def clone(stand_ins, tmp_path) -> Path:
    """A copy of the repository, with the stand-ins in it."""
    clone = tmp_path / "clone"
    unneeded = shutil.ignore_patterns(".git", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, clone, ignore=unneeded)
    shutil.rmtree(clone / "runs", ignore_errors=True)
    shutil.copytree(stand_ins, clone, dirs_exist_ok=True)
    for program in PROGRAMS:
        path = (clone if "/" in program else tmp_path / "bin") / program
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(
            STAND_IN.format(python=sys.executable, script=clone / "tests" / "docs_runs.py", program=program)
        )
        path.chmod(0o755)
    return clone


def run(script: str, clone: Path, **environment: str) -> str:
    """What a script of bash writes, its errors among it, as a log file has it."""
    environment = {
        **os.environ,
        "PATH": f"{clone.parent / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(clone),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(clone.parent / "datasets"),
        "NO_MKDOCS_2_WARNING": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        **environment,
    }
    command = ["bash", "-e", "-u", "-c", script]
    log = clone.parent / "log.txt"
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=clone, env=environment, stdout=output, stderr=output, check=False
        ).returncode
    text = log.read_text()
    assert code == 0, f"{script}\n{text[-4000:]}"
    return text


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if page != README], ids=name_of)
def test_the_commands_of_a_page_run(page, clone, monkeypatch):
    """In their order and in one folder, after the page's Python snippets that make files."""
    monkeypatch.chdir(clone)
    for snippet in blocks_of(page, "python"):
        if "to_json" in snippet:
            exec(snippet, {})  # noqa: S102 - our own page
    for block in blocks_of(page, "bash"):
        text = run(block, clone)
    if page.name == "getting_started.md":
        assert "AdamW" in text and Path("report.html").is_file() and list(Path("runs/mine").rglob("report.html"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_run_in_full(clone):
    """As someone types them who has just cloned the repository, but with one seed in place of three.

    The log of the comparison has a line before the runs, one for each run, and what `prm-hf compare` shows again.
    """
    quiet = clone.parent / "quiet"
    quiet.mkdir()
    (quiet / "sitecustomize.py").write_text(HIDDEN)
    install, try_it, suspects = blocks_of(README, "bash")
    assert "not run" in run(install, clone)
    run(suspects, clone)  # shortened, on stand-ins of the model and the pairs
    assert (clone / "runs" / "suspects" / "suspects.jsonl").is_file()
    log, comparison = (
        run(command, clone, IN_FULL="1", PYTHONPATH=f"{clone}{os.pathsep}{quiet}") for command in try_it.splitlines()
    )
    folder = Path("runs") / "dpo_noisy"
    report = f"Report: {folder / 'report.html'}\n"
    runs, _, end = log.partition("\n\n")
    plan, *lines = runs.splitlines()
    assert plan == BUILT_IN_WAIT and all(RUN.fullmatch(line) for line in lines), runs
    assert len(lines) == len(list((clone / folder).glob("*/metrics.json")))
    assert "AdamW" in comparison and (clone / folder / "report.html").is_file()
    assert end.removesuffix(report).strip() == comparison.strip() and end.endswith(report)


@pytest.mark.slow
@pytest.mark.parametrize("command", IN_SENTENCES)
def test_a_command_in_a_sentence_runs(command, clone):
    # Without this, W&B would want a login
    offline = {"WANDB_MODE": "offline"} if "wandb" in command else {}
    run(command, clone, **offline)


def test_what_does_not_run_here_is_in_the_pages(tmp_path):
    blocks = [block for page in WITH_BLOCKS for block in blocks_of(page, "bash")]
    calls = [call for script in (*blocks, *IN_SENTENCES) for call in calls_of(script, tmp_path)]
    assert not set(NOT_HERE) - {" ".join(call) for call in calls}


@pytest.mark.parametrize("command", IN_SENTENCES)
def test_a_command_in_a_sentence_is_accepted(command, tmp_path):
    (call,) = calls_of(command, tmp_path)
    check_call(call)


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=name_of)
def test_a_shorter_command_is_accepted_too(page, tmp_path):
    """By the parsers of the long one, of which it has every word, in the same order."""
    for block in blocks_of(page, "bash"):
        for program, *arguments in calls_of(block, tmp_path):
            call = shortened(program, arguments)
            if program != "pytest":
                check_call(call)
            words = iter(call)
            assert all(word in words for word in (program, *arguments))
