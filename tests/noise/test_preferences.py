"""prm_hf.noise: which rows are flipped is a function of (index, seed) alone, and nothing but the label changes."""

import math

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_from_disk
from datasets.distributed import split_dataset_by_node
from scipy import stats
from torch.utils.data import DataLoader

from prm_hf.noise import corrupt, flip_preferences, sides
from prm_hf.noise.rng import row_uniforms


N_ROWS = 2000


def standard(n=N_ROWS):
    return Dataset.from_dict(
        {
            "prompt": [f"p{i}" for i in range(n)],
            "chosen": [f"c{i}" for i in range(n)],
            "rejected": [f"r{i}" for i in range(n)],
        }
    )


def flips(dataset):
    return [row["flipped"] for row in dataset]


# --- the random numbers ---


def test_row_uniforms_do_not_depend_on_how_they_are_asked_for():
    whole = row_uniforms(3, range(100), "test")
    pieces = [row_uniforms(3, piece, "test") for piece in (range(7), [7], range(8, 60), range(60, 100))]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(row_uniforms(3, [40, 2, 99], "test"), whole[[40, 2, 99]])
    far = 10**12
    assert np.array_equal(row_uniforms(3, [far + 1], "test"), row_uniforms(3, [far, far + 1], "test")[1:])


def test_row_uniforms_are_pinned():
    # Noisy labels of published runs must stay the same in later versions.
    expected = [0.6764095219366842, 0.8124005626898232, 0.8808577795580549, 0.7738553485714037]
    assert row_uniforms(0, range(4), "flip_preferences").tolist() == expected


def test_row_uniforms_are_uniform_and_independent():
    x = row_uniforms(0, range(20_000), "test")
    assert ((0 <= x) & (x < 1)).all()
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    # Neighbouring rows, seeds and streams: correlations within 4 standard errors of 0.
    others = (np.roll(x, 1), row_uniforms(1, range(20_000), "test"), row_uniforms(0, range(20_000), "other"))
    for other in others:
        assert abs(np.corrcoef(x, other)[0, 1]) < 4 / math.sqrt(x.size)


# --- which rows are flipped ---


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_share_of_flips_is_binomial(rate):
    counts = [sum(flips(flip_preferences(standard(), rate, seed))) for seed in range(20)]
    z = (np.array(counts) - rate * N_ROWS) / math.sqrt(N_ROWS * rate * (1 - rate))
    assert np.abs(z).max() < 4
    assert abs(z.sum()) / math.sqrt(len(z)) < 4
    # Counts that spread less than a binomial's would be `exact` in disguise: chi-square, 20 degrees of freedom.
    assert stats.chi2.ppf(1e-4, len(z)) < (z**2).sum() < stats.chi2.ppf(1 - 1e-4, len(z))


@pytest.mark.parametrize(("rate", "expected"), [(0, 0), (1, N_ROWS)])
@pytest.mark.parametrize("exact", [False, True])
def test_rates_0_and_1(rate, expected, exact):
    assert sum(flips(flip_preferences(standard(), rate, exact=exact))) == expected


@pytest.mark.parametrize(("n", "rate"), [(1, 0.3), (1, 0.7), (7, 0.5), (10, 0.3), (256, 0.3), (2000, 0.001)])
def test_exact_count(n, rate):
    for seed in range(5):
        assert sum(flips(flip_preferences(standard(n), rate, seed, exact=True))) == round(rate * n)


@pytest.mark.parametrize("exact", [False, True])
def test_rows_flipped_at_a_rate_are_flipped_at_higher_rates(exact):
    low, high = (np.array(flips(flip_preferences(standard(), rate, 5, exact))) for rate in (0.2, 0.4))
    assert (high >= low).all() and high.sum() > low.sum() > 0


def test_seeds_differ():
    masks = {tuple(flips(flip_preferences(standard(100), 0.5, seed))) for seed in range(10)}
    assert len(masks) == 10


@pytest.mark.parametrize("num_proc", [None, 1, 2, 3])
def test_independent_of_num_proc_and_of_the_cache(tmp_path, num_proc):
    standard().save_to_disk(tmp_path)  # on disk, so that `map` writes and finds cache files
    dataset = load_from_disk(tmp_path)
    expected = flip_preferences(standard(), 0.3, 1).to_list()
    result = flip_preferences(dataset, 0.3, 1, num_proc=num_proc)
    assert len(result.cache_files) == (num_proc or 1)
    assert result.to_list() == expected
    again = flip_preferences(load_from_disk(tmp_path), 0.3, 1, num_proc=num_proc)
    assert again.cache_files == result.cache_files and again.to_list() == expected
    # Other settings must not find the cache of these.
    for rate, seed, exact in ((0.3, 2, False), (0.6, 1, False), (0.3, 1, True)):
        result = flip_preferences(dataset, rate, seed, exact, num_proc=num_proc)
        assert result.to_list() == flip_preferences(standard(), rate, seed, exact).to_list()


def test_index_is_the_position_in_the_dataset_given():
    dataset = standard()
    mask = flips(flip_preferences(dataset, 0.3))
    reordered = dataset.select([5, 3, 1999, 8])
    assert flips(flip_preferences(reordered, 0.3)) == mask[:4]
    sharded = flip_preferences(dataset, 0.3).shard(4, 1, contiguous=False)
    assert flips(sharded) == mask[1::4] and sharded[0]["prompt"] == "p1"


# --- streams ---


def test_stream_equals_dataset_under_any_sharding():
    expected = flip_preferences(standard(), 0.3, 2).to_list()
    stream = flip_preferences(standard().to_iterable_dataset(num_shards=4), 0.3, 2)
    assert list(stream) == expected
    assert list(DataLoader(stream, batch_size=None, num_workers=2)) == expected
    for rank in range(2):
        assert list(split_dataset_by_node(stream, rank=rank, world_size=2)) == expected[rank::2]
    # A later epoch would read the shards of a plain mapped stream in another order.
    stream.set_epoch(3)
    assert list(stream) == expected


def test_shuffled_stream_keeps_each_rows_flip():
    expected = {row["prompt"]: row for row in flip_preferences(standard(), 0.3, 2)}
    stream = flip_preferences(standard().to_iterable_dataset(num_shards=4), 0.3, 2).shuffle(seed=0, buffer_size=100)
    for epoch in (0, 1):
        stream.set_epoch(epoch)
        assert {row["prompt"]: row for row in stream} == expected


def test_stream_resumes():
    expected = flip_preferences(standard(), 0.3).to_list()
    stream = flip_preferences(standard().to_iterable_dataset(num_shards=4), 0.3)
    iterator = iter(stream)
    for _ in range(1500):
        next(iterator)
    state = stream.state_dict()
    resumed = flip_preferences(standard().to_iterable_dataset(num_shards=4), 0.3)
    resumed.load_state_dict(state)
    assert list(resumed) == expected[1500:]


def test_stream_without_known_features():
    def rows():
        yield from ({"chosen": f"c{i}", "rejected": f"r{i}"} for i in range(50))

    stream = flip_preferences(IterableDataset.from_generator(rows), 0.3)
    assert stream.features["flipped"].dtype == "bool"
    assert list(stream) == flip_preferences(standard(50).remove_columns("prompt"), 0.3).to_list()


def test_table_formatted_stream_is_refused():
    for style in ("arrow", "pandas"):
        with pytest.raises(TypeError, match="with_format"):
            next(iter(flip_preferences(standard().to_iterable_dataset().with_format(style), 0.3)))


# --- formats ---


def message(role, content):
    return [{"role": role, "content": content}]


FORMATS = {
    "standard": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "standard, implicit prompt": {"chosen": "p c", "rejected": "p r"},
    "conversational": {
        "prompt": message("user", "p"),
        "chosen": message("assistant", "c"),
        "rejected": message("assistant", "r"),
    },
    "conversational, implicit prompt": {
        "chosen": message("user", "p") + message("assistant", "c"),
        "rejected": message("user", "p") + message("assistant", "r"),
    },
    "scores": {"chosen": "c", "rejected": "r", "score_chosen": 2.0, "score_rejected": 1.0},
    "other names": {
        "id": 7,
        "rejected-model": "small",
        "chosen-model": "large",
        "ref_chosen_logps": -1.0,
        "ref_rejected_logps": -2.0,
        "rejected": "r",
        "chosen": "c",
        "chosen_over_rejected": [1, 2],
        "rejected_over_chosen": [3],
        "margin": 1.0,
    },
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("streaming", [False, True])
def test_formats(name, streaming):
    row = FORMATS[name]
    exchange = {"chosen": "rejected", "rejected": "chosen"}
    partner = {
        column: "_".join(exchange.get(word, word) for word in column.split("_"))
        if "-" not in column
        else "-".join(exchange.get(word, word) for word in column.split("-"))
        for column in row
    }
    dataset = Dataset.from_list([row] * 40)
    before = dataset.to_list()
    result = flip_preferences(dataset.to_iterable_dataset() if streaming else dataset, 0.5)
    rows = list(result)
    assert 0 < sum(flips(rows)) < 40
    for new in rows:
        expected = {column: row[partner[column]] for column in row} if new["flipped"] else dict(row)
        if new["flipped"] and "margin" in row:
            expected["margin"] = -row["margin"]
        assert new == {**expected, "flipped": new["flipped"]}
    assert {**result.features} == {**dataset.features, "flipped": result.features["flipped"]}
    assert result.features["flipped"].dtype == "bool"
    assert dataset.to_list() == before and "flipped" not in dataset.features


def test_users_format_is_kept():
    dataset = standard(20).add_column("score_chosen", [1.0] * 20).add_column("score_rejected", [0.0] * 20)
    result = flip_preferences(dataset.with_format("numpy", columns=["score_chosen"]), 0.5)
    assert result.format["type"] == "numpy" and result.format["columns"] == ["score_chosen", "flipped"]
    assert np.array_equal(result["score_chosen"][:] == 0.0, result["flipped"][:])


# --- dicts of datasets ---


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_named_splits_are_flipped(streaming):
    splits = {name: standard(100) for name in ("train", "test", "extra")}
    if streaming:
        dataset = IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})
    else:
        dataset = DatasetDict(splits)
    expected = flip_preferences(standard(100), 0.3, 4).to_list()
    for named, flipped in ((None, {"train"}), ("test", {"test"}), (["extra", "train"], {"extra", "train"})):
        result = flip_preferences(dataset, 0.3, 4, splits=named)
        assert type(result) is type(dataset) and list(result) == list(splits)
        for name in splits:
            assert list(result[name]) == (expected if name in flipped else standard(100).to_list())
    assert all("flipped" not in split.column_names for split in dataset.values())


# --- errors ---


@pytest.mark.parametrize("rate", [-0.1, 1.1, 30, float("nan"), float("inf"), "0.3", None, True])
def test_wrong_rate(rate):
    with pytest.raises(ValueError, match="`noise_rate` must be a number in"):
        flip_preferences(standard(3), rate)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None, True])
def test_wrong_seed(seed):
    with pytest.raises(ValueError, match="`seed` must be a non-negative integer"):
        flip_preferences(standard(3), 0.3, seed)


@pytest.mark.parametrize("dataset", [[{"chosen": "c", "rejected": "r"}], {"train": standard(3)}, None])
def test_wrong_type(dataset):
    with pytest.raises(TypeError, match="`dataset` must be a datasets.Dataset"):
        flip_preferences(dataset, 0.3)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"prompt": ["p"], "chosen": ["c"]}, "no column 'rejected'.*rename_columns"),
        ({"text": ["p"]}, "no column 'chosen' and no column 'rejected'"),
        ({"chosen": ["c"], "rejected": ["r"], "flipped": [True]}, "'flipped' already"),
        ({"chosen": ["c"], "rejected": ["r"], "chosen_score": [1.0]}, "'chosen_score'.*no partner 'rejected_score'"),
        (
            {"chosen": ["c"], "rejected": ["r"], "score_chosen": [1.0], "score_rejected": [1]},
            "'score_chosen'.*different types.*cast_column",
        ),
        ({"chosen": [], "rejected": []}, "no rows"),
    ],
)
def test_wrong_columns(columns, match):
    dataset = Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=match):
        flip_preferences(dataset, 0.3)
    if dataset:
        with pytest.raises(ValueError, match=match):
            flip_preferences(dataset.to_iterable_dataset(), 0.3)


def test_flipping_twice_is_refused():
    with pytest.raises(ValueError, match="flipping twice"):
        flip_preferences(flip_preferences(standard(3), 0.3), 0.3)


def test_exact_needs_a_length():
    with pytest.raises(ValueError, match="`exact=True` needs the number of rows"):
        flip_preferences(standard(3).to_iterable_dataset(), 0.3, exact=True)


@pytest.mark.parametrize("splits", ["validation", ["train", "validation"], []])
def test_missing_split(splits):
    with pytest.raises(ValueError, match=r"`splits=.*must name splits of `dataset`, which has \['train'\]"):
        flip_preferences(DatasetDict(train=standard(3)), 0.3, splits=splits)


def test_default_split_is_missing():
    with pytest.raises(ValueError, match="no split 'train'.*train_prefs.*`splits`"):
        flip_preferences(DatasetDict(train_prefs=standard(3)), 0.3)


def test_splits_of_a_single_dataset():
    with pytest.raises(ValueError, match="single Dataset"):
        flip_preferences(standard(3), 0.3, splits="train")


# --- other columns that depend on the sides ---


@pytest.mark.parametrize(
    "name, values, swapped",
    [
        ("margin", [1.5, -2.0, 0.0, None], [-1.5, 2.0, 0.0, None]),
        ("reward_margin", [3, 4], [-3, -4]),
        ("scoreMargin", [3.0], [-3.0]),
        ("winner", ["model_a", "model_b", "tie", "tie (bothbad)"], ["model_b", "model_a", "tie", "tie (bothbad)"]),
        ("winner", ["A", "B", None], ["B", "A", None]),
        ("preferred", ["chosen"], ["rejected"]),
        ("choice", ["response_1", "response_2"], ["response_2", "response_1"]),
        ("choice", ["0", "1"], ["1", "0"]),
        ("better", ["Left", "right"], ["Right", "left"]),
        ("preference", [0, 1, 1], [1, 0, 0]),
        ("preference", [1, 2, 1], [2, 1, 2]),
        ("preference", [-1, 0, 1], [1, 0, -1]),
        ("preference", [0.25, 1.0, 0.5], [0.75, 0.0, 0.5]),
        ("label", [True, False], [False, True]),
    ],
)
def test_columns_about_the_sides_follow_a_flip(name, values, swapped, caplog):
    dataset = standard(len(values)).add_column(name, values)
    result = flip_preferences(dataset, 1.0)
    assert result[name][:] == pytest.approx(swapped) if isinstance(swapped[0], float) else swapped
    assert result.features[name] == dataset.features[name] and not caplog.text
    assert flip_preferences(dataset, 0.0)[name][:] == values


def test_a_class_of_two_is_exchanged():
    dataset = standard(2).add_column("label", [0, 1]).cast_column("label", ClassLabel(names=["first", "second"]))
    assert flip_preferences(dataset, 1.0)["label"][:] == [1, 0]


@pytest.mark.parametrize(
    "name, values",
    [
        ("messages", ["x", "y"]),
        ("overall_score", [1.0, 2.0]),
        ("preference_strength", [1, -3]),
        ("winner", ["model-x", "model-y"]),
        ("label", [1, 1]),  # first by 0 and 1, or by 1 and 2?
        ("label", [3, 7]),
        ("margin", ["large", "small"]),
    ],
)
def test_columns_that_may_depend_on_the_sides_are_named_once(name, values, caplog):
    sides._warn.cache_clear()
    dataset = standard(2).add_column(name, values).add_column("topic", ["a", "b"])
    for seed in range(3):
        assert flip_preferences(dataset, 1.0, seed)[name][:] == values
    assert caplog.text.count(f"leaves the columns {name!r} as they are") == 1 and "topic" not in caplog.text


def test_a_pair_of_equal_sides_is_not_flipped():
    texts = ["same", "same", "other"]
    rows = {"prompt": ["p"] * 3, "chosen": texts, "rejected": ["same"] * 3, "margin": [1.0] * 3}
    result = flip_preferences(Dataset.from_dict(rows), 1.0, exact=True)
    assert result["flipped"][:] == [False, False, True] and result["margin"][:] == [1.0, 1.0, -1.0]
    assert corrupt(Dataset.from_dict(rows), "partial_labels", 1.0)["corrupted"][:] == [False, False, True]
