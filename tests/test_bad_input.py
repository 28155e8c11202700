"""What wrong input says: each case of test_bad_input.txt with its whole message, before anything takes time.

A message says the argument, the value, and what to do. A command line says it in one line, with the exit code 2.
"""

import contextlib
import inspect
import io
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value
from transformers import IntervalStrategy
from trl import DPOTrainer

from prm_hf import (
    PRM,
    PopulationRiskStoppingCallback,
    PRMDPOConfig,
    PRMDPOTrainer,
    PRMSFTConfig,
    PRMSFTTrainer,
    cli,
    flip_preferences,
)
from prm_hf.experiments.data import load_split
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.noise import corrupt
from prm_hf.trainers.checks import LOSSES

from .tiny import make_model, make_tokenizer


ROWS = [{"prompt": "w1 w2", "chosen": f" w{i} ", "rejected": " w9 w8 "} for i in range(4)]
PAIRS = Dataset.from_list(ROWS)
TEXTS = Dataset.from_list([{"prompt": "w1 w2", "completion": f" w{i} "} for i in range(4)])
CLASSES = Dataset.from_dict(
    {"text": ["a", "b"], "label": [0, 1]}, Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
)
THREE_CLASSES = [{"text": text, "label": label} for text, label in ("ax", "by", "cz")]
MESSAGES = [{"role": "user", "content": "w1"}]
CHAT = Dataset.from_list([{"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}] * 2)
ON_CPU = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}


# What a case of the table is written with, beside the functions below.
OBJECTS = (
    *(PRM, PRMDPOTrainer, PopulationRiskStoppingCallback, DatasetDict, IterableDataset),
    *(flip_preferences, corrupt, load_split, math),
)


class Said(Exception):
    """The one line that a command line said."""


def params() -> list[torch.Tensor]:
    return [torch.ones(3, 2, requires_grad=True)]


def changed(number: int, **columns) -> Dataset:
    """The pairs with one row changed."""
    return Dataset.from_list([{**row, **columns} if i == number else row for i, row in enumerate(ROWS)])


def tokenizer(**tokens):
    made = make_tokenizer()
    for name, value in tokens.items():
        setattr(made, name, value)
    return made


def dpo_config(**arguments) -> PRMDPOConfig:
    return PRMDPOConfig(**{**ON_CPU, **arguments})


def sft_config(**arguments) -> PRMSFTConfig:
    return PRMSFTConfig(**{**ON_CPU, **arguments})


def dpo(train, heldout=None, model=None, tokenizer=None) -> None:
    model, tokenizer = model or make_model(), tokenizer or make_tokenizer()
    PRMDPOTrainer(model, make_model(), dpo_config(), None, train, heldout, tokenizer)


def sft(train, heldout=None, model=None, tokenizer=None, **arguments) -> None:
    model, tokenizer = model or make_model(), tokenizer or make_tokenizer()
    PRMSFTTrainer(model, sft_config(**arguments), None, train, heldout, tokenizer)


def command(*arguments: str) -> None:
    """A command line that is refused: raises what it says, if that is one line."""
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        assert cli.main(list(arguments)) == 2
    (line,) = text.getvalue().splitlines()
    raise Said(line.removeprefix(f"prm-hf {arguments[0]}: error: "))


def configured(text: str, *arguments: str) -> None:
    Path("c.yaml").write_text(text, encoding="utf-8")
    command("dpo", "--config", "c.yaml", *arguments)


def suspects(rows: list[dict], *arguments: str) -> None:
    """`prm-hf suspects` on these rows with a model that is not there."""
    Path("rows.jsonl").write_text(lines(*rows), encoding="utf-8")
    command("suspects", "rows.jsonl", "--model", "no/model", "--use_cpu", "--bf16", "False", *arguments)


def in_file(name: str, content: str | bytes) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    load_split(name, None, "train")


def lines(*rows: dict) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


CASES = [
    (call, message.strip())
    for block in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n\n")
    for call, message in [[line for line in block.strip().splitlines() if not line.startswith("#")]]
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a file and an empty folder in it: where the cases are."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("x", encoding="utf-8")
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize("call, message", CASES, ids=[call for call, _ in CASES])
def test_every_case_says_what_is_wrong(call, message, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with pytest.raises((ValueError, TypeError, ImportError, FileNotFoundError, Said)) as error:
        eval(call)
    if message.endswith("…"):  # the end is another library's
        assert str(error.value).startswith(message[:-1])
    else:
        assert str(error.value) == message


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("learning_rates: [1e-3, 3e-3, 1]", "learning_rates", [1e-3, 3e-3, 1.0]),  # which PyYAML reads as text
        ("seeds: 3", "seeds", [3]),
        ("seeds: [0, '1', 2.0]", "seeds", [0, 1, 2]),
        ("noise_rate: .25", "noise_rate", [0.25]),
        ("methods: adamw", "methods", ["adamw"]),
        ("max_minutes: 1e1", "max_minutes", 10.0),
        ("max_minutes: null", "max_minutes", None),
        ("prm_variance_beta: '0.9'", "prm_variance_beta", 0.9),
        ("max_steps: 1e2", "max_steps", 100),
        ("eval_strategy: no", "eval_strategy", "no"),  # which PyYAML reads as False
        ("prm_mask: none", "prm_mask", "none"),
        ("loss_type: ipo", "loss_type", ["ipo"]),
        ("output_dir: 5", "output_dir", "5"),
        ("bf16: 'no'", "bf16", False),
        ("lr_scheduler_kwargs: {a: 1}", "lr_scheduler_kwargs", {"a": 1}),
        ("env: {A_VARIABLE: 1}\nbeta: 1e-1", "beta", 0.1),
    ],
)
def test_yaml_is_read_as_flags_are(text, name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    rates = [] if name == "learning_rates" else ["--learning_rates", "1", "2", "3"]
    experiment = DPOExperiment.parse([f"--config={file}", *rates])
    found = next(getattr(x, name) for x in (experiment.script_args, experiment.training_args) if hasattr(x, name))
    assert found == value and type(found) in (type(value), IntervalStrategy)
    assert experiment.training_args.use_cpu  # of the built-in task, since no dataset is named


def test_flags_override_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seeds: [1, 2]\nbeta: 0.2", encoding="utf-8")
    experiment = DPOExperiment.parse(["--config", str(file), "--seeds", "3"])
    assert experiment.script_args.seeds == [3] and experiment.training_args.beta == 0.2


def test_the_losses_are_those_of_trl():
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSSES)


@pytest.mark.parametrize("content", ["a", "b\n", '"a, b"', '"a\nb"'])
def test_csv_that_is_right_is_read(content, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(f"\ufeffprompt,chosen,rejected\n{content.strip()},x,y\n", encoding="utf-8")
    assert load_split(str(file), None, "train").to_list() == [
        {"prompt": content.strip().strip('"'), "chosen": "x", "rejected": "y"}
    ]


def test_json_of_several_forms_is_read(tmp_path):
    rows = [{**row, "score": [1, None, 2.5, 3][i]} for i, row in enumerate(ROWS)]
    texts = {"a.jsonl": lines(*rows), "a.json": lines(*rows), "b.json": json.dumps(rows, indent=1)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_split(str(tmp_path / name), None, "train").to_list() == rows


def test_rows_that_are_empty_are_said_where_others_are_not(caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dpo(changed(2, rejected=""))
    assert "`rejected` is empty in row 2 of the dataset 'train'." in caplog.text


def test_a_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="`output_dir` is 'a/b', and . is not writable: name another folder."):
        dpo_config(output_dir="a/b")
