"""The study of `recipes/compression.py`: its data are what they say, its arguments are checked, its table is whole."""

import json

import numpy as np
import pytest

from prm_hf.experiments import compression, compression_data
from prm_hf.experiments.compression import CompressionArguments, main
from prm_hf.experiments.compression_data import (
    VOCABULARY,
    documents,
    handwritten_digits,
    preferences,
    rendered_digits,
)


def test_digits_are_split_and_random_labels_say_nothing():
    train, test = handwritten_digits()
    assert (len(train), len(test)) == (1500, 297)
    random, _ = handwritten_digits(random_labels=True)
    pixels, labels = (np.array(train[name]) for name in ("pixel_values", "labels"))
    assert pixels.shape == (1500, 1, 8, 8) and pixels.min() == -1 and pixels.max() == 1
    assert np.array_equal(pixels, np.array(random["pixel_values"]))
    assert np.mean(labels == np.array(random["labels"])) == pytest.approx(0.1, abs=0.03)


def test_rendered_digits_resemble_handwritten_ones():
    """The nearest of the ten mean images of rendered digits is right for far more handwritten digits than a guess."""
    rendered, (rows, _) = rendered_digits(300), handwritten_digits()
    images, labels = np.array(rendered["pixel_values"]).reshape(300, -1), np.array(rendered["labels"])
    means = np.stack([images[labels == k].mean(0) for k in range(10)])
    found = ((np.array(rows["pixel_values"]).reshape(-1, 1, 64) - means) ** 2).sum(-1).argmin(1)
    assert np.mean(found == np.array(rows["labels"])) > 0.3


def test_documents_count_and_random_ones_do_not():
    def share(ids):
        return np.mean((ids[:, 1:] - ids[:, :-1]) % VOCABULARY == 1)

    assert share(np.array(documents(500)["input_ids"])) == pytest.approx(0.82, abs=0.03)
    assert share(np.array(documents(500, random_tokens=True)["input_ids"])) == pytest.approx(1 / 17, abs=0.02)


def test_built_in_pairs_are_one_a_prompt(monkeypatch):
    monkeypatch.setattr(compression_data, "TEST_PAIRS", 20)
    (_, *given), (_, *random) = (preferences(CompressionArguments(), is_random, 60) for is_random in (False, True))
    assert list(map(len, given)) == [60, 20]
    assert len({row["prompt"][-1]["content"] for rows in given for row in rows}) == 80
    same = np.mean([a["chosen"] == b["chosen"] for a, b in zip(given[0], random[0], strict=True)])
    assert 0.25 < same < 0.75


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"models": ["resnet"]}, "`models` must name at least one of lenet"),
        ({"qat_steps": 0}, "`qat_steps` must be at least 1"),
        ({"dims": [0]}, "`dims` must be at least 1"),
        ({"dataset_name": "pairs.jsonl"}, "belong together: pass all or none"),
    ],
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        CompressionArguments(**changed)


@pytest.mark.slow
def test_the_table_of_a_short_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compression, "DOCUMENTS", 400)
    monkeypatch.setattr(compression, "EVALUATED_DOCUMENTS", 50)
    few = compression.Case("40 prompts", 4, levels=(2,), rows=40)
    monkeypatch.setitem(compression.CASES, "preferences", (few,))
    monkeypatch.setattr(compression_data, "TEST_PAIRS", 20)
    short = ["--train_factor", "0.01", "--qat_steps", "1", "--output_dir", str(tmp_path)]
    assert main(["--models", "lenet", "lora", "preferences", *short]) == 0
    table = capsys.readouterr().out.split("| model |")[1]
    rows = json.loads((tmp_path / "compression.json").read_text())
    assert [row["case"]["name"] for row in rows] == [
        case.name for name in ("lenet", "lora", "preferences") for case in compression.CASES[name]
    ]
    for row in rows:
        assert row["case"]["name"] in table
        assert row["plain"]["empirical_risk"] <= row["plain"]["bound"]
        assert row["tuned"]["bound"] <= row["plain"]["bound"] + 0.01  # twice as many files are tried
        assert row["tuned"]["misc_bits"] == row["plain"]["misc_bits"]
