#!/usr/bin/env bash
# The commands of sharding.md, from the repository's root: `bash results/sharding.sh cpu`, or `gpu` on a host with two.
set -euo pipefail

cpu() {
    python -m tests.distributed.matrix
    python -m tests.distributed.points
    pytest -m slow -n 0 tests/distributed
}

gpu() {
    for precision in fp32 bf16; do
        accelerate launch --config_file accelerate_configs/single.yaml benchmarks/sharded.py \
            --precision $precision --output one_gpu_$precision.json
        for path in ddp fsdp2 zero2 zero3; do
            accelerate launch --config_file accelerate_configs/$path.yaml --num_processes 2 benchmarks/sharded.py \
                --precision $precision --reference one_gpu_$precision.json --output ${path}_$precision.json
        done
    done
    for path in ddp fsdp2 zero2 zero3; do
        accelerate launch --config_file accelerate_configs/$path.yaml --num_processes 2 benchmarks/sharded.py \
            --reduction per_row --output ${path}_per_row.json
    done
}

"$@"
