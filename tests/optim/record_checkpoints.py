"""Writes `tests/optim/recorded/`: checkpoints of version 0.1.0, which every later version has to read.

The script was run once with that version, by `python -m tests.optim.record_checkpoints`, and is kept to show what the
files hold. `test_recorded.py` shares its models with it. Arguments are stored by the names that they had then.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prm_hf.optim import PRM


FOLDER = Path(__file__).parent / "recorded"
SHAPES = [(6, 5), (4,), (3, 2, 2)]
SAVED_AT, STEPS = 4, 7

COMMON = {"lr": 1e-2, "betas": (0.9, 0.99), "rho": 0.9, "eps": 1e-8, "weight_decay": 0.1, "warmup_steps": 1}
PER_PARAM = COMMON | {"reduction": "per_param", "estimator": "ema"}
PER_TENSOR = COMMON | {"reduction": "per_tensor", "estimator": "debiased"}
PER_ROW = COMMON | {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98}

# By name of the file, the settings of each parameter group and the positions of its tensors in `SHAPES`
CASES = {
    "per_param_ema": [(PER_PARAM, [0, 1, 2])],
    "per_param_debiased_amsgrad": [(PER_PARAM | {"estimator": "debiased", "amsgrad": True}, [0, 1, 2])],
    "per_tensor_debiased": [(PER_TENSOR | {"softness": 0.5}, [0, 1, 2])],
    "per_row_debiased_signal": [(PER_ROW, [0, 1, 2])],
    "two_groups": [(PER_PARAM | {"mask": "none", "lr": 1e-3}, [1]), (PER_PARAM | {"mask": "hard"}, [0, 2])],
    "bf16_state": [(PER_ROW | {"state_dtype": "bf16"}, [0, 1, 2])],
}
FLAT_CASES = {
    "flat_per_tensor": [(PER_TENSOR, [0, 2]), (PER_TENSOR | {"weight_decay": 0.0}, [1])],
    "flat_per_row": [(PER_ROW, [0, 2]), (PER_ROW | {"weight_decay": 0.0}, [1])],
    "flat_per_param": [(PER_PARAM, [0, 2]), (PER_PARAM | {"weight_decay": 0.0}, [1])],
}


class WholeModel:
    """The tensors of `SHAPES`, trained as they are."""

    def __init__(self, values: list[Tensor], groups: list[tuple[dict, list[int]]]) -> None:
        self.tensors = [nn.Parameter(value.clone()) for value in values]
        self.optimizer = PRM([settings | {"params": [self.tensors[i] for i in own]} for settings, own in groups])

    def step(self, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.tensors, gradients, strict=True):
            p.grad = gradient.clone()
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.tensors]


class FlatModel(WholeModel):
    """The same as DeepSpeed's ZeRO 1 and 2 hold them on one process: in one flat buffer for each parameter group.

    The original parameters become views of the buffer, and the optimizer steps a float32 copy of it.
    """

    def __init__(self, values: list[Tensor], groups: list[tuple[dict, list[int]]]) -> None:
        super().__init__(values, groups)
        self.positions = [own for _, own in groups]
        self.buffers = []
        for group, own in zip(self.optimizer.param_groups, self.positions, strict=True):
            buffer = torch.cat([values[i].flatten() for i in own])
            for i, view in zip(own, buffer.split([values[i].numel() for i in own]), strict=True):
                self.tensors[i].data = view.view(SHAPES[i])
                self.tensors[i]._dp_group = dist.group.WORLD
            self.buffers.append(nn.Parameter(buffer.clone()))
            group["params"] = [self.buffers[-1]]

    def step(self, gradients: list[Tensor]) -> None:
        for own, buffer in zip(self.positions, self.buffers, strict=True):
            buffer.grad = torch.cat([gradients[i].flatten() for i in own])
        self.optimizer.step()
        for own, buffer in zip(self.positions, self.buffers, strict=True):
            pieces = buffer.detach().split([self.tensors[i].numel() for i in own])
            for i, piece in zip(own, pieces, strict=True):
                self.tensors[i].data.copy_(piece.view(SHAPES[i]))


def record(model_class: type[WholeModel], groups: list[tuple[dict, list[int]]]) -> dict:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=generator) * 0.3 + 0.2 for shape in SHAPES] for _ in range(STEPS)]
    model = model_class(start, groups)
    for step in gradients[:SAVED_AT]:
        model.step(step)
    saved = {"groups": groups, "gradients": gradients[SAVED_AT:], "params": model.values()}
    saved["state_dict"] = torch.utils._pytree.tree_map(
        lambda x: x.clone() if torch.is_tensor(x) else x, model.optimizer.state_dict()
    )
    for step in gradients[SAVED_AT:]:
        model.step(step)
    return saved | {"expected": model.values()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for name, groups in (CASES | FLAT_CASES).items():
            model_class = FlatModel if name in FLAT_CASES else WholeModel
            torch.save(record(model_class, groups), FOLDER / f"{name}.pt")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
