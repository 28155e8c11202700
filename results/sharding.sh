#!/usr/bin/env bash
# The commands of sharding.md, from the repository's root: `bash results/sharding.sh cpu`, and on a host with GPUs
# `bash results/sharding.sh gpu 2`, with their number, which writes the folder sharding_gpu.
set -euo pipefail

cpu() {
    python -m tests.distributed.matrix
    python -m tests.distributed.points results/sharding_points.json
    python benchmarks/traffic.py --figure results/sharding.png
    pytest -m slow -n 0 tests/distributed
}

gpu() {
    local gpus=${1:-2} folder=sharding_gpu reduction precision path reference count
    local size_7b="--vocab_size 152064 --hidden_size 3584 --intermediate_size 18944 --num_layers 28 --num_heads 28"
    measure() { # PATH GPUS FILE ARGUMENT ...
        accelerate launch --config_file "accelerate_configs/$1.yaml" --num_processes "$2" benchmarks/sharded.py \
            --output "$folder/$3.json" "${@:4}"
    }
    mkdir -p "$folder"
    # Masks against those of one GPU, messages and bytes
    for reduction in per_tensor per_row; do
        for precision in fp32 bf16; do
            for path in ddp fsdp2 zero2 zero3; do
                reference=${path/ddp/single}
                measure "$reference" 1 "${path}_${reduction}_${precision}_one" --reduction $reduction \
                    --precision $precision --batch_size $((4 * gpus)) --gradient_accumulation_steps "$gpus" --optimizers
                measure "$path" "$gpus" "${path}_${reduction}_${precision}" --reduction $reduction \
                    --precision $precision --batch_size $((4 * gpus)) --optimizers \
                    --reference "$folder/${path}_${reduction}_${precision}_one.json"
            done
        done
    done
    # Times and memory, of 8 sequences a GPU on 1, 2, 4 and 8 of them
    for precision in fp32 bf16; do
        for path in ddp fsdp2 zero2 zero3; do
            for ((count = 1; count <= gpus; count *= 2)); do
                measure $path "$count" "${path}_${precision}_$count" --steps 0 --precision $precision \
                    --batch_size $((8 * count))
            done
        done
    done
    # The same in the shapes of Qwen2.5-7B
    for path in fsdp2 zero2 zero3; do
        measure $path "$gpus" "${path}_7b" --steps 0 --precision bf16 --batch_size "$gpus" $size_7b \
            --num_key_value_heads 4 --timed_steps 10 --optimizers adamw_fused prm_per_tensor prm_per_row
    done
}

"$@"
