"""What wrong input says: each case of test_bad_input.txt with its whole message, before anything takes time.

A message says the argument, the value, and what to do. A command line says it in one line, with the exit code 2.
"""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from prm_hf import (
    PRM,
    PopulationRiskStopping,
    PRMDPOConfig,
    PRMDPOTrainer,
    PRMSFTConfig,
    PRMSFTTrainer,
    cli,
    flip_preferences,
)
from prm_hf.experiments.data import load_split
from prm_hf.noise import corrupt

from .tiny import make_model, make_tokenizer, preference_dataset


ROWS = [{"prompt": "w1 w2", "chosen": f" w{i} ", "rejected": " w9 w8 "} for i in range(4)]
PAIRS = Dataset.from_list(ROWS)
TEXTS = Dataset.from_list([{"prompt": "w1 w2", "completion": f" w{i} "} for i in range(4)])
CLASSES = Dataset.from_dict(
    {"text": ["a", "b"], "label": [0, 1]}, Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
)
MESSAGES = [{"role": "user", "content": "w1"}]
CHAT = Dataset.from_list([{"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES}] * 2)
ON_CPU = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}


# What a case of the table is written with, beside the functions below.
OBJECTS = (PRM, PRMDPOTrainer, PopulationRiskStopping, DatasetDict, flip_preferences, corrupt, load_split, math)


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
