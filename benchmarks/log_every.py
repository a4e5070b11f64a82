"""What recording the loss within the epochs costs: `--log-every` at its default beside `--log-every never`.

    python -m benchmarks.log_every DATA_DIR OUT.json [TURNS]

Each measurement is a run in a fresh process, and the two take turns. A time is from the start of the training to the
last line of `metrics.jsonl`, so that what is done between the epochs is in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.tables import cell, spread, table

CASES = {  # how a row is called: options
    f"batch {batch:,}, {kind}": (f"--batch-size={batch}", f"--compile={compile}", *length)
    for batch, length in ((1, ("--max-steps=10000",)), (200, ("--epochs=5",)))
    for kind, compile in (("plain", "off"), ("compiled", "on"))}
WAYS = {"never": ("--log-every=never",), "default": ()}


def seconds(words: tuple[str, ...], data_dir: str) -> float:
    """Of the training of one run, with its evaluations and what it records."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        outcome = runner.train([*words, f"--data-dir={data_dir}", "--wandb=disabled", "--checkpoint-every=never"],
                               folder)
        if outcome.result is None or outcome.status:
            raise SystemExit(f"a run ended with {outcome.note}")
        return (folder / "metrics.jsonl").stat().st_mtime - (folder / "config.yaml").stat().st_mtime


def main(data_dir: str, output: str, turns: str = "5") -> None:
    """Measure, print the table and write the figures."""
    times: dict[str, dict[str, list[float]]] = {case: {way: [] for way in WAYS} for case in CASES}
    for _ in range(int(turns)):
        for case, options in CASES.items():
            for way, words in WAYS.items():
                times[case][way].append(seconds((*options, *words), data_dir))
    lines = []
    for case, by_way in times.items():
        ratios = [recorded / without for recorded, without in zip(by_way["default"], by_way["never"], strict=True)]
        lines.append([case, *(cell(spread(by_way[way])) for way in WAYS), cell(spread(ratios))])
    print("\n".join(table(["run", "never, s", "default, s", "default / never"], lines)))
    record: dict[str, Any] = {"machine": describe(), "seconds": times}
    Path(output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
