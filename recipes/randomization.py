"""The randomization tests: can a model fit pure noise, how long does it take, and what does PRM change?

A small ViT and a small ResNet on scikit-learn's digits, SFT and DPO on the built-in task, each on true labels and on
the five corruptions of Zhang et al. (2017, arXiv 1611.03530), with AdamW and PRM, until the training rows are fitted:

    pip install -c constraints.txt -e ".[trl,report,vision]"
    python recipes/randomization.py

`prm-hf randomization` does the same without a clone. On two CPU cores it takes minutes. `--models`, `--kinds`,
`--methods` and `--seeds` choose among the runs. Those that are finished are not repeated, and those of one model and
kind are also a comparison of their own: `prm-hf compare runs/randomization/vit/partial_labels`.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["randomization", *sys.argv[1:]]))
