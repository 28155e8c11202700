"""`prm-hf pairs`: what is drawn, checked and chosen; another batch size, more samples, a kill, and wrong input."""

import json

import pytest
import torch

from prm_hf.demo import build_demo, completion_rows
from prm_hf.experiments import completions, generation, pairs
from prm_hf.experiments.answers import find_checker
from prm_hf.experiments.checks import check_data
from prm_hf.experiments.data import load_data
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.generation import Completion, Sampler

from .comparisons import ON_CPU, read_lines


SAMPLES = 4
N_PROMPTS = 12


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with prompts of the built-in task, and a checker of its answers; the working folder."""
    rows = completion_rows(build_demo().test).select(range(N_PROMPTS))
    texts = [{"prompt": r["prompt"][0]["content"], "completion": r["completion"][0]["content"]} for r in rows]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    (tmp_path / "digits.py").write_text(
        "import re\n\n\ndef same(completion, answer):\n"
        "    ends = [re.findall(r'answer ([0-9 ]*)', text) for text in (completion, answer)]\n"
        "    return [x.split() for x in ends[0]] == [x.split() for x in ends[1]]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(output, *arguments):
    own = ["--answer_checker", "digits:same", "--max_new_tokens", "12", "--temperature", "1.5"]
    model = ["--model", build_demo().model_path, "--samples", str(SAMPLES), "--output", output]
    return pairs.main(["rows.jsonl", *model, *own, *arguments])


def drawn(output):
    """The completions of a command, by row and sample."""
    lines = read_lines(output.replace(".jsonl", ".completions.0.jsonl"))[1:]
    found = {(line["row"], line["sample"]): (line["completion"], line["is_whole"]) for line in lines}
    assert len(found) == len(lines)
    return found


def test_pairs_are_right_and_wrong_and_can_be_trained_on(place, capsys):
    assert make("pairs.jsonl", "--batch_size", "7") == 0
    judge, found = find_checker("digits:same"), read_lines("pairs.jsonl")
    rows = read_lines("rows.jsonl")
    assert 0 < len(found) <= N_PROMPTS
    for pair in found:
        row = rows[pair["group"]]
        assert pair["prompt"] == [{"role": "user", "content": row["prompt"]}] and pair["answer"] == row["completion"]
        sides = {}
        for name in ("chosen", "rejected"):
            (message,) = pair[name]
            assert message["role"] == "assistant"
            sides[name] = message["content"]
        assert judge.is_right(sides["chosen"], pair["answer"]) and not judge.is_right(
            sides["rejected"], pair["answer"]
        )
        texts = [drawn("pairs.jsonl")[pair["group"], sample] for sample in range(SAMPLES)]
        assert {(text, True) for text in sides.values()} <= set(texts)
    out = capsys.readouterr().out
    assert f"{len(found)} pairs of {N_PROMPTS} prompts in pairs.jsonl" in out
    assert f"Of {N_PROMPTS * SAMPLES} completions: " in out
    data = ["--model_name_or_path", build_demo().model_path, "--dataset_name", "pairs.jsonl", *ON_CPU]
    experiment = DPOExperiment.parse(data)
    (rows,) = pairs_data(experiment)
    assert len(rows.train) + len(rows.heldout) == len(found)


def pairs_data(experiment):
    found = list(load_data(experiment.script_args, experiment.model_args, lambda rows: rows, experiment.columns()))
    for data in found:
        check_data(experiment, data)
    return found


@pytest.mark.slow
def test_the_batch_size_and_the_number_of_samples_change_no_completion(place):
    make("one.jsonl", "--batch_size", "1", "--top_p", "0.9")
    make("many.jsonl", "--batch_size", "32", "--top_p", "0.9")
    make("fewer.jsonl", "--batch_size", "5", "--top_p", "0.9", "--samples", "2")
    one, many, fewer = map(drawn, ("one.jsonl", "many.jsonl", "fewer.jsonl"))
    assert one == many and (place / "one.jsonl").read_text() == (place / "many.jsonl").read_text()
    assert fewer == {key: value for key, value in one.items() if key[1] < 2}
    make("other.jsonl", "--top_p", "0.9", "--seed", "1")
    assert drawn("other.jsonl") != one
    (place / "fewer.jsonl").unlink()
    make("fewer.jsonl", "--batch_size", "5", "--top_p", "0.9", "--samples", "4")
    assert drawn("fewer.jsonl") == one


@pytest.mark.parametrize("cut", [0, 1, 40, None], ids=["whole", "newline", "line", "header"])
def test_it_goes_on_after_a_kill(place, monkeypatch, cut):
    make("whole.jsonl", "--batch_size", "10")
    add, calls = completions.Store.add, []

    def killed(self, found):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(found))
        add(self, found)

    with monkeypatch.context() as patch:
        patch.setattr(completions.Store, "add", killed)
        assert make("pairs.jsonl", "--batch_size", "10") == 130
    assert not (place / "pairs.jsonl").exists()
    file = place / "pairs.completions.0.jsonl"
    left = file.read_bytes()
    file.write_bytes(b"" if cut is None else left[: len(left) - cut])
    n_kept = len(file.read_bytes().split(b"\n")[1:-1])
    assert n_kept == {0: 20, 1: 19, 40: 19, None: 0}[cut]

    seen = []
    generate = pairs.generate
    monkeypatch.setattr(pairs, "generate", lambda *a: seen.append(len(a[2])) or generate(*a))
    assert make("pairs.jsonl", "--batch_size", "10") == 0
    assert sum(seen) == N_PROMPTS * SAMPLES - n_kept
    assert drawn("pairs.jsonl") == drawn("whole.jsonl")
    assert (place / "pairs.jsonl").read_text() == (place / "whole.jsonl").read_text()
    seen.clear()
    assert make("pairs.jsonl") == 0 and not seen  # nothing is left, and the same pairs are written


def test_completions_of_several_processes_are_read_together(place):
    make("one.jsonl")
    lines = (place / "one.completions.0.jsonl").read_text().splitlines(keepends=True)
    for process in range(2):
        text = "".join([lines[0], *lines[1 + process :: 2]])
        (place / f"two.completions.{process}.jsonl").write_text(text)
    make("two.jsonl")
    assert (place / "one.jsonl").read_text() == (place / "two.jsonl").read_text()


def test_draws_follow_the_distribution():
    """Without and with a nucleus, at a temperature: frequencies of many rows against the probabilities."""
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    n = 20_000
    uniforms = torch.from_numpy(generation.row_generator(0, 0, "test").random((n, 1)))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        p = (scores / temperature).softmax(0)
        if top_p < 1:
            p = torch.where(p.cumsum(0) - p < top_p, p, 0.0)
            p /= p.sum()
        sampler = Sampler(uniforms, temperature, top_p)
        tokens = sampler(torch.zeros(n, 1, dtype=torch.long), scores.expand(n, 4)).argmax(-1)
        found = tokens.bincount(minlength=4) / n
        assert torch.allclose(found, p, atol=4 * 0.5 / n**0.5) and not found[p == 0].any()


def test_what_has_not_ended_counts_neither_as_right_nor_as_wrong():
    number = find_checker("number")
    texts = [("5", True), ("5", True), ("6", True), ("6 and", False)]
    found = {(0, i): Completion(*text) for i, text in enumerate(texts)}
    found |= {(1, i): Completion("5", i != 2) for i in range(4)}
    found |= {(2, i): Completion("6", True) for i in range(4)}
    found |= {(3, i): Completion("5", False) for i in range(4)}
    found |= {(4, i): found[0, i] for i in range(4)}
    prompts = ["a", "b", "c", "d", " a "]
    made, counts = pairs.choose_pairs(prompts, ["5"] * 5, number, found, 4, seed=0)
    pair = {"chosen": "5", "rejected": "6", "answer": "5", "group": 0}
    assert made == [{"prompt": "a", **pair}, {"prompt": " a ", **pair}]
    assert counts == {
        "right": 7,
        "wrong": 6,
        "cut off": 7,
        "without wrong": 1,
        "without right": 1,
        "without right and wrong": 1,
    }


def test_nothing_is_overwritten(place):
    make("pairs.jsonl", "--samples", "2")
    before = (place / "pairs.jsonl").read_text()
    with pytest.raises(ValueError, match="exists, and is not of this command: move it away"):
        make("pairs.jsonl", "--samples", "3")
    with pytest.raises(ValueError, match=r"other settings \(seed: 0, now 1; temperature: 1.5, now 2.0\)"):
        make("pairs.jsonl", "--seed", "1", "--temperature", "2")
    (place / "pairs.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="exists, and holds other pairs"):
        make("pairs.jsonl", "--samples", "2")
    assert (place / "pairs.jsonl").read_text() == "{}\n" != before
    (place / "pairs.completions.0.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match=r"pairs.completions.0.jsonl holds no completions that can be read"):
        make("pairs.jsonl", "--samples", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer_column", "solution"], "have no column 'solution'; they have .*--answer_column"),
        (["--prompt_column", "question"], "have no column 'question'; they have .*--prompt_column"),
        (["--answer_checker", "choice"], "by 'choice' in 12 of 12 rows: 0, 1, 2, 3, 4, … .from 0.*another checker"),
        (["--samples", "1"], "`samples` must be at least 2, a right and a wrong one, got 1"),
        (["--temperature", "0"], "`temperature` must be above 0, got 0.0"),
        (["--top_p", "0"], r"`top_p` must be in \(0, 1\], got 0.0"),
        (["--batch_size", "0"], "`batch_size` must be at least 1"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be at least 1"),
        (["--output", "pairs.json"], "`output` is 'pairs.json': it must end in .jsonl"),
        (["--output", "no/pairs.jsonl"], "there is no folder 'no': make it first"),
        (["--dataset_split", "test"], "`dataset_split` is 'test', and .* has one split"),
        (["--dataset_name", "no.jsonl"], "The dataset 'no.jsonl' does not exist"),
        (["--model_name", "x"], "`--model_name` is no argument of `prm-hf pairs`"),
    ],
)
def test_wrong_input_is_said_before_a_model_is_loaded(place, monkeypatch, arguments, message):
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(pairs, name, None)
    with pytest.raises(ValueError, match=message):
        make("pairs.jsonl", *arguments)
    assert [path.name for path in place.iterdir() if path.name.startswith("pairs")] == []


@pytest.mark.parametrize("arguments", [["--model", "m"], ["rows.jsonl"]])
def test_data_and_model_are_needed(place, arguments):
    with pytest.raises(ValueError, match="is missing: name .*, as in `prm-hf pairs DATA --model MODEL`"):
        pairs.main(arguments)


def test_pairs_that_cannot_be_made(place):
    (place / "rows.jsonl").write_text('{"prompt": "formal sort up : 1 2 3 4", "completion": "answer x"}\n')
    with pytest.raises(
        ValueError, match=r"No prompt of 1 has both .*\(0 are right, \d wrong, \d cut off\): raise `samples`"
    ):
        make("pairs.jsonl")
    assert not (place / "pairs.jsonl").exists()
