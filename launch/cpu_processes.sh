#!/usr/bin/env bash
# ./launch/cpu_processes.sh N [OPTIONS]: N processes on this machine's CPU, even if there are GPUs.
# When: to see distributed training work without a GPU, or to measure how the CPU scales. Each process gets cores / N
# threads; OMP_NUM_THREADS=M sets another number.
set -euo pipefail
[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || { echo "usage: $0 N [OPTIONS of mnist-dist train]" >&2; exit 2; }
number=$1
shift
caller=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$caller"
export ACCELERATE_USE_CPU=true
exec python "$root/train.py" --processes "$number" "$@"
