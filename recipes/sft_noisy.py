"""SFT on prompts of which some have another row's completion: PRM against AdamW, compared fairly.

The built-in task, on two CPU cores, in minutes:

    accelerate launch recipes/sft_noisy.py

`accelerate launch -m prm_hf sft` and `prm-hf sft` do the same without a clone. A model and a dataset of your own
(`prompt` and `completion`, as text or as messages):

    accelerate launch recipes/sft_noisy.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question --completion_column answer \
        --as_messages --answer_pattern "#### (.+)" \
        --noise_rate 0.3 --seeds 0 1 2 --learning_rates 5e-6 1e-5 3e-5 --prm_learning_rates 2e-5 5e-5 1e-4 \
        --output_dir runs/gsm8k

or with everything in a file: `--config recipes/qwen2.5-0.5b/sft_noisy.yaml`. All flags of `PRMSFTConfig` and TRL's
`ModelConfig` work. Finished runs are not repeated; `prm-hf compare runs/…` prints the table again.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
