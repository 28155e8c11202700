"""What every tool is run with: a tiny Qwen2 in a folder, whose tokenizer has a token a byte, and rows in files."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from ..tiny import make_model, preference_dataset


ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
N_ROWS = 16


def save_model(folder: Path) -> str:
    """Saves model and tokenizer, which every version of transformers reads as those of a Qwen2; returns its path."""
    names = [*sorted(ByteLevel.alphabet()), *SPECIAL]
    backend = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    ids = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=SPECIAL[1:], **ids)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    sizes = {"max_position_embeddings": 512, "pad_token_id": len(names) - 3, "eos_token_id": len(names) - 1}
    make_model(vocab_size=len(names), **sizes).save_pretrained(folder)
    return str(folder)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs() -> list[dict[str, str]]:
    """Preference pairs with the columns `prompt`, `chosen` and `rejected`."""
    return preference_dataset(N_ROWS, flipped=False).to_list()


def completions() -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]


def check_log(entries: list[dict[str, Any]], n_steps: int) -> None:
    """Fails unless PRM made each of the steps that a trainer logged: the statistics of its mask are in the log."""
    steps = [entry for entry in entries if "loss" in entry]
    assert len(steps) == n_steps
    assert all(0 < entry["mask/mean_q"] <= 1 and entry["mask/parameter_count"] > 0 for entry in steps)
