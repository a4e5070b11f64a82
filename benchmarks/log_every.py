"""What recording the loss within the epochs costs, at the default of `--log-every`, as a share of the training's time.

    python -m benchmarks.log_every DATA_DIR OUT.json [TURNS]

Each measurement is a run in a fresh process, in which the calls that record and show the loss are timed. Two runs, with
and without, differ by ten times as much as these calls take: a machine is not as steady as that.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.tables import cell, spread, table

CASES = {  # how a row is called: options
    f"batch {batch:,}, {kind}": (f"--batch-size={batch}", f"--compile={compile}", *length)
    for batch, length in ((1, ("--max-steps=10000",)), (200, ("--epochs=5",)))
    for kind, compile in (("plain", "off"), ("compiled", "on"))}
TIMED = {"mnist_dist.training.run.Run": ("_keep_points", "_write_points"),  # methods of these classes
         "mnist_dist.training.losses.Display": ("show",)}


def child(folder: str, *words: str) -> None:
    """A run in this process; prints the seconds spent in the calls, and those of the whole training."""
    from mnist_dist import cli

    spent = []

    def timed(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                spent.append(time.perf_counter() - begin)

        return call

    with ExitStack() as patches:
        for path, names in TIMED.items():
            kind = resolve_name(path)
            for name in names:
                patches.enter_context(patch.object(kind, name, timed(getattr(kind, name))))
        status = cli._status(["train", *words, "--wandb=disabled", "--checkpoint-every=never",
                              f"--output-dir={folder}"])[0]
    place = Path(folder)
    whole = (place / "metrics.jsonl").stat().st_mtime - (place / "config.yaml").stat().st_mtime
    print(json.dumps({"status": status, "seconds": sum(spent), "of": whole}), flush=True)
    os._exit(status)  # as the command line does, if a thread is left


def share(words: tuple[str, ...], data_dir: str) -> dict[str, float]:
    """The seconds in the calls, and those of the training, of one run."""
    with tempfile.TemporaryDirectory() as place:
        done = runner.run([sys.executable, "-m", "benchmarks.log_every", "child", f"{place}/run", *words,
                           f"--data-dir={data_dir}"], timeout=300)
    if done.returncode:
        raise SystemExit(runner.last_error(done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def main(data_dir: str, output: str, turns: str = "3") -> None:
    """Measure, print the table and write the figures."""
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(int(turns)):
        for case, options in CASES.items():
            runs[case].append(share(options, data_dir))
    print("\n".join(table(["run", "training, s", "recording and showing the loss, ms", "share, %"], [
        [case, cell(spread([run["of"] for run in of_case])), cell(spread([1000 * run["seconds"] for run in of_case])),
         cell(spread([100 * run["seconds"] / run["of"] for run in of_case]))] for case, of_case in runs.items()])))
    Path(output).write_text(json.dumps({"machine": describe(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(*sys.argv[2:])
    main(*sys.argv[1:])
