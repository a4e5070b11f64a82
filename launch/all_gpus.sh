#!/usr/bin/env bash
# ./launch/all_gpus.sh [OPTIONS]: every GPU of this machine, a process each; without a GPU, one process on the CPU.
# When: a box with several GPUs. CUDA_VISIBLE_DEVICES=0,1 leaves the others alone. --batch-size stays the global one.
set -euo pipefail
caller=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$caller"
exec accelerate launch --config_file "$root/accelerate_config.yaml" "$root/train.py" "$@"
