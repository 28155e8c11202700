"""Compiles the kernels of a step for a GPU, on a machine without one: `python -m tests.optim.compile_kernels`.

Triton's interpreter, which the other tests use, takes what its compiler refuses. Prints a line a kernel.
"""

import itertools
import os


os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from prm_hf.optim import PRM
from prm_hf.optim.triton import launch


TARGET = GPUTarget("cuda", 90, 32)
SETTINGS = [{"reduction": reduction} for reduction in ("per_tensor", "per_param", "per_row")]
SETTINGS += [{"reduction": "per_row", "signal_beta": 0.98}, {"mask": "none"}]
compiled = set()


def compile_only(kernel: JITFunction, *args, grid, warmup, num_warps, **kwargs) -> None:
    """In place of a launch."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else mangle_type(x) for name, x in given.items()}
    key = (kernel.__name__, *map(str, constants.items()))
    if key in compiled:
        return
    compiled.add(key)
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    code = triton.compile(source, target=TARGET, options={"num_warps": num_warps})
    assert f".entry {kernel.__name__}" in code.asm["ptx"], key
    print(kernel.__name__, {name: str(x) for name, x in constants.items()}, flush=True)


def main() -> None:
    launch.INTERPRETED = True  # takes the tensors of a CPU
    JITFunction.run = compile_only
    shapes = (130, 272), (64, 128), (4096,), (64, 5000)  # rows of whole 16 elements, and others; short and long
    for settings, state_dtype in itertools.product(SETTINGS, ("float32", "bf16", "8bit")):
        dtype = torch.float32 if state_dtype == "bf16" else torch.bfloat16
        params = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        optimizer = PRM(params, fused=True, state_dtype=state_dtype, **settings)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


if __name__ == "__main__":
    main()
