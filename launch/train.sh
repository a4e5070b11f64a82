#!/usr/bin/env bash
# ./launch/train.sh [OPTIONS]: trains in one process, on a GPU if there is one. From a fresh clone nothing else is needed.
# The options are those of `mnist-dist train`; --processes N starts N processes on this machine.
set -euo pipefail
caller=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$caller"
exec python "$root/train.py" "$@"
