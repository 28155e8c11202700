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

methods() { # AdamW, AdamW with the larger eps and PRM on the built-in task with 30 % flipped labels
    prm-hf dpo --methods adamw adamw_eps:10 prm_noisy_labels --seeds 0 1 2 --num_train_epochs 5 --eval_strategy no \
        --learning_rates 1e-1 3e-1 --prm_learning_rates 3e-1 1 --max_extensions 0 \
        --use_peft --lora_r 4 --unilora_dim 32 --effective_dimension 1 --bound --output_dir "$out/methods"
}

gpu() { # a certified reward accuracy of Qwen2.5-Coder 0.5B, with one pair a prompt: minutes on a GPU
    python recipes/compression.py --models preferences --output_dir "$out/gpu" --dims 256 --learning_rate 0.1 \
        --model_name_or_path "${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct}" --qat_steps 15 --max_length 384 \
        --dataset_name "${TRAIN:-gsm8k_pairs.train.jsonl}" --eval_dataset_name "${TEST:-gsm8k_pairs.test.jsonl}"
}

"$@"
