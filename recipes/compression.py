"""Did a network learn something simple, or by heart? A bound on its errors from the size of its compressed weights.

A LeNet-like network and a small ViT on scikit-learn's digits, with true labels, random labels, a start from rendered
digits, and one from the first half of the rows; and a language model with a UniLora adapter, or with LoRA through a
random subspace, on documents that can be predicted and on random tokens:

    pip install -c constraints.txt -e ".[trl,report,vision,diagnostics]"
    python recipes/compression.py

Each model is trained in a random subspace, quantised, written to a file, read again and evaluated. `--models lenet
vit` leaves out the language models. The table is printed, and written to `runs/compression/compression.json`.
"""

import sys

from prm_hf.experiments.compression import main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
