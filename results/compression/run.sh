#!/usr/bin/env bash
# The runs of results/compression: `bash results/compression/run.sh cpu`, or another function, from the repository's root.
set -euo pipefail

out=${OUT:-runs/compression}

cpu() { # the tables: minutes on two cores
    python recipes/compression.py --models lenet vit unilora lora --output_dir "$out/cpu"
}

preferences() { # a certified reward accuracy on the built-in task
    python recipes/compression.py --models preferences --output_dir "$out/preferences"
}

gpu() { # a certified reward accuracy of Qwen2.5-Coder 0.5B, with pairs of which no two share a prompt; not run yet
    python recipes/compression.py --models preferences --output_dir "$out/gpu" --dims 64 256 1024 \
        --model_name_or_path "${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}" --learning_rate 0.1 --train_factor 4 \
        --dataset_name "${TRAIN:-gsm8k_pairs.train.jsonl}" --eval_dataset_name "${TEST:-gsm8k_pairs.test.jsonl}"
}

"$@"
