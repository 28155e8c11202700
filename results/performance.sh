#!/usr/bin/env bash
# The commands of performance.md and of docs/performance.md, from the repository's root: `bash results/performance.sh
# steps`, or another function, on the device that is to be measured.
set -euo pipefail

steps() { # every size that fits, as far as it gets in a minute
    python benchmarks/step.py
}

dpo_step() {
    python benchmarks/step.py --shapes --dpo_steps 12
}

versions() {
    python benchmarks/step.py --shapes lora 0.5b --dtypes float32
    for path in fsdp2 zero2; do
        accelerate launch --config_file accelerate_configs/$path.yaml --num_processes 1 benchmarks/sharded.py \
            --reduction per_row --steps 3 --timed_steps 30
    done
}

convergence() { # on a CPU; then, on a GPU, SFT of a model of 0.5B
    python benchmarks/convergence.py --steps 112 --seeds 0 1 2
    python benchmarks/convergence.py --model Qwen/Qwen2.5-0.5B --output runs/convergence_0.5b.json
}

"$@"
