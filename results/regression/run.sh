#!/usr/bin/env bash
# The runs of results/regression: `bash results/regression/run.sh cpu`, or another function, from the repository's root.
# Every command may be repeated: it goes on where it stopped.
set -euo pipefail

out=${OUT:-runs/regression}
masks="prm_per_tensor prm_per_param prm_debiased prm_debiased_per_param prm_rows"

cpu() { # minutes on one core
    prm-hf regression --methods adamw $masks constant_q --output_dir "$out/cpu"
}

peers() { # optimizers of other libraries, which are trained one after another: fewer settings
    prm-hf regression --methods adamw cautious casmo grokfast grokadamw prm_per_param --weight_decays 0 \
        --output_dir "$out/peers"
}

full() { # wider grids, more steps and ten seeds, on a GPU
    prm-hf regression --preset full --methods adamw $masks prm_rows_ema constant_q --output_dir "$out/full"
    local mask
    for mask in soft hard; do
        prm-hf regression --preset full --methods adamw prm_per_param prm_rows --prm_mask "$mask" \
            --output_dir "$out/$mask"
    done
}

"$@"
