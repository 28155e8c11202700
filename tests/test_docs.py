"""The pages: links lead somewhere, pages are short, and every snippet and every command runs."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import transformers
from accelerate.state import AcceleratorState
from latex2mathml.converter import convert
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from prm_hf.noise.corrupt import KINDS
from prm_hf.optim.hyperparameters import Hyperparameters
from prm_hf.runs.methods import METHODS
from prm_hf.trainers.config import RENAMED, PRMArguments

from .docs_commands import calls_of, check_call, known_flags
from .integrations.registered import forget_the_name
from .tiny import make_model, make_tokenizer, preference_dataset


ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "results", "recipes", "benchmarks", "research")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
LONGEST = {"README.md": 130, "CHANGELOG.md": 1000}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def linked_from(page: Path) -> set[Path]:
    links = re.findall(r"\]\(([\w./-]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in links}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_are_short(page):
    length = len(page.read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST.get(name_of(page), 150)


RESULTS = sorted({*(ROOT / "results").rglob("*.md")} - {ROOT / "results" / "README.md"})
APPENDICES = [page for page in RESULTS if page.name.endswith("tables.md")]
ANSWERS = [page for page in RESULTS if page not in APPENDICES]


@pytest.mark.parametrize("page", ANSWERS, ids=name_of)
def test_results_answer_a_question(page):
    """Each page has a question, a short answer in bold, its protocol and limits, and its commands in a script."""
    title, answer = page.read_text(encoding="utf-8").split("\n\n")[:2]
    text = page.read_text(encoding="utf-8")
    assert title.startswith("# ") and title.endswith("?")
    assert re.fullmatch(r"\*\*.{10,300}\*\*", answer, re.DOTALL)
    assert "imits" in text and ("rotocol" in text or "Settings" in text)
    assert "![" in text or "no figure" in text
    assert re.search(r"\]\([\w-]+\.sh\)", text)


@pytest.mark.parametrize("page", ANSWERS, ids=name_of)
def test_tables_of_results_are_short(page):
    """What is longer stands in an appendix."""
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert max((len(table.splitlines()) - 2 for table in tables), default=0) <= 12


@pytest.mark.parametrize("page", APPENDICES, ids=name_of)
def test_appendices_are_linked(page):
    """From the pages whose tables they have, and back."""
    of = {answer.name for answer in ANSWERS if answer.parent == page.parent and page in linked_from(answer)}
    assert of and of <= {target.name for target in linked_from(page)}


def table_rows(page: Path) -> list[list[str]]:
    """The cells of the rows of all tables of a page whose first cell has code."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


def code_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", table_rows(ROOT / "docs" / "architecture.md"), ids=lambda row: row[0])
def test_the_architecture_names_what_is_there(row):
    files = [ROOT / "prm_hf" / name for name in code_in(row[0])]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    for name in code_in(row[1]) if len(row) == 3 else []:
        for part in name.split("."):
            assert re.search(rf"(def|class) {part}\b", text), name


# Mathematics of the site is MathML, and needs no script: what the converter does not know it leaves as it is.
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_formulas_are_set(page):
    text = re.sub(r"^```(?!math).*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    formulas = re.findall(r"^```math\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    formulas += re.findall(r"(?<!\S)\$(?! )([^$\n]+)\$", re.sub(r"`[^`]*`", "", text))
    for formula in formulas:
        mathml = convert(formula)
        assert "\\" not in mathml and "<mi>&</mi>" not in mathml, formula


def blocks_of(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def of_language(language: str) -> list[Path]:
    return [page for page in PAGES if blocks_of(page, language)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_tested(page):
    """Of Python by running it, of bash in `test_docs_commands.py`, of formulas above, and of data here."""
    fences = re.findall(r"^[ >]*```+ *(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "bash", "math", "json"} and set(fences[1::2]) <= {""}
    for block in blocks_of(page, "json"):
        assert all({"prompt", "chosen", "rejected"} <= set(json.loads(line)) for line in block.splitlines())


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, quiet):
    """An empty folder with tiny models and datasets where the snippets name those of the hub."""
    # accelerate keeps the precision of the first trainer of a process for all later ones.
    AcceleratorState._reset_state(True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # TRL trains in bfloat16 unless it is told not to, and transformers then asks for a GPU.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"):
        make_model().save_pretrained(name)
        make_tokenizer().save_pretrained(name)
    # From a folder the tokenizer would be read as a Qwen2 one, which knows none of the words.
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **options: make_tokenizer())
    pairs = preference_dataset(10, flipped=False)
    completions = pairs.rename_column("chosen", "completion").remove_columns("rejected")
    for name, rows in {"trl-lib/ultrafeedback_binarized": pairs, "trl-lib/tldr": completions}.items():
        for split in ("train", "test"):
            rows.to_json(f"{name}/{split}.jsonl")
    pairs.to_json("pairs.jsonl")
    yield {"dataset": completions}
    AcceleratorState._reset_state(True)
    forget_the_name()


@pytest.mark.parametrize("page", of_language("python"), ids=name_of)
def test_python_runs(page, stand_ins):
    """All snippets of a page, in order and in one namespace: as someone would who reads it."""
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    document.namespace.update(stand_ins)
    for example in document.examples():
        example.evaluate()
    trainer = document.namespace.get("trainer")
    assert trainer is None or any("train_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("page", of_language("bash"), ids=name_of)
def test_commands_are_accepted(page, tmp_path):
    def check(example: Example) -> None:
        calls = calls_of(example.parsed, tmp_path)
        assert calls or "export" in example.parsed, example.parsed
        for call in calls:
            check_call(call)

    for example in Sybil([CodeBlockParser("bash", check)]).parse(page).examples():
        example.evaluate()


def inline_code(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"(?<!`)`([^`]+)`(?!`)", text)


# The changelog also names flags that are no more.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_flags_in_the_text_exist(page):
    for code in inline_code(page):
        if not code.startswith(("mkdocs", "pip", "ruff", "ray ", "sbatch ", "#SBATCH ")):
            assert not set(re.findall(r"(?<!\S)--\w+", code)) - known_flags(), code


EVERYTHING = {
    "optimizer.md": [f.name for f in dataclasses.fields(Hyperparameters)],
    "trainers.md": [f.name for f in dataclasses.fields(PRMArguments) if f.name not in RENAMED],
    "methods.md": list(METHODS),
    "noise.md": list(KINDS),
}


@pytest.mark.parametrize("page", EVERYTHING)
def test_every_name_is_explained(page):
    names = {word for code in inline_code(ROOT / "docs" / page) for word in re.findall(r"\w+", code)}
    assert not set(EVERYTHING[page]) - names


SCRIPTS = {
    (script, function): name_of(script) + (f" {function}" if function else "")
    for script in sorted((ROOT / "results").rglob("*.sh"))
    for function in re.findall(r"^(\w+)\(\) \{", script.read_text(encoding="utf-8"), re.MULTILINE) or [""]
}


@pytest.mark.parametrize("script, function", SCRIPTS, ids=SCRIPTS.values())
def test_commands_of_results_are_accepted(script, function, tmp_path):
    calls = calls_of(script.read_text(encoding="utf-8"), tmp_path, *filter(None, [function]))
    assert calls
    for call in calls:
        check_call(call)


WRONG = (
    "accelerate launch recipes/dpo_noisy.py --sedes 0",
    "accelerate launch recipes/dpo.py",
    "accelerate launch --config_file accelerate_configs/zero4.yaml recipes/dpo_noisy.py",
    "prm-hf dpo --methods prm_row",
    "prm-hf compare",
    'pip install -e ".[triln]"',
    "pytest -m slwo",
    "python recipes/sweep.py dpo --config recipes/qwen.yaml",
    "python benchmarks/step.py --shape 0.5b",
    "python -m tests.distributed.matrices",
    "prm-hf trl ppo --config examples/trl/dpo.yaml",
    "swift sft examples/swift/grpo.yaml",
)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_command_is_noticed(wrong, tmp_path):
    (call,) = calls_of(wrong, tmp_path)
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_call(call)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_the_site_is_built(tmp_path):
    """Without a warning, with every formula set, and without anything that is loaded from elsewhere.

    Docstrings are such that every argument is found.
    """
    site = tmp_path / "html"
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    run(command, ROOT, environment)
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert "<math" in pages["optimizer/index.html"] and "<math" in pages["api/optimizer/index.html"]
    for name, text in pages.items():
        assert 'class="arithmatex"' not in text, name
        # An entry "a, b: …" of a docstring would be shown as an argument of the name "a,".
        assert not re.findall(r"<b><code>(?:<[^>]*>)*\w+,<", text), name
        loaded = re.findall(r"<(?:script|img)[^>]* src=[^>]*>|<link[^>]* rel=\"stylesheet\"[^>]*>", text)
        assert not [tag for tag in loaded if "http" in tag], name
