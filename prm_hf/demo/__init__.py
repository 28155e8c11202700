"""A preference task with a known utility, a tokenizer and a tiny Qwen2 model: real runs without a model hub."""

from .._extras import require


require("prm_hf.demo", "transformers", "trl", "datasets")

from .build import Demo, build_demo
from .model import make_model, make_tokenizer, train_reference
from .task import best_completion, completion_rows, preference_pairs, sample_completion, sample_prompts, utility


__all__ = [
    "Demo",
    "best_completion",
    "build_demo",
    "completion_rows",
    "make_model",
    "make_tokenizer",
    "preference_pairs",
    "sample_completion",
    "sample_prompts",
    "train_reference",
    "utility",
]
