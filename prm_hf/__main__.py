"""`python -m prm_hf …` and `accelerate launch -m prm_hf …` do what `prm-hf …` does."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
