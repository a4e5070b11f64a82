"""`mnist-dist train`, in which rank 1 takes 100 ms more for each of its steps, outside any exchange."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from mnist_dist import cli
from mnist_dist.stopwatch import Window


def main(argv: Sequence[str]) -> int:
    """As `mnist_dist.cli.main`."""
    if os.environ.get("RANK") == "1":
        lap = Window.lap

        def slow_lap(self: Window, samples: int, waited: float) -> None:
            time.sleep(0.1)
            lap(self, samples, waited)

        Window.lap = slow_lap  # type: ignore[method-assign]
    return cli.main(argv)
