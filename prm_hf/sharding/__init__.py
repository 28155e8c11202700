"""Where a tensor lives under DDP, FSDP and DeepSpeed. This room imports torch alone and knows no optimizer."""

from .layout import (
    Layout,
    Segment,
    ShardingPath,
    UnitRange,
    find_layout,
)
from .locator import FlatBuffer, Locator, Slice
from .tensors import has_whole_rows, is_dtensor, is_fake, local_tensor, local_tensors, shard, shard_rows, with_local
from .unit_masks import FlatVariances, UnitTable


__all__ = [
    "FlatBuffer",
    "FlatVariances",
    "Layout",
    "Locator",
    "Segment",
    "ShardingPath",
    "Slice",
    "UnitRange",
    "UnitTable",
    "find_layout",
    "has_whole_rows",
    "is_dtensor",
    "is_fake",
    "local_tensor",
    "local_tensors",
    "shard",
    "shard_rows",
    "with_local",
]
