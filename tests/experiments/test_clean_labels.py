"""`adamw_clean`, the ceiling that the noise of a comparison is measured against."""

import pytest

from prm_hf.compare import compare_runs

from .comparisons import read, run_dpo


@pytest.mark.slow
def test_it_is_trained_without_the_noise_of_the_comparison(tmp_path):
    run_dpo(tmp_path, "--methods", "adamw", "adamw_clean")
    noisy, clean = (next(tmp_path.glob(f"{method}_lr*")) for method in ("adamw", "adamw_clean"))
    info = read(clean / "run.json")
    assert info["noise_rate"] == 0.3 and info["settings"]["noise_rate"] == 0.0
    flipped = [any(read(folder / "margins.json")["train_flipped"]) for folder in (noisy, clean)]
    assert flipped == [True, False]
    assert [row.method for row in compare_runs(tmp_path).rows] == ["adamw", "adamw_clean"]
