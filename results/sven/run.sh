#!/usr/bin/env bash
# The commands of the page in this folder: `bash results/sven/run.sh built_in`, or another function, from the
# repository's root. Every command may be repeated: it goes on where it stopped.
set -euo pipefail

built_in() { # without a model hub or a GPU
    local dpo="python recipes/dpo_noisy.py --methods adamw prm_rows_eps:10 sven"
    local noise
    for noise in 0.3 0; do
        $dpo --noise_rate "$noise" --seeds 0 1 2 3 4 --learning_rates 3e-4 1e-3 --prm_learning_rates 3e-4 1e-3 \
            --max_extensions 1 --output_dir "runs/sven/noise$noise"
    done
}

toy() {
    python results/sven/toy.py results/sven/toy.json
}

speed() {
    python benchmarks/sven.py --output results/sven/speed.json
}

qwen_lora() { # on a GPU
    accelerate launch recipes/dpo_noisy.py --config recipes/qwen2.5-0.5b/gsm8k_pairs_lora.yaml \
        --methods adamw prm_rows sven --noise_rate 0.3 0 --padding_free false --output_dir runs/sven/gsm8k_pairs_lora
}

"$@"
