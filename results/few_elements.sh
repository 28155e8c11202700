#!/usr/bin/env bash
# The commands of few_elements.md, from the repository's root: `bash results/few_elements.sh`.
set -euo pipefail

python research/few_elements.py  # the simulation
for steps in 0 1; do  # the first step with a mask and without one
    prm-hf dpo --output_dir "runs/first_step_$steps" --methods prm_noisy_labels prm_rows --warmup_steps 0 \
        --prm_mask_warmup_steps "$steps" --learning_rates 3e-4 1e-3 --prm_learning_rates 3e-4 1e-3 \
        --seeds 0 1 2 3 4 --max_extensions 0
done
