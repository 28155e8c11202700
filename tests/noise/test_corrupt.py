"""prm_hf.noise.corrupt: the six kinds do to labels, images, text and preferences what their definitions say."""

import math

import numpy as np
import pytest
from datasets import (
    Array3D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_from_disk,
)
from PIL import Image as PILImage
from scipy import stats
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from prm_hf.demo import make_tokenizer, sample_prompts
from prm_hf.noise import corrupt, flip_preferences
from prm_hf.noise.images import gaussian_moments
from prm_hf.noise.rng import row_generator


N, C = 4000, 10
KINDS = ("true_labels", "partial_labels", "random_labels", "shuffled_inputs", "random_inputs", "gaussian_inputs")
INPUT_KINDS = KINDS[3:]


def classes(n=N):
    features = Features({"x": Value("int64"), "label": ClassLabel(num_classes=C)})
    return Dataset.from_dict({"x": list(range(n)), "label": [i % C for i in range(n)]}, features=features)


def images(n=40, shape=(3, 6, 5), dtype="float32", seed=0):
    pixels = np.random.default_rng(seed).gamma(2.0, 20.0, size=(n, *shape)).astype(dtype)
    features = Features({"pixel_values": Array3D(shape, dtype), "label": ClassLabel(num_classes=C)})
    return Dataset.from_dict({"pixel_values": pixels, "label": [i % C for i in range(n)]}, features=features)


def sft(n=300):
    return Dataset.from_dict(
        {"prompt": [f"p{i}" for i in range(n)], "completion": [f"c{i}" for i in range(n)], "n": list(range(n))}
    )


def words(n=60, seed=0):
    import random

    prompts = sample_prompts(n, random.Random(seed))
    return Dataset.from_dict({"prompt": prompts, "completion": [f"answer {p[-7:]}" for p in prompts]})


def pairs(n=300):
    return Dataset.from_dict({name: [f"{name[0]}{i}" for i in range(n)] for name in ("prompt", "chosen", "rejected")})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def within_binomial(count, n, p):
    return abs(count - n * p) <= 4 * math.sqrt(max(n * p * (1 - p), 1e-9))


# --- class labels ---


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("exclude_true", [False, True])
def test_share_of_changed_classes(p, exclude_true):
    for seed in range(5):
        data = corrupt(classes(), "partial_labels", p, seed, exclude_true=exclude_true, keep_original=True)
        new, old = np.array(data["label"][:]), np.array(data["original_label"][:])
        assert np.array_equal(data["corrupted"][:], new != old) and np.array_equal(old, np.arange(N) % C)
        expected = p if exclude_true else p * (1 - 1 / C)
        if expected == 1:
            assert (new != old).all()
        else:
            assert within_binomial((new != old).sum(), N, expected)


@pytest.mark.parametrize("kind", ["partial_labels", "random_labels"])
def test_a_new_class_does_not_depend_on_the_true_one(kind):
    """Not one permutation of the classes, which a model can learn as well as the classes themselves."""
    data = corrupt(classes(20_000), kind, keep_original=True)
    table = np.zeros((C, C))
    np.add.at(table, (data["original_label"][:], data["label"][:]), 1)
    assert (table > 0).all() and stats.chi2_contingency(table).pvalue > 1e-3
    assert within_binomial(sum(data["corrupted"][:]), 20_000, 0.9)


def test_transition_matrix():
    matrix = np.zeros((C, C))
    for i in range(C):
        matrix[i, i], matrix[i, (i + 1) % C] = 0.6, 0.4
    matrix[3] = np.eye(C)[7]  # every 3 becomes a 7
    data = corrupt(classes(), "partial_labels", transition=matrix, keep_original=True)
    new, old = np.array(data["label"][:]), np.array(data["original_label"][:])
    assert (new[old == 3] == 7).all()
    others = old != 3
    assert set(((new - old) % C)[others]) == {0, 1}
    assert within_binomial((new != old)[others].sum(), others.sum(), 0.4)
    with pytest.raises(ValueError, match=r"`transition` must be a 10 x 10 .* shape \(2, 2\)"):
        corrupt(classes(), "partial_labels", transition=np.eye(2))
    with pytest.raises(ValueError, match="contradict"):
        corrupt(classes(), "partial_labels", transition=matrix, exclude_true=True)


def test_unlabelled_rows_stay_so():
    data = classes(50).cast_column("label", Value("int64")).map(lambda row: {"label": -1})
    data = data.cast_column("label", ClassLabel(num_classes=C))
    assert corrupt(data, "random_labels")["label"][:] == [-1] * 50


# --- images ---


def pixels_of(data, column="pixel_values"):
    return np.array(data.with_format("numpy")[column][:])


def test_shuffled_pixels_have_one_order_in_all_splits():
    data = DatasetDict(train=images(), test=images(7, seed=1))
    result = corrupt(data, "shuffled_inputs", seed=3)
    sources, moved = pixels_of(data["train"]), pixels_of(result["train"])
    order = [
        np.flatnonzero((sources.reshape(len(sources), 3, -1)[:, 0] == column[:, None]).all(0))[0]
        for column in moved.reshape(len(moved), 3, -1)[:, 0].T
    ]
    assert sorted(order) == list(range(30)) and order != list(range(30))
    for split in data:  # all channels, all rows, all splits
        before, after = (pixels_of(d[split]).reshape(len(d[split]), 3, -1) for d in (data, result))
        assert np.array_equal(before[:, :, order], after)
        assert all(result[split]["corrupted"][:]) and result[split]["label"][:] == data[split]["label"][:]


def test_random_pixels_have_an_order_for_each_image():
    data = DatasetDict(train=images(), test=images())
    result = corrupt(data, "random_inputs")
    before, after = (pixels_of(d["train"]).reshape(40, 3, -1) for d in (data, result))
    columns = [{tuple(c) for c in image.T} for image in before]
    assert columns == [{tuple(c) for c in image.T} for image in after]
    orders = {tuple(np.argsort(b[0])[np.argsort(np.argsort(a[0]))]) for b, a in zip(before, after, strict=True)}
    assert len(orders) == 40
    # The same images in another split: a row's order is not that of the training row with its index.
    assert not np.array_equal(after, pixels_of(result["test"]).reshape(40, 3, -1))


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_gaussian_pixels_have_the_moments_of_the_dataset(dtype):
    data = images(3000, (3, 8, 8), dtype)
    before, after = pixels_of(data).astype(float), pixels_of(corrupt(data, "gaussian_inputs")).astype(float)
    for channel in range(3):
        assert after[:, channel].mean() == pytest.approx(before[:, channel].mean(), rel=0.01)
        assert after[:, channel].var() == pytest.approx(before[:, channel].var(), rel=0.01)
        assert after[:, channel].std() == pytest.approx(before[:, channel].std(), rel=0.01)
    flat = after[:, 0].reshape(3000, -1)
    assert abs(np.corrcoef(flat[:, 0], flat[:, 1])[0, 1]) < 4 / math.sqrt(3000)
    if dtype == "float32":
        standard = (flat[:300] - before[:, 0].mean()) / before[:, 0].std()
        assert stats.kstest(standard.ravel()[:5000], "norm").pvalue > 1e-3


def test_bytes_that_are_nearly_black_keep_their_moments():
    rng = np.random.default_rng(0)
    black = [np.where(rng.random((28, 28)) < 0.8, 0, rng.integers(100, 256, (28, 28))).astype("uint8")] * 2
    (mean,), (std,) = gaussian_moments(black, "image", "uint8")
    drawn = np.clip(np.rint(rng.normal(mean, std, 400_000)), 0, 255)
    assert drawn.mean() == pytest.approx(np.mean(black), rel=0.01)
    assert drawn.std() == pytest.approx(np.std(black), rel=0.01)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_pil_images(mode, kind):
    rng = np.random.default_rng(0)
    pictures = [PILImage.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).convert(mode) for _ in range(6)]
    data = Dataset.from_dict({"image": pictures, "label": [0] * 6}, features=None).cast_column("image", Image())
    result = corrupt(data, kind)
    for before, after in zip(data["image"][:], result["image"][:], strict=True):
        before = before.convert("RGB") if mode == "P" else before
        assert after.size == before.size and after.mode == before.mode
        if kind != "gaussian_inputs":
            colours = [sorted(map(tuple, np.asarray(x).reshape(20, -1))) for x in (before, after)]
            assert colours[0] == colours[1]


def test_vectors_are_pixels_without_a_tokenizer():
    data = Dataset.from_dict({"pixel_values": [[float(i + j) for j in range(9)] for i in range(5)]})
    result = corrupt(data, "shuffled_inputs")
    moved = np.array(result["pixel_values"][:])
    assert (moved - moved[:1] == np.arange(5)[:, None]).all() and sorted(moved[0]) == list(range(9))


# --- prompts and completions ---


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_another_rows_completion(p):
    for seed in range(5):
        data = corrupt(sft(), "partial_labels", p, seed, keep_original=True)
        own = [c == f"c{i}" for i, c in enumerate(data["completion"][:])]
        assert [not x for x in own] == data["corrupted"][:]
        assert within_binomial(own.count(False), 300, p)
        assert set(data["completion"][:]) <= {f"c{i}" for i in range(300)}
        assert data["original_completion"][:] == [f"c{i}" for i in range(300)]
        assert data["prompt"][:] == sft()["prompt"][:] and data.column_names[:3] == ["prompt", "completion", "n"]


def test_random_completions_are_a_derangement():
    for seed in range(10):
        completions = corrupt(sft(), "random_labels", seed=seed)["completion"][:]
        assert sorted(completions) == sorted(sft()["completion"][:])
        assert all(c != f"c{i}" for i, c in enumerate(completions))
    # Where each completion goes is uniform over the other rows.
    places = [corrupt(sft(5), "random_labels", seed=s)["completion"][:].index("c0") for s in range(120)]
    assert 0 not in places and stats.chisquare(np.bincount(places, minlength=5)[1:]).pvalue > 1e-3


def test_conversations_and_several_columns():
    data = sft(30).map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "source": f"s{row['n']}",
        },
        remove_columns=["prompt", "completion"],
    )
    result = corrupt(data, "partial_labels", columns=["completion", "source"])
    for i, row in enumerate(result):
        donor = int(row["source"][1:])
        assert donor != i and row["completion"] == [{"content": f"c{donor}", "role": "assistant"}]


def test_shuffled_tokens_are_one_bijection_in_all_splits(tokenizer):
    data = DatasetDict(train=words(), test=words(20, seed=5))
    result = corrupt(data, "shuffled_inputs", tokenizer=tokenizer)
    mapping = {}
    for split in data:
        for before, after in zip(data[split]["prompt"], result[split]["prompt"], strict=True):
            before, after = before.split(), after.split()
            assert len(before) == len(after)
            for a, b in zip(before, after, strict=True):
                assert mapping.setdefault(a, b) == b
        assert result[split]["completion"][:] == data[split]["completion"][:]
    assert len(set(mapping.values())) == len(mapping) and any(a != b for a, b in mapping.items())


def test_special_tokens_and_their_places_are_kept(tokenizer):
    special = set(tokenizer.all_special_ids)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, len(tokenizer), size=rng.integers(5, 12)).tolist() for _ in range(50)]
    assert any(special & set(row) for row in rows)
    data = Dataset.from_dict({"input_ids": rows}, features=Features({"input_ids": List(Value("int64"))}))
    for kind, options in (
        ("shuffled_inputs", {}),
        ("shuffled_inputs", {"shuffle": "positions"}),
        ("random_inputs", {}),
        ("gaussian_inputs", {}),
    ):
        result = corrupt(data, kind, tokenizer=tokenizer, **options)["input_ids"][:]
        assert result != rows
        for before, after in zip(rows, result, strict=True):
            assert [(i, t) for i, t in enumerate(before) if t in special] == [
                (i, t) for i, t in enumerate(after) if t in special
            ]
            if kind == "random_inputs" or options:
                assert sorted(before) == sorted(after)
    renamed = corrupt(data, "shuffled_inputs", tokenizer=tokenizer)["input_ids"][:]
    pairs_of_ids = {(a, b) for x, y in zip(rows, renamed, strict=True) for a, b in zip(x, y, strict=True)}
    assert len(pairs_of_ids) == len({a for a, _ in pairs_of_ids}) == len({b for _, b in pairs_of_ids})


def test_one_order_of_positions(tokenizer):
    data = words()
    result = corrupt(data, "shuffled_inputs", tokenizer=tokenizer, shuffle="positions")
    orders = set()
    for before, after in zip(data["prompt"], result["prompt"], strict=True):
        before, after = before.split(), after.split()
        assert sorted(before) == sorted(after)
        if len(set(before)) == len(before):
            orders.add(tuple(before.index(word) for word in after))
    assert len(orders) == 1 and orders != {tuple(range(8))}


def test_token_order_of_each_row_within_windows(tokenizer):
    rows = [list(range(10, 30))] * 30
    data = Dataset.from_dict({"input_ids": rows})
    whole = corrupt(data, "random_inputs", tokenizer=tokenizer)["input_ids"][:]
    assert len({tuple(row) for row in whole}) == 30 and all(sorted(row) == rows[0] for row in whole)
    blocks = corrupt(data, "random_inputs", tokenizer=tokenizer, window=4)["input_ids"][:]
    assert len({tuple(row) for row in blocks}) == 30
    for row in blocks:
        assert [sorted(row[i : i + 4]) for i in range(0, 20, 4)] == [rows[0][i : i + 4] for i in range(0, 20, 4)]


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_strings_of_a_byte_level_tokenizer_stay_readable(kind):
    """A byte that is moved away from the other bytes of its character decodes to none."""
    texts = [f"naïve dogs {i} — it's 日本語" for i in range(20)]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(texts, vocab_size=256)  # the bytes alone: which pairs it would merge first is open
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer)
    split = [i for i in tokenizer.encode(texts[0]) if "\ufffd" in tokenizer.decode([i])]
    assert split  # some characters are several tokens
    result = corrupt(Dataset.from_dict({"prompt": texts}), kind, tokenizer=tokenizer)
    assert all(result["corrupted"][:]) and "\ufffd" not in "".join(result["prompt"][:])
    if kind == "random_inputs":
        assert [sorted(after) for after in result["prompt"]] == [sorted(before) for before in texts]


def test_unigram_tokens(tokenizer):
    data = words(400)
    result = corrupt(data, "gaussian_inputs", tokenizer=tokenizer, columns=["prompt", "completion"])
    count = {}
    for name, source in (("before", data), ("after", result)):
        texts = [f"{row['prompt']} {row['completion']}".split() for row in source]
        count[name] = {word: sum(text.count(word) for text in texts) for text in texts for word in text}
    assert count["after"].keys() <= count["before"].keys()
    total = sum(count["before"].values())
    assert sum(count["after"].values()) == total
    expected = np.array(list(count["before"].values()), dtype=float)
    assert stats.chisquare([count["after"].get(word, 0) for word in count["before"]], expected).pvalue > 1e-3
    assert all(len(a.split()) == len(b.split()) for a, b in zip(data["prompt"], result["prompt"], strict=True))
    neighbours = {tuple(row["prompt"].split()[:2]) for row in result}
    assert len(neighbours) > 50  # and not "formal sort" or "casual sort" alone


# --- preferences ---


@pytest.mark.parametrize(("kind", "rate"), [("partial_labels", 0.3), ("random_labels", 0.5)])
def test_preferences_are_flipped(kind, rate):
    p = rate if kind == "partial_labels" else 1.0
    result = corrupt(pairs(), kind, p, seed=4, keep_original=True)
    expected = flip_preferences(pairs(), rate, seed=4)
    assert result.select_columns(expected.column_names).to_list() == expected.to_list()
    assert result["corrupted"][:] == expected["flipped"][:]
    assert result["original_chosen"][:] == pairs()["chosen"][:]
    assert result["original_rejected"][:] == pairs()["rejected"][:]


def test_inputs_of_preferences_change_alike_on_both_sides(tokenizer):
    data = words().map(lambda row: {"chosen": row["completion"], "rejected": row["completion"]})
    data = data.remove_columns("completion")
    for kind in ("shuffled_inputs", "random_inputs"):
        result = corrupt(data, kind, tokenizer=tokenizer)
        assert result["chosen"][:] == result["rejected"][:] != data["chosen"][:]
        assert result["prompt"][:] != data["prompt"][:]
    drawn = corrupt(data, "gaussian_inputs", tokenizer=tokenizer)
    assert drawn["chosen"][:] != drawn["rejected"][:]


# --- whatever the data ---


def case(name):
    """A dataset by its name, and the options that all kinds take with it."""
    if name == "classes":
        return classes(60), {}
    if name == "images":
        return images(20), {}
    if name == "sft":
        return words(30), {"tokenizer": make_tokenizer()}
    data = words(30).rename_column("completion", "chosen").map(lambda row: {"rejected": "answer 1 2"})
    return data, {"tokenizer": make_tokenizer()}


DATA_AND_KIND = [
    *(("classes", kind) for kind in ("partial_labels", "random_labels")),
    *(("images", kind) for kind in INPUT_KINDS),
    *((name, kind) for name in ("sft", "pairs") for kind in KINDS),
]


@pytest.mark.parametrize(("name", "kind"), DATA_AND_KIND)
def test_a_row_depends_on_seed_and_index_alone(name, kind, tmp_path):
    source, options = case(name)
    source.save_to_disk(tmp_path)
    source = load_from_disk(tmp_path)
    before = source.to_list()
    share = {} if kind in ("true_labels", "random_labels") else {"noise_rate": 0.6}
    once = corrupt(source, kind, seed=2, **share, **options)
    assert corrupt(source, kind, seed=2, num_proc=2, **share, **options).to_list() == once.to_list()
    if kind != "true_labels":
        assert corrupt(source, kind, seed=3, **share, **options).to_list() != once.to_list()
    if share:
        assert 0 < sum(once["corrupted"][:]) < len(source)
        more = corrupt(source, kind, 0.8, seed=2, **options)
        changed = [i for i, c in enumerate(once["corrupted"][:]) if c]
        assert [more[i] for i in changed] == [once[i] for i in changed]
    unchanged = [i for i, c in enumerate(once["corrupted"][:]) if not c]
    rows = once.select(unchanged).select_columns(source.column_names).to_list()
    assert rows == [before[i] for i in unchanged]
    assert source.to_list() == before


@pytest.mark.parametrize(("name", "kind"), DATA_AND_KIND)
def test_streams_equal_datasets_or_say_why_not(name, kind):
    source, options = case(name)
    stream = source.to_iterable_dataset(num_shards=3)
    if kind == "gaussian_inputs" or name == "sft" and kind in ("partial_labels", "random_labels"):
        with pytest.raises(ValueError, match="Load the dataset without streaming"):
            corrupt(stream, kind, **options)
        return
    expected = corrupt(source, kind, seed=1, **options)
    result = corrupt(stream, kind, seed=1, **options)
    assert isinstance(result, IterableDataset) and result.features == expected.features
    for a, b in zip(result, expected, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_labels_of_the_training_split_alone(tokenizer):
    data = DatasetDict(train=sft(50), test=sft(20))
    result = corrupt(data, "random_labels")
    assert "corrupted" in result["train"].column_names and result["test"].column_names == sft().column_names
    both = corrupt(data, "partial_labels", splits=["train", "test"])
    assert all("corrupted" in both[name].column_names for name in both)
    streams = IterableDatasetDict({name: pairs(20).to_iterable_dataset() for name in ("train", "test")})
    flipped = corrupt(streams, "partial_labels", 0.5)
    assert isinstance(flipped, IterableDatasetDict) and "corrupted" not in next(iter(flipped["test"]))
    with pytest.raises(ValueError, match=r"must name splits of `dataset`, which has \['train', 'test'\]"):
        corrupt(data, "random_labels", splits="dev")
    with pytest.raises(ValueError, match="no split 'train'"):
        corrupt(DatasetDict(a=sft(5)), "random_labels")


def test_true_labels_only_gain_the_column():
    result = corrupt(sft(), "true_labels", keep_original=True, columns="completion")
    assert result.select_columns(sft().column_names).to_list() == sft().to_list()
    assert result["corrupted"][:] == [False] * 300 and result["original_completion"][:] == sft()["completion"][:]


def test_users_format_is_kept():
    data = classes(20).with_format("numpy", columns=["label"])
    result = corrupt(data, "random_labels")
    assert result.format["type"] == "numpy" and result.format["columns"] == ["label", "corrupted"]
    text = corrupt(sft(20).with_format("numpy", columns=["prompt"]), "random_labels")
    assert text.format["columns"] == ["prompt", "corrupted"] and "other_row_completion" not in text.column_names


@pytest.mark.parametrize(
    ("make", "kind", "options", "message"),
    [
        (sft, "noise", {}, "`kind` must be one of 'true_labels', 'partial_labels'"),
        (sft, "partial_labels", {"noise_rate": 1.5}, r"`noise_rate` must be a number in \[0, 1\], got 1.5"),
        (sft, "random_labels", {"noise_rate": 0.5}, "`noise_rate=0.5` has no meaning for 'random_labels'"),
        (sft, "partial_labels", {"seed": -1}, "`seed` must be a non-negative integer"),
        (sft, "random_labels", {"exclude_true": True}, "`exclude_true` is for `kind='partial_labels'`"),
        (sft, "partial_labels", {"exclude_true": True}, "are for class labels, and this is text"),
        (pairs, "partial_labels", {"exclude_true": True}, "are for class labels, and this is a preference"),
        (pairs, "partial_labels", {"columns": "chosen"}, "leave `columns` out to flip"),
        (sft, "random_inputs", {}, "of text needs a `tokenizer`"),
        (images, "random_inputs", {"window": 4}, "`window` is for text"),
        (sft, "random_inputs", {"window": 1}, "`window` must be an integer of at least 2"),
        (sft, "random_inputs", {"window": 2.5}, "`window` must be an integer of at least 2"),
        (sft, "shuffled_inputs", {"shuffle": "words"}, "`shuffle` must be one of 'vocabulary', 'positions'"),
        (sft, "random_inputs", {"shuffle": "positions"}, "`shuffle` is for `kind='shuffled_inputs'`"),
        (sft, "partial_labels", {"columns": "answer"}, "`columns='answer'` must name columns"),
        (sft, "partial_labels", {"columns": "n"}, "neither a class label nor text"),
        (sft, "partial_labels", {"splits": "train"}, "`dataset` is a single Dataset"),
        (lambda: sft().remove_columns(["prompt", "completion"]), "random_labels", {}, "no label that is known"),
        (lambda: sft().remove_columns(["prompt", "completion"]), "random_inputs", {}, "no input that is known"),
        (lambda: sft(1), "random_labels", {}, "there is no other one"),
        (lambda: sft(5).select([]), "random_labels", {}, "has no rows"),
        (lambda: corrupt(sft(5), "true_labels"), "random_labels", {}, "'corrupted' already"),
        (lambda: sft(5).rename_column("completion", "label"), "random_labels", {}, "class_encode_column"),
        (
            lambda: sft(5).add_column("original_completion", ["x"] * 5),
            "random_labels",
            {"keep_original": True},
            "would overwrite the column 'original_completion'",
        ),
    ],
)
def test_wrong_arguments_are_named(make, kind, options, message):
    with pytest.raises(ValueError, match=message):
        corrupt(make(), kind, **options)


def test_a_list_is_refused():
    with pytest.raises(TypeError, match="got list"):
        corrupt([{"prompt": "a"}], "true_labels")


def test_tokens_with_labels_of_their_own_are_refused(tokenizer):
    data = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[5, 6]]})
    with pytest.raises(ValueError, match="`labels` beside its `input_ids`"):
        corrupt(data, "random_inputs", tokenizer=tokenizer)


def test_row_generators_are_pinned_and_independent():
    first = row_generator(0, 5, "test").random(4)
    assert np.array_equal(first, row_generator(0, 5, "test").random(4))
    numbers = np.stack([row_generator(0, i, "test").random(50) for i in range(400)])
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 4 / math.sqrt(20_000)


def test_old_names_of_the_rate_are_accepted_with_a_warning():
    with pytest.warns(DeprecationWarning, match="`p` is now `noise_rate`"):
        old = corrupt(sft(9), "partial_labels", p=0.5)
    assert old.to_list() == corrupt(sft(9), "partial_labels", noise_rate=0.5).to_list()
    pairs = Dataset.from_dict({"chosen": ["a"] * 9, "rejected": ["b"] * 9})
    with pytest.warns(DeprecationWarning, match="`rate` is now `noise_rate`"):
        old = flip_preferences(pairs, rate=0.5)
    assert old.to_list() == flip_preferences(pairs, noise_rate=0.5).to_list()
    with pytest.warns(DeprecationWarning), pytest.raises(TypeError, match="`rate` and `noise_rate` are one argument"):
        flip_preferences(pairs, rate=0.5, noise_rate=0.3)
