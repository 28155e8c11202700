"""State tensors as the step computes with them, and as they are kept: bfloat16, or 8 bits a value by torchao.

torchao's `OptimState8bit` keeps a code of 8 bits a value, the position in a table that it scales to the largest value
of each block of 256 (Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861). Blocks lie in
the flattened tensor. The file needs torchao only where such a tensor is made.
"""

import torch
from torch import Tensor


# As bitsandbytes and torchao: smaller tensors stay in float32, which costs nothing and is safer for norms and biases.
BLOCK, SMALLEST = 256, 4096


def is_quantized(tensor: Tensor) -> bool:
    return hasattr(tensor, "dequantize") and hasattr(tensor, "codes")


def quantized_zeros(like: Tensor, signed: bool) -> Tensor:
    """Zeros of a tensor's shape in 8 bits, or in float32 where it is too small or not made of whole blocks."""
    if like.numel() < SMALLEST or like.numel() % BLOCK or not like.is_contiguous():
        return torch.zeros_like(like, dtype=torch.float32, memory_format=torch.preserve_format)
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit.zeros(like.shape, signed, BLOCK, like.device)


def flat_slice(tensor: Tensor, span: slice) -> Tensor:
    """Elements of a contiguous tensor, flattened, sharing its memory. 8-bit tensors are only cut between blocks."""
    if not is_quantized(tensor):
        return tensor.view(-1)[span]
    blocks = slice(span.start // BLOCK, -(-span.stop // BLOCK))
    return type(tensor)(tensor.codes.view(-1)[span], tensor.scale[blocks], tensor.qmap, tensor.signed)


def read(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`: the tensor itself where it is kept so."""
    if is_quantized(tensor):
        return tensor.dequantize(dtype)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def write(tensor: Tensor, values: Tensor) -> None:
    """Keeps `values`, rounded to the nearest that `tensor` can hold; nothing where `values` is `tensor`."""
    if tensor is values:
        return
    if not is_quantized(tensor) or is_quantized(values):  # codes are copied as they are
        tensor.copy_(values)
        return
    # The same as `tensor.copy_(values)`, which if not compiled takes 40 passes over temporaries of 8 bytes a value.
    scale = values.reshape(-1, BLOCK).abs().amax(1).clip_(1e-12)
    borders = (tensor.qmap[1:] + tensor.qmap[:-1]) / 2
    scaled = values.reshape(-1, BLOCK) / scale.unsqueeze(1)
    tensor.codes.copy_(torch.bucketize(scaled, borders, right=True, out_int32=True).view(tensor.shape))
    tensor.scale.copy_(scale)
