"""Whatever the data and the kind of noise: exactly the rows that changed are marked, and the others are untouched."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, disable_progress_bars, enable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from prm_hf.noise import corrupt, flip_preferences
from prm_hf.noise.corrupt import KINDS, LABEL_KINDS

from ..tiny import make_tokenizer


TOKENIZER = make_tokenizer()
# Few words and few lengths, so that equal sides, equal rows and texts that no order changes are common; and spaces
# that encoding loses
TEXTS = st.lists(st.sampled_from(["w1", "w2", " w3", "w4 ", ""]), max_size=3).map(" ".join)
IDS = st.lists(st.integers(0, 6), max_size=3)
PIXELS = st.sampled_from([0.0, 1.0, float("nan")])


def encoded(mode: str, style: str, seed: int, is_plain: bool) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = PILImage.fromarray(np.zeros_like(pixels) if is_plain else pixels).convert(mode)
    file = io.BytesIO()
    image.save(file, style)
    return {"bytes": file.getvalue(), "path": None}


IMAGES = st.builds(
    lambda form, seed, is_plain: encoded(*form, seed, is_plain),
    st.sampled_from([("RGB", "JPEG"), ("RGB", "PNG"), ("P", "PNG"), ("L", "PNG")]),
    st.integers(0, 3),
    st.booleans(),
)
MESSAGES = TEXTS.map(lambda text: [{"role": "user", "content": text}])
TABLES = {
    "classes": ({"x": Value("int64"), "label": ClassLabel(num_classes=3)}, [st.integers(0, 9), st.integers(-1, 2)]),
    "completions": ({"prompt": Value("string"), "completion": Value("string")}, [TEXTS, TEXTS]),
    "pairs": ({name: Value("string") for name in ("prompt", "chosen", "rejected")}, [TEXTS] * 3),
    "messages": (
        {name: List({"role": Value("string"), "content": Value("string")}) for name in ("chosen", "rejected")},
        [MESSAGES] * 2,
    ),
    "ids": ({"input_ids": List(Value("int64"))}, [IDS]),
    "pixels": ({"pixel_values": List(Value("float32"))}, [st.lists(PIXELS, min_size=3, max_size=3)]),
    "images": ({"image": Image()}, [IMAGES]),
}
LABELLED = {"classes", "completions", "pairs", "messages"}


@pytest.fixture(scope="module", autouse=True)
def no_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


def plain(dataset: Dataset, columns: list[str]) -> list[str]:
    """The rows as they are stored, images as bytes, in a spelling by which NaN equals itself."""
    for name in columns:
        if isinstance(dataset.features[name], Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return [repr(row) for row in dataset.select_columns(columns).to_list()]


CASES = [
    (table, kind)
    for table in TABLES
    for kind in KINDS
    if (kind not in LABEL_KINDS or table in LABELLED)
    and not (table == "classes" and kind not in (*LABEL_KINDS, KINDS[0]))
]


def drawable(table: str, row: tuple, i: int) -> tuple:
    """A row from which a distribution can be made."""
    if table == "pixels":
        return (np.nan_to_num(row[0]).tolist(),)
    if table == "images":
        return (encoded("RGB", "JPEG", i, False),)
    if i > 0:
        return row
    token = {"ids": [3, 4], "messages": [{"role": "user", "content": "w1"}]}.get(table, "w1 w2")
    return (token,) * len(row)


@pytest.mark.slow
@pytest.mark.parametrize("table, kind", CASES, ids=lambda x: x)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_exactly_the_rows_that_changed_are_marked(table, kind, data):
    features, columns = TABLES[table]
    rows = data.draw(st.lists(st.tuples(*columns), min_size=2, max_size=6))
    if kind == "gaussian_inputs":  # which need a token, and numbers
        rows = [drawable(table, row, i) for i, row in enumerate(rows)]
    dataset = Dataset.from_dict(
        {name: [row[i] for row in rows] for i, name in enumerate(features)}, Features(features)
    )
    rate = 1.0 if kind in ("true_labels", "random_labels") else data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    options = {"tokenizer": TOKENIZER} if kind.endswith("inputs") and table not in ("pixels", "images") else {}
    if kind == "shuffled_inputs" and options:
        options["shuffle"] = data.draw(st.sampled_from(["vocabulary", "positions"]))
    result = corrupt(dataset, kind, rate, data.draw(st.integers(0, 5)), **options)
    before, after = plain(dataset, list(features)), plain(result, list(features))
    changed = [a != b for a, b in zip(before, after, strict=True)]
    assert result["corrupted"][:] == changed
    if "flipped" in result.column_names:
        assert result["flipped"][:] == changed


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.floats(-2, 2)), min_size=1, max_size=8),
    rate=st.floats(0, 1),
    exact=st.booleans(),
)
def test_flips_swap_exactly_the_marked_rows(rows, rate, exact):
    names = ("chosen", "rejected", "margin")
    dataset = Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])
    for row, new in zip(rows, flip_preferences(dataset, rate, exact=exact), strict=True):
        chosen, rejected, margin = row
        swapped = (rejected, chosen, -margin)
        assert tuple(new[name] for name in names) == (swapped if new["flipped"] else row)
        assert not (new["flipped"] and chosen == rejected)
