#!/usr/bin/env bash
# The command of the simulation of few_elements.md, from the repository's root: `bash results/few_elements.sh`.
set -euo pipefail

python research/few_elements.py
