#!/usr/bin/env bash
# The runs of results/grokking/README.md, from the repository's root: `bash results/grokking/run.sh cpu`, or another
# function. A command that is given again goes on where it stopped; a stack of models that was cut off starts again.
#
#   GPUS=0,0,0,1,1,1 MAX_STEPS=30000 bash results/grokking/run.sh full
#
# GPUS has an entry for each process: a method's models train at once, in one process, which the launches of small
# kernels keep busy, so that several processes share a GPU. MAX_STEPS are the steps of a run.
set -euo pipefail

out=${OUT:-runs/grokking}
export CUDA_VISIBLE_DEVICES=${GPUS:-0,0,0,0,0,0,0}
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 # products of matrices as on every GPU of today
export OMP_NUM_THREADS=1
grokking="prm-hf sweep grokking --preset full --max_steps ${MAX_STEPS:-50000} ${MORE:-}" # MORE: further flags, as other grids
stacked="adamw prm_per_tensor prm_per_param prm_rows_ema prm_debiased_per_param prm_debiased prm_rows"

cpu() { # minutes on two cores
    prm-hf grokking --output_dir "$out/cpu" --seeds 0 1 2 3 4 --models_at_once 1
    prm-hf grokking --output_dir "$out/cpu" --seeds 0 1 2 3 4 --models_at_once 1 \
        --methods adamw grokfast grokadamw casmo
}

published() { # the published task: more than two hours of one CPU core; given twice at a time, it uses two
    prm-hf grokking --preset full --use_cpu --max_steps 2500 --models_at_once 1 --weight_decays 1 3 5 10 \
        --methods adamw prm_per_param constant_q --output_dir "$out/published"
}

full() { # α = 1
    $grokking --methods $stacked constant_q --output_dir "$out/full"
}

empirical() { # α = b/(n - b), 1/3 here
    $grokking --methods $stacked constant_q --prm_boundary empirical --output_dir "$out/empirical"
}

masks() { # the other masks, one value a scalar
    local mask
    for mask in soft hard; do
        $grokking --methods adamw prm_per_param --prm_mask "$mask" --output_dir "$out/$mask"
    done
}

peers() { # optimizers of other libraries train one by one, and take hours: fewer seeds
    $grokking --seeds 0 1 2 --methods adamw grokfast grokadamw casmo cautious --output_dir "$out/peers"
}

"$@"
