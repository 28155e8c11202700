"""Which columns of a dataset hold labels and inputs, and what is in them."""

from collections.abc import Sequence
from typing import Any

from datasets import Array2D, Array3D, ClassLabel, Features, Image, LargeList, List, Value


_IMAGES = ("image", "img", "pixel_values")
LABELS = ("label", "labels")
MARKS = ("flipped", "corrupted")  # say which rows are noisy


def named_columns(columns: str | Sequence[str], features: Features) -> list[str]:
    names = list(columns) if isinstance(columns, Sequence) and not isinstance(columns, str) else [columns]
    missing = [name for name in names if name not in features]
    if missing or not names or len(set(names)) < len(names):
        raise ValueError(f"`columns={columns!r}` must name columns of `dataset`, once each; it has {list(features)}.")
    return names


def label_columns(columns: str | Sequence[str] | None, features: Features) -> list[str]:
    """The columns that hold the label; none for a preference, which lies in the order of two columns."""
    if columns is None:
        if "chosen" in features and "rejected" in features:
            return []
        names = ["completion"] if "completion" in features else [name for name in LABELS if name in features][:1]
        if not names:
            raise ValueError(
                "`dataset` has no label that is known by its name (`chosen` and `rejected`, `completion`, `label`); "
                f"its columns are {list(features)}. Name it in `columns`."
            )
    else:
        names = named_columns(columns, features)
        if {"chosen", "rejected"} & set(names):
            raise ValueError("The label of a preference is which side is `chosen`: leave `columns` out to flip it.")
    for name in names:
        if not isinstance(features[name], ClassLabel) and not is_text(features[name]):
            raise ValueError(
                f"Column {name!r} of `dataset` is {features[name]}, neither a class label nor text. Integers become "
                "one with `dataset.cast_column(…, ClassLabel(num_classes=…))`."
            )
        if isinstance(features[name], ClassLabel) != isinstance(features[names[0]], ClassLabel):
            raise ValueError(f"`columns={columns!r}` mixes class labels and text: corrupt one after the other.")
        if name in LABELS and not isinstance(features[name], ClassLabel):
            raise ValueError(
                f"Column {name!r} of `dataset` holds text: make its words classes with "
                f"`dataset.class_encode_column({name!r})`, or rename it if it is a completion."
            )
    return names


def input_columns(columns: str | Sequence[str] | None, features: Features) -> list[str]:
    if columns is not None:
        names = named_columns(columns, features)
    elif "chosen" in features and "rejected" in features:
        names = [name for name in ("prompt", "chosen", "rejected") if name in features]
    else:
        known = (*_IMAGES, "prompt", "text", "messages", "input_ids")
        names = [name for name in known if name in features][:1]
        if not names:
            raise ValueError(
                f"`dataset` has no input that is known by its name ({', '.join(known)}) in {list(features)}. Name it "
                "in `columns`."
            )
    if "input_ids" in names and isinstance(features.get("labels"), (List, LargeList)) and "labels" not in names:
        raise ValueError(
            "`dataset` has `labels` beside its `input_ids`, which would no longer fit. Remove them, or corrupt the "
            "text before it is tokenised."
        )
    return names


def is_text(feature: Any) -> bool:
    """Strings, or a list of messages."""
    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string")
    inner = _inner(feature)
    return isinstance(inner, dict) and "content" in inner


def _inner(feature: Any) -> Any:
    if isinstance(feature, (List, LargeList)):
        return feature.feature
    return feature[0] if isinstance(feature, list) and feature else None


def is_tokens(feature: Any) -> bool:
    inner = _inner(feature)
    return isinstance(inner, Value) and "int" in inner.dtype


def pixel_dtype(feature: Any) -> str | None:
    """The type of a pixel's numbers; None if the feature does not hold pixels."""
    if isinstance(feature, Image):
        return "uint8"
    if isinstance(feature, (Array2D, Array3D)):
        return feature.dtype
    inner = _inner(feature)
    while _inner(inner) is not None:
        inner = _inner(inner)
    return inner.dtype if isinstance(inner, Value) and ("int" in inner.dtype or "float" in inner.dtype) else None
