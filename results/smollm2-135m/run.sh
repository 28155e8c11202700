#!/usr/bin/env bash
# The command of the page in this folder, from the repository's root. It may be repeated: it goes on where it stopped.
set -euo pipefail

python recipes/sweep.py recipes/dpo_noisy.py --config recipes/smollm2-135m/gsm8k_pairs.yaml \
    --model_name_or_path "${MODEL:-models/smollm2}" --dataset_name gsm8k_pairs.train.jsonl \
    --eval_dataset_name gsm8k_pairs.test.jsonl --dataset_train_split "train[:800]" --memorization_max_rows 192 \
    --noise_rate 0.3 --seeds 0 1 2 --methods adamw adamw_eps:10 prm_rows_eps:10 \
    --learning_rates 3e-7 1e-6 3e-6 1e-5 --prm_learning_rates 1.2e-6 4e-6 1.2e-5 4e-5
