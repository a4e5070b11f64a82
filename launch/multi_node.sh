#!/usr/bin/env bash
# ./launch/multi_node.sh R [OPTIONS]: this machine's part of a run on several machines. R = 0, 1, … is this machine's
# number. Edit the four lines below once (or set the variables), and start it on every machine, in any order.
# When: one machine is not enough, and there is no scheduler. The run's folder is on machine 0.
set -euo pipefail

MACHINES=${MACHINES:-2}         # how many there are
PROCESSES=${PROCESSES:-1}       # on each: one per GPU, or on the CPU as many as share its cores well
ADDRESS=${ADDRESS:-10.0.0.1}    # of machine 0, as every machine reaches it; an IP address needs no name server
PORT=${PORT:-29500}             # on machine 0, which must be open; gloo and NCCL use other ports between the machines

[[ ${1:-} =~ ^[0-9]+$ ]] || { echo "usage: $0 R [OPTIONS of mnist-dist train], R from 0 to $((MACHINES - 1))" >&2; exit 2; }
rank=$1
shift
caller=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$caller"
exec python "$root/train.py" --machines "$MACHINES" --processes "$PROCESSES" --machine-rank "$rank" \
    --address "$ADDRESS:$PORT" "$@"
