#!/usr/bin/env bash
# ./launch/test.sh [PYTEST OPTIONS]: runs the quick tests, two files at a time (-n 0: one, and -s then shows what they
# print; -rP shows it at the end); with -m long, those that take more than half a minute; with -m faults, the rest of
# the table of signals. Some need the original MNIST files: in the folder that MNIST_DIST_TEST_DATA names, or in data/.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python -c 'import pytest, xdist' 2>/dev/null ||
    { echo "launch: this environment has mnist-dist but no pytest with pytest-xdist: pip install -e '.[dev]'" >&2; exit 2; }
# a file's tests share what they train; the longest files come first (tests/conftest.py), and xdist keeps this order
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
