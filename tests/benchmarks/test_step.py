"""The benchmark as a user runs it, on the smallest sizes: that it runs, and counts what it says that it counts."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import step


@pytest.fixture(autouse=True)
def no_bfloat16_for_others():
    """accelerate keeps the precision of the first trainer of a process for all later ones."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU if there is one")
@pytest.mark.slow
def test_bench_step_writes_what_it_says(tmp_path, capsys):
    names = ["AdamW fused", "AdamW foreach", "PRM per_tensor foreach", "PRM per_param"]
    names += ["PRM per_tensor bf16", "PRM per_tensor 8bit"]
    arguments = ["--shapes", "tiny", "--dtypes", "float32", "bfloat16", "--repeats", "5", "--dpo_steps", "2"]
    step.main([*arguments, "--optimizers", *names, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "bench_step.json").read_text(encoding="utf-8"))
    rows = {(row["dtype"], row["optimizer"]): row for row in record["rows"]}
    assert len(rows) == 2 * len(names) and not any("error" in row for row in rows.values())
    numel, tensors = rows["float32", "AdamW fused"]["parameters"], rows["float32", "AdamW fused"]["tensors"]
    for name, each, tensor in (
        ("AdamW fused", 8, 4),
        ("PRM per_tensor foreach", 8, 12),
        ("PRM per_param foreach", 12, 4),
        ("PRM per_tensor bf16 state foreach", 4, 12),
    ):
        row = rows["float32", name]
        assert row["state_bytes"] == each * numel + tensor * tensors
        assert row["clip_step_ms"] > 0 and row["queued_ms"] is None
        assert row["bytes_per_second"] == row["bytes_moved"] / row["median_ms"] * 1e3
        assert row["bytes_moved"] == 12 * numel + 2 * row["state_bytes"]
        assert row["ratio_to_adamw_fused"] == row["median_ms"] / rows["float32", "AdamW fused"]["median_ms"]
        assert row["floor_ms"] == row["bytes_moved"] / record["copy_bytes_per_second"] * 1e3
    eight = rows["float32", "PRM per_tensor 8bit state foreach"]
    assert 2 * numel < eight["state_bytes"] < 3 * numel  # with the tensors that stay in float32
    dpo = record["dpo"]
    for name in ("PRM", "AdamW"):
        assert len(dpo[name]["steps_ms"]) == 2 and 0 < dpo[name]["optimizer_ms"] < dpo[name]["step_ms"]
    assert dpo["ratio"] == dpo["PRM"]["step_ms"] / dpo["AdamW"]["step_ms"]
    assert 0 < dpo["params_rel_s"] < dpo["evaluation_s"] and dpo["own_pass_s"] > 0 and dpo["mask_stats_ms"] > 0
    assert (tmp_path / "bench_step.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| PRM per_tensor foreach |" in printed and "| `get_mask_stats`, a log |" in printed


def test_the_time_limit_and_another_package_that_fails(tmp_path, monkeypatch):
    def broken(params):
        raise RuntimeError("not on this device")

    monkeypatch.setattr(step, "copy_bandwidth", lambda device: 1e9)  # measuring it takes a second
    monkeypatch.setattr(step, "optimizers", lambda device: [{"broken": broken}, {"AdamW fused": torch.optim.AdamW}])
    step.main(["--shapes", "tiny", "--dtypes", "float32", "--repeats", "5", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "bench_step.json").read_text(encoding="utf-8"))["rows"]
    assert rows[0]["error"] == "RuntimeError: not on this device" and rows[1]["median_ms"] > 0
    step.main(["--shapes", "tiny", "--dtypes", "float32", "--time_limit", "0", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "bench_step.json").read_text(encoding="utf-8"))["rows"]
    assert {row["error"] for row in rows} == {"left out: time limit"}
