"""DPO on preferences with flipped labels: PRM against AdamW, compared fairly.

The built-in task, on two CPU cores, in minutes:

    accelerate launch recipes/dpo_noisy.py

`accelerate launch -m prm_hf dpo` and `prm-hf dpo` do the same without a clone. A model and a dataset of your own:

    accelerate launch recipes/dpo_noisy.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --noise_rate 0.3 --seeds 0 1 2 \
        --methods adamw prm_per_tensor prm_debiased constant_q cdpo robust \
        --learning_rates 1e-7 2.5e-7 5e-7 --prm_learning_rates 1e-6 2.5e-6 5e-6 \
        --output_dir runs/ultrafeedback

or with everything in a file: `--config recipes/qwen2.5-0.5b/dpo_noisy.yaml`. All flags of `PRMDPOConfig` and TRL's
`ModelConfig` work. Finished runs are not repeated; `prm-hf compare runs/…` prints the table again.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["dpo", *sys.argv[1:]]))
