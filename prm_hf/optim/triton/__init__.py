"""The Triton implementation of a step."""
