"""Grokking on modular division: PRM against AdamW, Grokfast and others by the steps to 95 % held-out accuracy.

On two CPU cores, with a small modulus, in minutes:

    python recipes/grokking.py

The published task, a·b⁻¹ mod 97 with 25 % of the pairs to train on, on a GPU:

    python recipes/grokking.py --preset full

`prm-hf grokking` does the same without a clone. Every method gets each learning rate at each weight decay. A run that
does not get there within `--max_steps` is censored, and the report treats it so. Finished runs are not repeated. With
several GPUs `prm-hf sweep grokking …` runs it on all of them.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["grokking", *sys.argv[1:]]))
