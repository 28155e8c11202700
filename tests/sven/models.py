"""Small models with samples that do not depend on each other, and gradients of their losses, one sample at a time."""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prm_hf.sven.capture import Capture
from prm_hf.sven.jacobian import Jacobian


class Tied(nn.Module):
    """An embedding whose weight is that of the output layer, and a table that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.table(ids) + 0.3 * self.table(ids.roll(1, 1))).tanh())


class Raw(nn.Module):
    """A parameter beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor([0.5, 2.0])), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.scale * x))


class Experts(nn.Module):
    """A layer that only the tokens with a positive first number go through, in no order of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).flatten(0, -2)
        chosen = x.flatten(0, -2)[:, 0] > 0
        return hidden.masked_scatter(chosen.unsqueeze(1), self.expert(hidden[chosen]).tanh()).view(x.shape)


class Borrowed(nn.Module):
    """A weight that is used outside its layer too, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.layer(x).tanh(), self.layer.weight)


def seeded(make, *args, **kwargs) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


def llama(**config) -> LlamaForCausalLM:
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return seeded(LlamaForCausalLM, LlamaConfig(**{**sizes, **heads, "pad_token_id": 0, **config}))


def gpt2(**config) -> GPT2LMHeadModel:
    sizes = {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return seeded(GPT2LMHeadModel, GPT2Config(**{**sizes, **no_dropout, **config}))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of the labels of each row that are not -100, `(B,)`."""
    shifted = labels[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), shifted, reduction="none", ignore_index=-100)
    return losses.sum(1) / (shifted != -100).sum(1).clamp(min=1)


def padded_batch(n: int = 5, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 37, (n, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(3, length + 1, (n, 1), generator=generator)).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": (ids * mask).masked_fill(mask == 0, -100)}


def jacobian_of(model: nn.Module, losses_of, method: str = "layers") -> Jacobian:
    with Capture(model, method) as capture:
        losses = losses_of()
    return capture.differentiate(losses)


def true_rows(model: nn.Module, losses_of) -> Tensor:
    """The gradients by a backward pass for each sample, `(B, parameters)`."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in losses_of():
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        full = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True)]
        rows.append(torch.cat([g.flatten() for g in full]))
    return torch.stack(rows)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
