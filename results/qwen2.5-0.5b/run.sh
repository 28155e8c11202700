#!/usr/bin/env bash
# The commands of the pages in this folder: `bash results/qwen2.5-0.5b/run.sh main`, or another function, from the
# repository's root. Every command may be repeated: it goes on where it stopped. The folder of the model and the files
# of rows are arguments, because both came without a hub.
set -euo pipefail

model=${MODEL:-models/qwen}
pairs="--model_name_or_path $model --dataset_name gsm8k_pairs.train.jsonl --eval_dataset_name gsm8k_pairs.test.jsonl
    --dataset_train_split train[:800] --memorization_max_rows 192"
pandalm="--model_name_or_path $model --dataset_name pandalm.train.jsonl --eval_dataset_name pandalm.test.jsonl
    --memorization_max_rows 192"
full="--config recipes/qwen2.5-0.5b/gsm8k_pairs.yaml $pairs --noise_rate 0.3"
lora="--config recipes/qwen2.5-0.5b/gsm8k_pairs_lora.yaml $pairs --noise_rate 0.3
    --learning_rates 1e-5 3e-5 1e-4 --prm_learning_rates 4e-5 1.2e-4 4e-4"
three="--learning_rates 1e-7 3e-7 1e-6 --prm_learning_rates 4e-7 1.3e-6 4e-6"
dpo="python recipes/sweep.py recipes/dpo_noisy.py"
search="python recipes/sweep.py research/mask_search.py"

main() { # README.md
    $dpo $full --seeds 5 6 7 8 9 10 11 12 --methods adamw_eps:10 prm_rows_eps:10
    $dpo $full --noise_rate 0.4 --seeds 3 4 5 6 7 8 9 10 --methods adamw_eps:10 prm_rows_eps:10
    $dpo $full --noise_rate 0.1 0.0 --seeds 5 6 --methods adamw adamw_eps:10 prm_rows_eps:10
    $dpo --config recipes/qwen2.5-0.5b/pandalm.yaml $pandalm --methods adamw adamw_eps:10 prm_rows_eps:10
    # one learning rate
    $dpo $full --seeds 5 6 --learning_rates 1e-5 --prm_learning_rates 4e-5 --methods adamw adamw_eps:10 prm_rows_eps:10
}

controls() { # controls.md
    $dpo $full --seeds 5 6 7 8 --methods adamw_eps:10 prm_rows_eps:10 constant_q adamw_matched
    $dpo $full --seeds 5 6 7 --methods adamw
    $search $full $three --seeds 5 6 7 --methods search_prm_rows_signal0.98_eps10_shuffled
    # fixed factors, in a folder of their own, after the masks that they are from
    $search $full $three --seeds 5 6 --output_dir runs/fixed --methods prm_rows_eps:10
    $search $full $three --seeds 5 6 --output_dir runs/fixed --methods prm_rows_eps:10 search_prm_rows_fixed_eps10
    # other eps
    $dpo $full $three --seeds 5 6 --methods adamw_eps:1 adamw_eps:100 prm_rows_eps:1 prm_rows_eps:100
    # baselines
    $dpo $full $three --seeds 5 6 --methods cautious msvag adamw_embedding:3 adamw_embedding:0.3 cdpo robust ipo \
        early_stopping early_stopping_clean
    # variants of the mask
    $search $full $three --seeds 5 6 --methods search_prm_rows_eps10 search_prm_signal0.98_eps10 prm_debiased_eps:10 \
        search_selection_eps10 search_prm_softness0.3_eps10 search_prm_softness3_eps10 search_prm_within_eps10
    # the stop signal
    $dpo $full --noise_rate 0.3 0.1 --seeds 5 6 --learning_rates 1e-7 3e-7 1e-6 \
        --prm_learning_rates 4e-6 1.3e-5 4e-5 --methods prm_debiased prm_stopping
}

lora() { # lora.md
    $dpo $lora --seeds 0 1 2 --methods adamw adamw_eps:10 prm_rows prm_rows_eps:10
    $search $lora --seeds 0 1 --methods prm_debiased search_prm_modules
    $dpo $lora --seeds 2 --methods prm_debiased
    $dpo --config recipes/qwen2.5-0.5b/pandalm_lora.yaml $pandalm --learning_rates 1e-5 3e-5 1e-4 \
        --prm_learning_rates 4e-5 1.2e-4 4e-4 --methods adamw adamw_eps:10 prm_rows prm_rows_eps:10
}

sft() { # sft.md
    python recipes/sweep.py recipes/sft_noisy.py --config recipes/qwen2.5-0.5b/sft_noisy.yaml \
        --model_name_or_path "$model" --dataset_name gsm8k_sft.train.jsonl --eval_dataset_name gsm8k_sft.test.jsonl \
        --prompt_column prompt --completion_column completion \
        --dataset_train_split "train[:800]" --dataset_test_split "train[:200]" \
        --num_train_epochs 2 --eval_strategy no --memorization_max_rows 256 --max_new_tokens 192 --seeds 0 1 2 \
        --methods adamw prm_debiased --learning_rates 1e-5 3e-5 --prm_learning_rates 5e-5 2e-4
}

"$@"
