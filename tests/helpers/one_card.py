"""Ranks that share one GPU with real NCCL: each claims to be on another host, so that NCCL goes over sockets.

`main` is `mnist_dist.cli.main`, or the target that the variable ON_ONE_CARD names. It works on the CPU too, over gloo.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence

from mnist_dist.processes import restarts

WHERE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def main(argv: Sequence[str]) -> int:
    """As the target, for a rank whose RANK is set."""
    os.environ |= {**WHERE, "NCCL_HOSTID": f"host-{os.environ['RANK']}"}
    store_at = restarts.store_at

    @functools.wraps(store_at)
    def on_this_machine(*arguments: object, **options: object) -> object:
        return store_at(*arguments, **{**options, "is_elsewhere": False})  # type: ignore[arg-type]

    restarts.store_at = on_this_machine  # the hosts are one, so that its address is a loopback one
    module, _, name = os.environ.get("ON_ONE_CARD", "mnist_dist.cli:main").partition(":")
    return getattr(importlib.import_module(module), name)(argv)
