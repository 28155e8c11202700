"""The benchmark of convergence as a user runs it, for a step each: its table, and runs that are not repeated."""

import json

import pytest

from benchmarks import convergence


def test_the_table_has_differences_to_float32_seed_by_seed(tmp_path, capsys, monkeypatch):
    state_dtypes, made = list(convergence.STATE_DTYPES), []

    def run(args, method, state_dtype, seed):
        made.append((method, state_dtype, seed))
        return dict.fromkeys(convergence.COLUMNS, seed + 0.1 * state_dtypes.index(state_dtype) * (1 + seed))

    monkeypatch.setattr(convergence, "train", run)
    output = ["--output", str(tmp_path / "runs.json")]
    for _ in range(2):
        convergence.main(["--seeds", "0", "1", *output])
    assert len(made) == len({*made}) == 2 * len(convergence.METHODS) * len(state_dtypes)
    lines = capsys.readouterr().out.splitlines()[2:]
    # 0 and 1; the differences 0.1 and 0.2 times which state it is; Student's t of one degree of freedom is 12.7
    assert lines[0].split(" | ")[1:3] == ["float32", "0.5000 ± 6.3531"]
    assert lines[1].split(" | ")[1:3] == [state_dtypes[1], "+0.1500 ± 0.6353"]
    with pytest.raises(SystemExit):
        convergence.main(["--steps", "3", *output])
    assert "has runs of other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_each_task(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "METHODS", {"per_row": convergence.METHODS["per_row"]})
    monkeypatch.setattr(convergence, "STATE_DTYPES", ("float32", "8bit"))
    for name, model in (("built-in", []), ("sft", ["--model", convergence.build_demo().model_path])):
        output = tmp_path / f"{name}.json"
        convergence.main(["--seeds", "0", "--steps", "2", *model, "--output", str(output)])
        runs = json.loads(output.read_text())["runs"].values()
        losses = [run["loss"] for run in runs]
        assert len(losses) == 2 and max(losses) - min(losses) < 0.05
        assert all(run.keys() == convergence.COLUMNS.keys() and 0 <= run["accuracy"] <= 1 for run in runs)
