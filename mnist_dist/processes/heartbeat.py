"""Signs of life: every rank writes one to the store that joined the ranks, twice a second, from its own thread.

The thread alone talks to the store, because a store whose machine is lost blocks whoever asks it. It needs no
collective, so it works while one hangs.
"""

from __future__ import annotations

import atexit
import threading
import time
from typing import Any

BEAT_SECONDS = 0.5
SILENT_SECONDS = 3.0  # without a sign of life, after which a rank counts as lost
KEY = "mnist_dist/alive/{}"


class Heartbeats:
    """This rank's signs of life, and on demand those of the others.

    `store` has `set` and `multi_get`. Each rank's first sign is there when this returns; another rank may look for it
    after the next collective.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.is_stuck = False  # this rank waits for others, which do not answer; the others read it
        self._signs: dict[int, bytes] = {}  # the last one of each rank
        self._seen: dict[int, float] = {}  # when it changed
        self._asked_at: float | None = None  # looks at the others since then
        self._ends = threading.Event()
        self._beat(0)
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # a thread that is in the store's code when Python ends can crash it

    def stop(self) -> None:
        """End the thread; if the store does not answer, the thread is left behind after two seconds."""
        atexit.unregister(self.stop)
        self._ends.set()
        self._thread.join(2.0)

    def ask(self) -> None:
        """From now on, until `rest`, look at the others."""
        if self._asked_at is None:
            self._seen = {}
            self._asked_at = time.monotonic()

    def rest(self) -> None:
        """From now on, do not look at them."""
        self._asked_at = None

    def silent(self) -> list[int]:
        """The ranks that have given no sign of life for `SILENT_SECONDS` since `ask`. Does not block.

        If the store does not answer, it is rank 0, on whose machine the store is.
        """
        since, seen = self._asked_at, dict(self._seen)
        if since is None:
            return []
        silent = [rank for rank in range(self.size)
                  if time.monotonic() - seen.get(rank, since) > SILENT_SECONDS]
        return [0] if self.rank in silent else silent  # this rank's own sign is missing: the store does not answer

    def look(self) -> list[int]:
        """Ask, and wait until it is known which ranks are silent: some seconds, if none is."""
        self.ask()
        # a rank's last sign is seen only now; the store may be slow
        deadline = time.monotonic() + SILENT_SECONDS + 4 * BEAT_SECONDS
        while not (silent := self.silent()) and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 5)
        return silent

    def busy(self) -> list[int]:
        """The ranks that were seen since `ask` and are not stuck."""
        return [rank for rank in self._seen if self._signs[rank].endswith(b"works")]

    def _beat(self, count: int) -> None:
        self.store.set(KEY.format(self.rank), f"{count} {'stuck' if self.is_stuck else 'works'}")

    def _run(self) -> None:
        count = 0
        try:
            while not self._ends.wait(BEAT_SECONDS):
                count += 1
                self._beat(count)
                if self._asked_at is not None:
                    self._read()
        except (RuntimeError, OSError):  # the store is closed or lost: from now on all are silent
            return

    def _read(self) -> None:
        signs = self.store.multi_get([KEY.format(rank) for rank in range(self.size)])
        for rank, sign in enumerate(signs):
            if sign != self._signs.get(rank):
                self._signs[rank], self._seen[rank] = sign, time.monotonic()
