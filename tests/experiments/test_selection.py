"""Which rows a comparison takes: one pair a prompt, certain held-out labels, and the labels of one rater."""

import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from prm_hf.demo import build_demo
from prm_hf.experiments.checks import check_experiment
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.rows import Columns
from prm_hf.experiments.selection import first_of_each
from prm_hf.experiments.sft import SFTExperiment

from .comparisons import ON_CPU, folder_of, infos, read, run_dpo_on_files, stamps
from .test_data import load, write


PAIRS = Columns("prompt", ("chosen", "rejected"), needs_prompt=False, advice="")
RATER = ["--label_votes_column", "votes", "--label_rater", "0", "--noise_rate", "0"]


def rated(prompts, mark=""):
    """Pairs whose rater 0 is wrong in every third row; unanimous elsewhere."""
    return [
        {
            "prompt": f"{mark}p{p}",
            "chosen": f"good {mark}{i}",
            "rejected": f"bad {mark}{i}",
            "votes": [-1 if i % 3 == 0 else 1, 1, 1],
            "unanimous": i % 3 != 0,
        }
        for i, p in enumerate(prompts)
    ]


@pytest.fixture
def files(tmp_path):
    """The arguments for 24 training rows of 8 prompts, and 12 held-out rows of 4."""
    train = write(tmp_path / "train.jsonl", rated([i % 8 for i in range(24)]))
    test = write(tmp_path / "test.jsonl", rated([i % 4 for i in range(12)], "other "))
    return ["--dataset_name", train, "--eval_dataset_name", test]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(1, 3))
def test_the_first_rows_of_each_prompt(prompts, n):
    rows = Dataset.from_list([{"prompt": f"p{p}", "chosen": str(i), "rejected": "x"} for i, p in enumerate(prompts)])
    kept = first_of_each(rows, n, PAIRS)
    expected = [i for i, p in enumerate(prompts) if prompts[:i].count(p) < n]
    assert kept["chosen"][:] == list(map(str, expected))


def test_one_pair_a_prompt(files, capsys):
    found = load(*files, "--pairs_per_prompt", "1")
    line = "8 of 24 training and 4 of 12 held-out rows of train.jsonl are kept, the first 1 of each prompt."
    assert capsys.readouterr().out.count(line) == 1
    assert found.train["prompt"][:] == [f"p{i}" for i in range(8)] and len(found.heldout) == 4
    assert found.source["pairs_per_prompt"] == 1
    plain = load(*files)
    assert plain.digests != found.digests and "pairs_per_prompt" not in plain.source


def test_one_completion_a_prompt(tmp_path):
    rows = [{"prompt": f"q{i % 10}", "completion": f"a{i}"} for i in range(30)]
    file = write(tmp_path / "rows.jsonl", rows)
    found = load("--dataset_name", file, "--pairs_per_prompt", "2", experiment=SFTExperiment)
    assert len(found.train) == 16 and len(found.heldout) == 4


def test_held_out_rows_are_filtered_before_one_of_each_prompt_is_kept(files, capsys):
    found = load(*files, "--heldout_filter_column", "unanimous", "--pairs_per_prompt", "1")
    assert "8 of 12 held-out rows of train.jsonl are kept, by 'unanimous'." in capsys.readouterr().out
    assert all(found.heldout["unanimous"])
    assert found.heldout["chosen"][:] == [f"good other {i}" for i in (1, 2, 4, 7)]
    assert not all(found.train["unanimous"]) and found.source["heldout_filter_column"] == "unanimous"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label_rater", "0"], "`label_votes_column` is None and `label_rater` 0: give both, or neither"),
        (["--label_votes_column", "votes"], "`label_rater` None: give both"),
        ([*RATER, "--noise_rate", "0.3"], r"`noise_rate` is \[0.3\], and the labels of a `label_rater` have noise"),
        ([*RATER, "--label_rater", "3"], "`label_votes_column`, the training rows of train.jsonl: .* rater 3 "),
        ([*RATER, "--label_rater", "-1"], "`label_rater` must be at least 0, got -1"),
        ([*RATER, "--label_votes_column", "raters"], "no column 'raters' of votes"),
        (["--heldout_filter_column", "agreed"], "`heldout_filter_column` is 'agreed', and .* have the columns"),
        (["--heldout_filter_column", "votes"], r"must hold true or false, and held-out row 0 .* has \[-1, 1, 1\]"),
        (["--pairs_per_prompt", "0"], "`pairs_per_prompt` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(files, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*files, *arguments)


def test_no_held_out_row_that_all_agree_on(tmp_path):
    rows = [{**row, "unanimous": False} for row in rated(range(10))]
    with pytest.raises(ValueError, match="is true in no held-out row of a.jsonl"):
        load("--dataset_name", write(tmp_path / "a.jsonl", rows), "--heldout_filter_column", "unanimous")


@pytest.mark.parametrize("flag", [["--pairs_per_prompt", "1"], ["--heldout_filter_column", "x"]])
def test_the_built_in_task_has_one_pair_a_prompt(flag):
    with pytest.raises(ValueError, match=f"`{flag[0][2:]}` is .* is for a `dataset_name`, and there is none"):
        check_experiment(DPOExperiment.parse(flag))


def test_raters_are_of_preferences(tmp_path):
    rows = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    experiment = SFTExperiment.parse(["--dataset_name", rows, "--model_name_or_path", "m", *RATER, *ON_CPU])
    with pytest.raises(ValueError, match="`label_votes_column` is 'votes', which is for preferences, on which"):
        check_experiment(experiment)


@pytest.mark.slow
def test_a_comparison_on_the_labels_of_one_rater(tmp_path, capsys, no_pictures):
    """Its flips are the votes against the majority; `adamw_clean` is trained on the majority's labels."""
    for name, n in (("train", 24), ("test", 12)):
        rows = getattr(build_demo(), name).select(range(n)).select_columns(["prompt", "chosen", "rejected"])
        votes = [{"votes": [1, -1 if i % 4 == 0 else 1], "unanimous": i % 4 != 0} for i in range(n)]
        lines = [json.dumps({**row, **more}) for row, more in zip(rows, votes, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    rater = [*RATER, "--label_rater", "1", "--heldout_filter_column", "unanimous"]

    def start(*more):
        assert run_dpo_on_files(tmp_path, tmp_path / "runs", "--methods", "adamw", "adamw_clean", *rater, *more) == 0

    start()
    before = stamps(tmp_path / "runs")
    assert len(before) == 2
    noisy, clean = (folder_of(tmp_path / "runs", f"{name}_lr0.001_seed0") for name in ("adamw", "adamw_clean"))
    assert read(noisy / "margins.json")["train_flipped"] == [i % 4 == 0 for i in range(24)]
    assert read(clean / "margins.json")["train_flipped"] == [False] * 24
    assert "memorization/flipped_fit" in read(noisy / "metrics.json").keys() - read(clean / "metrics.json").keys()
    assert read(noisy / "metrics.json")["rewards/accuracies"] * 9 == pytest.approx(
        sum(x > 0 for x in read(noisy / "margins.json")["heldout"])
    )
    settings = {name.split("_lr")[0]: info["settings"] for name, info in infos(tmp_path / "runs").items()}
    assert settings["adamw"]["label_rater"] == 1 and settings["adamw_clean"]["label_rater"] is None
    assert "AdamW, clean labels" in capsys.readouterr().out
    start()
    assert stamps(tmp_path / "runs") == before
    start("--label_rater", "0")  # of whose labels none is wrong: another experiment
    assert before.items() < stamps(tmp_path / "runs").items() and "label_rater" in capsys.readouterr().out
