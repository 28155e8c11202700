#!/usr/bin/env bash
# The runs of results/effective_dimension: `bash results/effective_dimension/run.sh cpu`, or another function, from the
# repository's root.
set -euo pipefail

out=${OUT:-runs/effective_dimension}

cpu() { # linear models, and classifiers of digits
    python recipes/effective_dimension.py --output "$out"
}

vit() { # the grid with a ViT, all of its eigenvalues
    python recipes/effective_dimension.py grid --model vit --widths 8 12 16 --depths 1 2 --output "$out"
}

methods() { # AdamW, AdamW with the larger eps and PRM on the built-in task with 30 % flipped labels
    prm-hf dpo --methods adamw adamw_eps:10 prm_noisy_labels --seeds 0 1 2 3 --num_train_epochs 5 --eval_strategy no \
        --learning_rates 1e-4 3.2e-4 1e-3 3.2e-3 --max_extensions 0 \
        --effective_dimension 1 --output_dir "$out/methods"
}

gpu() { # Qwen2.5 0.5B with LoRA over 1,000 pairs: the top 50 eigenvalues, and all of them by one gradient a pair
    local run=${RUN:-runs/lora/adamw} pairs=${PAIRS:-pairs.jsonl}
    for method in lanczos exact; do
        prm-hf diagnose "$run" --effective-dimension --dataset "$pairs" --max_rows 1000 --reduction sum \
            --alpha 0.1 1 10 --method "$method" --k 50
    done
}

"${@:-cpu}"
