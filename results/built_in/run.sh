#!/usr/bin/env bash
# The commands of the pages in this folder: `bash results/built_in/run.sh masks`, or another function, from the
# repository's root. No model hub and no GPU is needed. Every command may be repeated: it goes on where it stopped.
set -euo pipefail

dpo="python recipes/dpo_noisy.py"
search="python research/mask_search.py"
five="--seeds 0 1 2 3 4"
ten="--seeds 0 1 2 3 4 5 6 7 8 9"
four="--learning_rates 1e-4 3e-4 1e-3 3e-3 --prm_learning_rates 3e-4 1e-3 3e-3 1e-2"
seven="--learning_rates 1e-5 3e-5 1e-4 3e-4 1e-3 3e-3 1e-2 --prm_learning_rates 1e-5 3e-5 1e-4 3e-4 1e-3 3e-3 1e-2"

masks() { # README.md
    $dpo $ten $four --methods adamw adamw_eps:3 adamw_eps:10 prm_per_tensor prm_debiased constant_q adamw_matched \
        shuffled_q fixed_q
    # in the same folder: larger relative_eps, and masks on relative_eps=10
    $dpo $ten $four --methods adamw adamw_eps:30 adamw_eps:100 prm_debiased_eps:10 prm_rows_eps:10
}

noise_rates() { # noise_rates.md
    $dpo --seeds 0 1 2 3 $four --noise_rate 0 0.1 0.3 0.4 --methods adamw_eps:10 prm_rows_eps:10
}

lora() { # lora.md
    peft="--use_peft --lora_r 16 --lora_target_modules all-linear --output_dir runs/lora"
    $dpo $five $four $peft --methods adamw adamw_eps:10 prm_debiased prm_rows prm_debiased_eps:10 prm_rows_eps:10
    $search $five $four $peft --methods search_prm_modules
}

variants() { # mask_variants.md
    $search $five $four --methods adamw adamw_eps:10 prm_debiased_eps:10 prm_rows_eps:10
    $search $five $four # all variants
    for task in 1 2 3 4 5 6; do
        $dpo --task_seed $task --seeds 0 1 $four --output_dir runs/task$task \
            --methods adamw adamw_eps:10 adamw_eps:100 prm_debiased_eps:10 prm_rows_eps:10
    done
    $search recipes/sft_noisy.py $five --learning_rates 3e-4 1e-3 3e-3 1e-2 \
        --prm_learning_rates 1e-3 3e-3 1e-2 3e-2 --methods adamw adamw_eps:10 prm_debiased prm_rows_eps:10
}

baselines() { # baselines.md
    $dpo $ten $four --methods adamw adamw_eps:10 prm_rows_eps:10 cdpo robust ipo adamw_embedding:3 \
        adamw_embedding:0.3 cautious msvag
}

stopping() { # stopping.md
    $dpo $five $four --methods adamw early_stopping early_stopping_clean prm_debiased prm_stopping
}

one_learning_rate() { # one_learning_rate.md
    $dpo $five $seven --output_dir runs/wide \
        --methods adamw adamw_eps:10 prm_per_tensor prm_debiased prm_debiased_eps:10
}

sft() { # sft.md
    accelerate launch recipes/sft_noisy.py $five --learning_rates 3e-4 1e-3 3e-3 1e-2 \
        --prm_learning_rates 3e-3 1e-2 3e-2 1e-1 --methods adamw prm_per_tensor prm_debiased constant_q
}

wrong_labels() { # wrong_labels.md
    folder=runs/wrong_labels_margins
    python research/wrong_labels.py $folder --schemes full folds5 folds2
    for task in 0 1 2; do
        python research/wrong_labels.py $folder --tasks $task --seeds 0 1 2 --schemes full folds5
    done
    python research/wrong_labels.py $folder --schemes folds5 --methods adamw_eps:10 --learning_rates 1e-3
    python research/wrong_labels.py $folder --schemes full --methods adamw_eps:10 --learning_rates 1e-3
    python research/wrong_labels.py $folder --schemes folds5 --methods prm_rows_eps:10 --learning_rates 3e-3
    for seed in 3 4; do # the clean check
        for task in 0 1 2; do
            again="python research/wrong_labels.py $folder --tasks $task --seeds $seed --schemes folds5"
            $again --methods adamw_eps:10 --learning_rates 3e-4 1e-3
            $again --methods prm_rows_eps:10 --learning_rates 1e-3 3e-3
            $again --methods adamw --learning_rates 3e-4
        done
    done
    python research/wrong_labels_table.py $folder results/built_in/wrong_labels.json
}

randomization() { # randomization.md
    python recipes/randomization.py
    python recipes/randomization.py --kinds true_labels partial_labels random_labels --seeds 0 2 3
}

"$@"
