"""Runs with moments in 8 bits, each step beside one of the float64 reference from what is kept."""

import numpy as np
import torch

from prm_hf.optim import PRM
from prm_hf.optim.quantized import SIGNED, Quantized, moment_of

from . import reference_quantized
from .optimizer_runs import assert_close
from .reference_prm import ReferenceTensor


SHAPES_8BIT = [(130, 64), (3, 4099), (5, 9, 200), (4500,)]  # rows of less than a block, of many, and one row
SHAPES_FLOAT32 = [(4095,), (100, 63), (7,), ()]  # too few elements, and too short rows


def large_params(dtype=torch.float32, shapes=(*SHAPES_8BIT, *SHAPES_FLOAT32)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def wide_gradient(shape, generator):
    """Of orders of magnitude that differ within a block, and with a row of zeros."""
    g = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
    g.view(len(g), -1)[0].mul_(0 if g.dim() > 1 else 1) if g.dim() else None
    return g


def check_steps_from_what_is_kept(params, settings, steps=2, shapes_8bit=SHAPES_8BIT, **implementation):
    """Weights and codes as the reference has them, which the definition of 8 bits then rounds."""
    optimizer = PRM(params, state_dtype="8bit", **settings, **implementation)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, steps + 1):
        references = []
        for p in params:
            p.grad = wide_gradient(p.shape, generator)
            references.append(reference_of(p, optimizer.state[p]))
            references[-1].step(p.grad.double().numpy(), **settings)
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert_close(p, reference.w, 2e-6)
            moments = {"exp_avg": reference.m, "exp_avg_sq": reference.v, "exp_avg_signal": reference.a}
            for key in (key for key in moments if key in optimizer.state[p]):
                value = moment_of(optimizer.state[p], key)
                assert isinstance(value, Quantized) is (tuple(p.shape) in shapes_8bit)
                if isinstance(value, Quantized):
                    noise = None if key in SIGNED else reference_quantized.random_bits(p.numel(), t)
                    codes, scales = reference_quantized.quantize(moments[key], key in SIGNED, noise)
                    np.testing.assert_allclose(value.scale.numpy(), scales, rtol=1e-5, atol=0)
                    # Where float32 and float64 lie on two sides of a border
                    differences = np.abs(value.codes.numpy().astype(int) - codes)
                    assert (differences > 0).mean() < 1e-3 and differences.max(initial=0) <= 1
            if "max_exp_avg_sq" in optimizer.state[p]:
                assert_close(optimizer.state[p]["max_exp_avg_sq"], reference.v_max, 1e-6)


def reference_of(p, state):
    """The float64 reference in the state that a tensor is kept in."""
    reference = ReferenceTensor(p.detach().numpy())
    if state:
        reference.t = int(state["step"])
        names = {"exp_avg": "m", "exp_avg_sq": "v", "exp_avg_signal": "a", "max_exp_avg_sq": "v_max"}
        for key, name in names.items():
            if f"{key}_scale" in state:
                codes, scales = state[key].numpy(), state[f"{key}_scale"].numpy()
                setattr(reference, name, reference_quantized.dequantize(codes, scales, key in SIGNED))
            elif key in state:
                setattr(reference, name, state[key].double().numpy().copy())
        if "grad_var" in state:
            s = state["grad_var"].double().numpy()
            of_rows = s.reshape(-1, *[1] * (p.dim() - 1)) if s.ndim == 1 and p.dim() else s.reshape(-1)[:1]
            s = s if s.shape == p.shape else of_rows
            reference.s = np.broadcast_to(s, p.shape or (1,)).reshape(p.shape).copy()
    return reference
