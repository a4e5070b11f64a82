"""Machines for tests: those of benchmarks/hosts.py, or the test is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import hosts
from mnist_dist.errors import UserError


class Hosts(hosts.Hosts):
    """So many hosts, from `with` on."""

    def __init__(self, folder: Path, number: int) -> None:
        try:
            super().__init__(folder, number)
        except UserError as error:
            pytest.skip(str(error))
