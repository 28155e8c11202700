"""Where a tensor lives under DDP, FSDP and DeepSpeed. This room imports torch alone and knows no optimizer."""

from .layout import Layout, Piece, find_layout, local_tensor


__all__ = ["Layout", "Piece", "find_layout", "local_tensor"]
