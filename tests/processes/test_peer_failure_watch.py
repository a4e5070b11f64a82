"""A machine whose processes are stopped or hang after another one has failed: they are ended, and only then."""

from __future__ import annotations

import sys

from support import ROOT, run

PROGRAM = """
import os, signal, subprocess, sys, time
from torch.distributed import HashStore, PrefixStore
from mnist_dist.processes import peer_failure_watch

peer_failure_watch.LOOK_SECONDS, peer_failure_watch.STOPPED_SECONDS, peer_failure_watch.GRACE_SECONDS = 0.05, 0.3, 1.0
for case in ("hangs", "stopped", "ends by itself", "machine 0 is over", "the store is lost"):
    store = HashStore()
    watched = peer_failure_watch.Watch(store, 1)
    child = subprocess.Popen(["sleep", "60"])
    if case == "stopped":
        child.send_signal(signal.SIGSTOP)
    if case == "the store is lost":
        watched.store = None
        def lost(seconds, task):
            raise TimeoutError
        peer_failure_watch.within = lost
    else:
        PrefixStore("mnist_dist/watch", store).add("over" if "over" in case else "failed", 1)
    begin = time.monotonic()
    if case == "ends by itself":
        child.kill()
        watched.end(failed=True)
    elif case == "machine 0 is over":
        time.sleep(1.5)
        assert child.poll() is None
        child.kill()
    assert child.wait(20) == -signal.SIGKILL
    print(f"{case}: {watched.ended.partition(' did not ')[2]}, {'soon' if time.monotonic() - begin < 0.9 else 'later'}")
"""


def test_what_does_not_end_is_ended(tmp_path):
    done = run([sys.executable, "-c", PROGRAM], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines() == [
        "hangs: end by themselves (they hang): they have been ended, later",
        "stopped: end by themselves (stopped): they have been ended, soon",
        "ends by itself: , soon", "machine 0 is over: , later",
        "the store is lost: end by themselves (they hang): they have been ended, later"], done.stdout + done.stderr
