"""How runs are made: arguments, data, the grid of runs, the runner, and one module for each task."""

from .._extras import require


require("prm_hf.experiments", "transformers", "trl", "accelerate", "datasets", "peft", "scipy", "filelock", "yaml")

OUT_OF_TIME = 75  # the exit code by which programs say "not now, try again"
