"""How the runs of a comparison are made."""

from .._extras import require


require("prm_hf.experiments", "transformers", "trl", "accelerate", "datasets", "peft", "filelock", "yaml")
