"""Noisy regression: does an optimizer follow the signal, or the labels that are wrong?

The first thing to run: a small network on numbers made on the spot, 30 % of whose training labels are random, with
AdamW and PRM over the same number of learning rates, weight decays and seeds:

    pip install -c constraints.txt -e ".[trl,report]"
    python recipes/regression.py

`prm-hf regression` does the same without a clone. On one CPU core it takes less than a minute, as all models of a
method train at once. `--methods`, `--prm_mask` and `--prm_boundary empirical` choose among the masks, `--model linear`
and `--noise_rate` change the task. docs/experiments.md says how to read the report.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["regression", *sys.argv[1:]]))
