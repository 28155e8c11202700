"""A tokenizer, a random Qwen2 model and preference rows that are small enough to train in milliseconds."""

import random

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


# Matrices this small are multiplied sooner by one thread than threads wait for each other
torch.set_num_threads(1)

WORDS = [f"w{i}" for i in range(40)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def make_model(seed: int = 0, **config) -> Qwen2ForCausalLM:
    config = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(Qwen2Config(**config))


def preference_dataset(n: int, seed: int = 0, flipped: bool = True) -> Dataset:
    """`n` pairs of completions of one to six words; every third is marked as flipped."""
    rng = random.Random(seed)

    def words(shortest: int, longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))

    # A space closes the words, so that the end-of-sequence token that TRL appends is a token of its own
    rows = [{"prompt": words(2, 6), "chosen": f" {words(1, 6)} ", "rejected": f" {words(1, 6)} "} for _ in range(n)]
    if flipped:
        rows = [{**row, "flipped": i % 3 == 0} for i, row in enumerate(rows)]
    return Dataset.from_list(rows)
