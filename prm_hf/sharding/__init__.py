"""Where a tensor lives under DDP, FSDP and DeepSpeed. This room imports torch alone and knows no optimizer."""

from .layout import (
    Layout,
    Segment,
    ShardingPath,
    UnitRange,
    find_layout,
)
from .locator import Locator
from .tensors import is_dtensor, is_fake, local_tensor, local_tensors, shard_rows, with_local
from .unit_masks import FlatVariances, UnitTable


__all__ = [
    "FlatVariances",
    "Layout",
    "Locator",
    "Segment",
    "ShardingPath",
    "UnitRange",
    "UnitTable",
    "find_layout",
    "is_dtensor",
    "is_fake",
    "local_tensor",
    "local_tensors",
    "shard_rows",
    "with_local",
]
