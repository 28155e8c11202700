"""Runs an experiment on every GPU of this machine, or of a Ray cluster, until all runs are finished or time is up.

    python recipes/sweep.py dpo --config recipes/qwen2.5-0.5b/gsm8k_pairs.yaml \
        --dataset_name gsm8k_pairs.train.jsonl --eval_dataset_name gsm8k_pairs.test.jsonl --max_minutes 25

`prm-hf sweep` does the same without a clone. The first argument is `dpo`, `sft`, `suspects`, `regression`, `grokking`
or `pinn`, or the path of a recipe such as recipes/dpo_noisy.py; all others are that experiment's. The processes share
its folder: each takes the next run, or stack of small models, that no other is at, and a run is never spread over
GPUs. Interrupted, or out of time (exit code 75), the same command goes on where it stopped, also on another machine
that has the folder, and on another number of GPUs. The output of all but the first process goes to `worker<i>.log` in
the working folder. Without a GPU there is one process.
`--ray ADDRESS` before the experiment's name makes the runs on a Ray cluster: docs/cluster.md.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
