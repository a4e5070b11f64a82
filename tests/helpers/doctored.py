"""Ranks of `mnist-dist doctor` of which rank 1 is ill; run by test_doctor.py. ILL names how."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from mnist_dist import cli
from mnist_dist.commands.doctor import doctor

healthy = doctor.loss_sum


def slow(*words):
    time.sleep(0.02)
    return healthy(*words)


def wrong(*words):
    return healthy(*words) * 1.001


def main(argv: Sequence[str]) -> int:
    if os.environ["RANK"] == "1":
        doctor.loss_sum = {"slow": slow, "wrong": wrong, "": healthy}[os.environ["ILL"]]
    return cli.main(argv)
