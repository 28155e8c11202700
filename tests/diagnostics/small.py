"""Models of a few hundred parameters in float64, whose curvature matrices can be made whole in another way."""

from collections.abc import Callable

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, jacrev

from ..tiny import make_model


def lora_model(seed: int = 0, b: float = 0.3) -> nn.Module:
    """A Qwen2 model with LoRA of rank 1 on two projections, in float64; its B is not 0."""
    model = make_model(seed, num_hidden_layers=1, hidden_size=16, intermediate_size=16).double()
    model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data = b * noise if "lora_B" in name else noise
    return model.train()


def token_rows(n: int = 5, seed: int = 0) -> Dataset:
    """Rows of three to eight tokens, of which the first two have no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        tokens = torch.randint(3, 43, (3 + (i * 3) % 6,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]})
    return Dataset.from_list(rows)


def pair_rows(n: int = 5, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 43, (count,), generator=generator).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return Dataset.from_list(
        [dict(zip(names, (tokens(2 + i % 3), tokens(1 + i % 4), tokens(3)), strict=True)) for i in range(n)]
    )


def jacobian(model: nn.Module, predict: Callable[[dict], torch.Tensor]) -> torch.Tensor:
    """d predict / d trainable parameters, `(predictions, n_params)`, row by row in reverse mode."""
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = jacrev(predict)(values)
    return torch.cat([part.reshape(-1, values[name].numel()) for name, part in found.items()], dim=1)


def logits_of(model: nn.Module, values: dict, row: list[int]) -> torch.Tensor:
    """Logits of one sequence without padding, `(tokens, vocabulary)`."""
    inputs = {"input_ids": torch.tensor([row]), "use_cache": False}
    return functional_call(model, values, (), inputs).logits[0]
