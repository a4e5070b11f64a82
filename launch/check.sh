#!/usr/bin/env bash
# ./launch/check.sh: style (ruff) and types (mypy), as continuous integration checks them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python -m ruff check .
# the format is pycodestyle's, which ruff has as preview rules; arguments fill the line and are aligned
python -m ruff check --preview --select E1,E2,E3,W .
python -m mypy
