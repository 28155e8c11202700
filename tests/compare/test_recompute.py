"""results/recompute.py, which computes published intervals again from the runs in the files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest


RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def recompute():
    spec = importlib.util.spec_from_file_location("recompute", RESULTS / "recompute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "pairs"), [("pandalm", 187), ("gsm8k_pairs_0", 1122)])
def test_pairs_taken_for_independent_give_the_older_intervals(recompute, name, pairs):
    name = f"qwen2.5-0.5b/{name}.json"
    file = recompute.recompute(name, np.arange(pairs))
    contrasts = [entry for entry in file["contrasts"] if entry["difference"] is not None]
    assert len(contrasts) > 5
    for entry in contrasts:
        for key in ("low", "high", "p_value", "p_holm"):
            assert entry[key] == pytest.approx(entry["by_pairs"][key], rel=1e-3, abs=1e-6)  # KLs are rounded there


def test_files_say_of_what_their_intervals_are(recompute):
    for name, pairs in recompute.FILES.items():
        file = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        entries = [entry for entry in file["contrasts"] if entry["difference"] is not None]
        entries += [entry["accuracy"] for entry in file.get("areas", ()) if "none" not in entry]
        prompts = {recompute.GSM8K: 232, recompute.PANDALM: 38}[pairs]
        assert {entry["prompts"] for entry in entries} == {prompts} and recompute.NOTE in file["note"]


def test_rows_of_one_prompt_are_a_group(recompute, tmp_path):
    lines = [json.dumps({"prompt": prompt, "chosen": "a"}) for prompt in "xyxz"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    assert recompute.groups_of(tmp_path / "pairs.jsonl").tolist() == [0, 1, 0, 2]
