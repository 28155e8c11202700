#!/usr/bin/env bash
# The commands of the page in this folder: `bash results/sven/run.sh built_in`, or another function, from the
# repository's root. Every command may be repeated: it goes on where it stopped.
set -euo pipefail

built_in() { # without a model hub or a GPU
    local dpo="python recipes/dpo_noisy.py --methods adamw prm_rows_eps:10 sven"
    local noise
    for noise in 0.3 0; do
        $dpo --noise_rate "$noise" --seeds 0 1 2 3 4 --learning_rates 3e-4 1e-3 --prm_learning_rates 3e-4 1e-3 \
            --max_extensions 1 --output_dir "runs/sven/noise$noise"
    done
}

toy() {
    python results/sven/toy.py results/sven/toy.json
}

speed() {
    python benchmarks/sven.py --output results/sven/speed.json
}

# Qwen2.5-Coder 0.5B with LoRA, on a GPU: 756 pairs of different prompts, two epochs. Decided before the runs, but after
# eleven trial runs from which Sven's rates are: seeds 0 to 2, two learning rates for each method, all batches padded. Sven
# is called better or worse than AdamW, as on the built-in task, if the interval of the difference in accuracy between
# their best rates leaves 0 out after Holm's correction. Flipped fit, KL and time are reported beside it.
qwen_lora() {
    local data=${DATA:-.} dpo
    dpo="python recipes/dpo_noisy.py --config recipes/qwen2.5-0.5b/gsm8k_pairs_lora.yaml
        --model_name_or_path ${MODEL:-Qwen/Qwen2.5-Coder-0.5B-Instruct} --dataset_train_split train --pairs_per_prompt 1
        --dataset_name $data/gsm8k_pairs.train.jsonl --eval_dataset_name $data/gsm8k_pairs.test.jsonl
        --padding_free false --num_train_epochs 2 --max_length 384 --per_device_eval_batch_size 32 --max_extensions 0
        --seeds 0 1 2"
    $dpo --noise_rate 0.3 --output_dir runs/sven/qwen/noise0.3 \
        --methods adamw prm_rows --learning_rates 1e-5 3e-5 --prm_learning_rates 3e-5 1e-4
    $dpo --noise_rate 0 --output_dir runs/sven/qwen/noise0 \
        --methods adamw prm_rows --learning_rates 3e-5 1e-4 --prm_learning_rates 1e-4 3e-4
    $dpo --noise_rate 0.3 --output_dir runs/sven/qwen/noise0.3 \
        --methods sven --learning_rates 1e-4 3e-4 --prm_learning_rates 1e-4 3e-4
    $dpo --noise_rate 0 --output_dir runs/sven/qwen/noise0 \
        --methods sven --learning_rates 3e-4 1e-3 --prm_learning_rates 3e-4 1e-3
}

"$@"
