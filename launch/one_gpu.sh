#!/usr/bin/env bash
# ./launch/one_gpu.sh [OPTIONS]: one GPU of this machine, the first unless CUDA_VISIBLE_DEVICES names another.
# When: a laptop or a workstation, or to compare one GPU with several.
set -euo pipefail
caller=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$caller"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$root/train.py" "$@"
