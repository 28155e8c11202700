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

gpu() { # Qwen2.5 0.5B with LoRA over 1,000 pairs: the top 50 eigenvalues, and all of them by one gradient a pair
    local run=${RUN:-runs/lora/adamw} pairs=${PAIRS:-pairs.jsonl}
    for method in lanczos exact; do
        prm-hf diagnose "$run" --effective-dimension --dataset "$pairs" --max_rows 1000 --reduction sum \
            --alpha 0.1 1 10 --method "$method" --k 50
    done
}

"${@:-cpu}"
