#!/usr/bin/env bash
# The runs of results/grokking/README.md, from the repository's root: `bash results/grokking/run.sh cpu`, or another
# function. A command that is given again goes on where it stopped; a stack of models that was cut off starts again.
#
#   GPUS="0 1" MAX_STEPS=30000 bash results/grokking/run.sh full
#
# GPUS are the devices to spread the methods over, MAX_STEPS the steps of a run. A method's models train at once, in a
# process of its own, which the launches of small kernels keep busy, so that several processes share a GPU.
set -euo pipefail

out=${OUT:-runs/grokking}
read -r -a gpus <<<"${GPUS:-0}"
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 # products of matrices as on every GPU of today
settings="--preset full --max_steps ${MAX_STEPS:-50000} ${MORE:-}" # MORE: further flags, as other grids
stacked="adamw prm_per_tensor prm_per_param prm_debiased_per_param prm_debiased prm_rows"

cpu() { # minutes on two cores
    prm-hf grokking --output_dir "$out/cpu"
}

function each { # a process for each of the methods "$2", with the flags "$3", and the report on all of them in the folder "$1"
    local number=0 method pids="" pid
    mkdir -p "$1/all"
    for method in $2; do
        mkdir -p "$1/of/$method"
        CUDA_VISIBLE_DEVICES=${gpus[number % ${#gpus[@]}]} OMP_NUM_THREADS=1 prm-hf grokking $settings $3 \
            --methods "$method" --output_dir "$1/of/$method" >"$1/$method.log" 2>&1 &
        pids="$pids $!"
        number=$((number + 1))
    done
    for pid in $pids; do wait "$pid" || echo "a method failed: see $1/*.log" >&2; done
    for method in $2; do cp -rn "$1/of/$method/." "$1/all"; done
    CUDA_VISIBLE_DEVICES=${gpus[0]} prm-hf grokking $settings $3 --methods $2 ${4:-} --output_dir "$1/all"
}

full() { # α = 1
    each "$out/full" "$stacked" "" constant_q
}

empirical() { # α = b/(n - b), 1/3 here
    each "$out/empirical" "$stacked" "--prm_boundary empirical" constant_q
}

masks() { # the other masks, one value a scalar
    each "$out/soft" "adamw prm_per_param" "--prm_mask soft"
    each "$out/hard" "adamw prm_per_param" "--prm_mask hard"
}

peers() { # optimizers of other libraries train one by one, so that they take WORKERS processes and hours: fewer seeds
    CUDA_VISIBLE_DEVICES=${gpus[0]} OMP_NUM_THREADS=1 prm-hf grokking $settings --seeds 0 1 2 \
        --methods adamw grokfast grokadamw casmo cautious --workers "${WORKERS:-12}" --output_dir "$out/peers"
}

"$@"
