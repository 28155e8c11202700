"""Where a tensor lives under DDP, FSDP and DeepSpeed. This room imports torch alone and knows no optimizer."""

from .layout import Layout, Piece, RowSpan, find_layout, local_tensor, local_tensors
from .locator import Locator


__all__ = ["Layout", "Locator", "Piece", "RowSpan", "find_layout", "local_tensor", "local_tensors"]
