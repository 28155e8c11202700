"""In how many steps does a physics-informed network solve u_t + 5·u_x = 0 from noisy values at t = 0?

With AdamW and PRM over as many learning rates and weight decays each, on points that are drawn on the spot:

    pip install -c constraints.txt -e ".[trl,report]"
    python recipes/pinn.py

`prm-hf pinn` does the same without a clone. On two CPU cores it takes minutes, and `--preset full` is for a GPU.
`--noise`, `--observations` and `--collocation fixed` change the task. `--methods`, `--prm_mask` and
`--prm_boundary empirical` choose among the masks. docs/experiments.md says how to read the report.
"""

import sys

from prm_hf.cli import main


if __name__ == "__main__":
    sys.exit(main(["pinn", *sys.argv[1:]]))
