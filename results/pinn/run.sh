#!/usr/bin/env bash
# The runs of results/pinn: `bash results/pinn/run.sh cpu`, or another function, from the repository's root. Every
# command may be repeated: it goes on where it stopped. With MINUTES a command starts no run after that many.
set -euo pipefail

out=${OUT:-runs/pinn}
minutes=${MINUTES:+--max_minutes $MINUTES}
pinn="python recipes/pinn.py $minutes"
masks="prm_per_tensor prm_per_param prm_rows_ema prm_debiased prm_debiased_per_param prm_rows"

cpu() { # what a user sees first, and one form more: minutes on two cores
    $pinn --methods adamw prm_per_tensor prm_per_param prm_rows constant_q --output_dir "$out/cpu"
}

claim() { # the page: ten seeds, about an hour of one CPU core
    $pinn --preset full --use_cpu --output_dir "$out/claim" \
        --methods adamw prm_per_tensor prm_per_param prm_rows_ema prm_rows constant_q
}

full() { # every reduction and estimator against AdamW, on a GPU; α of fresh batches, then of repeated data
    $pinn --preset full --output_dir "$out/full" --methods adamw $masks constant_q
    $pinn --preset full --output_dir "$out/empirical" --methods adamw $masks constant_q --prm_boundary empirical
}

peers() { # optimizers of other libraries, which are trained one after another: fewer settings
    $pinn --preset full --output_dir "$out/peers" --methods adamw cautious casmo grokfast grokadamw prm_per_param \
        --seeds 0 1 2 3 4 --learning_rates 6e-4 2e-3 6e-3 --prm_learning_rates 1e-2 2e-2 4e-2 --weight_decays 0 0.01 \
        --workers "${WORKERS:-8}"
}

masks() { # the formulas of the mask
    local mask
    for mask in snr soft hard; do
        $pinn --preset full --output_dir "$out/mask/$mask" --methods adamw prm_per_param prm_rows --prm_mask "$mask"
    done
}

noise() { # from none to more than the signal, and fixed points
    local noise
    for noise in 0 0.5 1 4; do
        $pinn --preset full --output_dir "$out/noise$noise" --methods adamw prm_per_param prm_rows --noise "$noise"
    done
    $pinn --preset full --output_dir "$out/fixed" --methods adamw prm_per_param prm_rows --collocation fixed
}

"$@"
