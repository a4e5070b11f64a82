"""What a step needs for an epoch, made in a thread while the device takes the steps of the epoch before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from mnist_dist.worker import begun


class Ahead:
    """`make` takes the number of an epoch. It runs in a thread, and must not touch the device."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self._next: tuple[int, Future] | None = None  # an epoch, and what is made for it

    def of(self, epoch: int) -> Any:
        """What `make` returns for this epoch; that of the next one is begun."""
        ahead = self._next
        made = ahead[1].result() if ahead and ahead[0] == epoch else self.make(epoch)
        self._next = epoch + 1, begun(partial(self.make, epoch + 1))
        return made
