"""Completions of a model, in batches: greedy, or drawn so that each depends on its own random numbers alone."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from ..noise.rng import row_generator


# What a model's own generation config must not change: decoding is greedy, or by the sampler alone.
_PLAIN = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
_PLAIN |= {"temperature": None, "top_p": None, "top_k": None, "use_cache": True}


class Completion(NamedTuple):
    """A generated text, and whether the model ended it. If not, it was cut off."""

    text: str
    is_whole: bool


class Sampler(LogitsProcessor):
    """Draws each next token by one uniform number of its row, whatever other rows there are in the batch.

    Args:
        uniforms: in [0, 1), float64, `[rows, max_new_tokens]`.
        temperature, top_p: as usual; 1 and 1 draw from the model's distribution.
    """

    def __init__(self, uniforms: Tensor, temperature: float, top_p: float) -> None:
        self.uniforms, self.temperature, self.step = uniforms, temperature, 0
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        drawn = self.uniforms[:, self.step, None] * cumulative[:, -1:]
        self.step += 1
        tokens = torch.searchsorted(cumulative, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def seeded_sampler(
    keys: list[tuple[int, int]], seed: int, max_new_tokens: int, temperature: float, top_p: float, device: torch.device
) -> Sampler:
    """The sampler of a batch. The numbers of a row depend on `seed` and on its key, a row and a sample, alone."""
    uniforms = [row_generator(seed, row, f"sample {sample}").random(max_new_tokens) for row, sample in keys]
    return Sampler(torch.from_numpy(np.stack(uniforms)).to(device), temperature, top_p)


def as_messages(prompt: Any) -> Any:
    """A prompt of text as a message of a user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def render(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a model is given: of messages by the chat template."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All that end a text: of the tokenizer, and of the model's generation config."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    return sorted(found)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    max_new_tokens: int,
    sampler: Sampler | None = None,
) -> list[Completion]:
    """The completions of one batch of prompts, texts or messages, all of one kind; greedy without a sampler."""
    inputs = tokenizer(
        [render(prompt, tokenizer) for prompt in prompts],
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=isinstance(prompts[0], str),  # a chat template writes its own
    ).to(model.device)
    ends = end_tokens(model, tokenizer)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
        synced_gpus=False,  # each process has whole weights, and rows of its own
        **_PLAIN,
    )[:, inputs["input_ids"].shape[1] :]
    is_whole = torch.isin(output, torch.tensor(ends, device=output.device)).any(dim=1).tolist()
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [Completion(*found) for found in zip(texts, is_whole, strict=True)]


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
