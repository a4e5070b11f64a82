"""`mnist-dist` on a processor whose products from so many multiplications are oneDNN's; run by test_cpu_products.py.

    run_forked([LEAST, WORDS, …], target="onednn_worker:main", …)    LEAST: a number, or "never"
"""

from __future__ import annotations

from collections.abc import Sequence

from mnist_dist import cli
from mnist_dist.record.environment import processor_family
from mnist_dist.training.steps import cpu_products

KINDS = ("plain", "compiled")


def main(argv: Sequence[str]) -> None:
    """Ends the process."""
    least, *words = argv
    cpu_products.ONEDNN_FROM = {} if least == "never" else {processor_family(): dict.fromkeys(KINDS, int(least))}
    cli.main(words)
