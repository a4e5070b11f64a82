#!/usr/bin/env bash
# ./launch/qualify.sh [OUTPUT] [--data-dir DIR] [--short]: tests, benchmark, the tutorial and a small study on this
# machine's GPUs, else on its CPU; --short is the tests and the fused step beside its peers.
# OUTPUT/qualify.md tells what passed, what failed and the figures.
# When: a new box, a new driver, a new version of torch. Interrupted or failed: the same command goes on.
set -euo pipefail
caller=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$caller"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec python -m benchmarks.qualify "$@"
