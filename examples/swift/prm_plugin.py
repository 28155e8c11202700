"""For `swift sft --external_plugins examples/swift/prm_plugin.py --optimizer prm`."""

import prm_hf.integrations.swift  # noqa: F401
