"""The effective dimension where it is known or can be watched: three experiments, in about five minutes on a CPU.

    pip install -c constraints.txt -e ".[trl,diagnostics]"
    python recipes/effective_dimension.py

`double_descent` fits random features by least squares, `contraction` is the posterior of Bayesian linear regression,
and `grid` trains classifiers of scikit-learn's digits of several widths and depths to one training loss. Name some of
them to run these alone. The grid takes `--model vit --widths 8 16 32 --depths 1 2` too. Numbers and a picture are
written to `--output`. docs/diagnostics.md says what the effective dimension is.
"""

import sys

from prm_hf.experiments.dimension_curves import main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
