"""The effective dimension where it is known or can be watched: four experiments, in minutes on a CPU.

    pip install -c constraints.txt -e ".[trl,diagnostics]"
    python recipes/effective_dimension.py

`double_descent` fits random features by least squares, `contraction` is the posterior of Bayesian linear regression,
`perturbation` moves a classifier of scikit-learn's digits along and beside its eigenvectors, and `grid` trains such
classifiers of several widths and depths to one training loss. Name some of them to run these alone. The grid takes
`--model vit --depths 1 2` too. Numbers and pictures are written to `--output`. docs/diagnostics.md says what the
effective dimension is.
"""

import sys

from prm_hf.experiments.dimension_curves import main


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
