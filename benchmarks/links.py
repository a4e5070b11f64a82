"""Does the doctor's latency and bandwidth predict the time of a step between two machines?

    python -m benchmarks.links DATA_DIR OUTPUT.json [--mbit 10,100,1000] [--repeats 3]

Two machines are network namespaces. In each turn, on links without a limit and then on links of so many Mbit/s, the
doctor measures the all-reduce of the gradient, and both machines train together. Predicted for a link is the step on
links without a limit, plus what the doctor's all-reduce takes longer on this link. Needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.hosts import Hosts
from benchmarks.machine import describe
from mnist_dist.disk.files import read_json, replace_json
from mnist_dist.errors import UserError
from mnist_dist.study.analysis.measured_network import from_doctor
from mnist_dist.tables import cell, spread, table

ADDRESS, TIMEOUT_SECONDS = "10.77.0.1", 300.0
BATCH, SECONDS = 200, 12.0  # samples of a process in a step; of a training, about
OPTIONS = ["--dataset", "mnist", "--compile", "off", "--wandb", "disabled", "--checkpoint-every", "never", "--epochs",
           "1000"]


def together(number: int) -> list[object]:
    """The words that make this host one of two."""
    return ["--processes", 1, "--machines", 2, "--machine-rank", number - 1, "--address", ADDRESS]


def on_both(hosts: Hosts, *commands: Sequence[object]) -> list[str]:
    """What the two print. Raises `RuntimeError` if a command fails, but for a doctor that has found something."""
    started = [hosts.start(number, sys.executable, "-m", "mnist_dist", *words, ACCELERATE_USE_CPU="true")
               for number, words in zip(hosts.numbers, commands, strict=True)]
    printed = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in started]
    for process, text, words in zip(started, printed, commands, strict=True):
        if process.returncode and not (words[0] == "doctor" and process.returncode == 1):
            raise RuntimeError(f"{words}: {text}")
    return printed


def step_ms(folder: Path) -> float:
    """Milliseconds of a step of the run there."""
    summary = read_json(folder / "result.json")["summary"]
    return 1000 * summary["global_batch_size"] / summary["samples_per_second"]


def measured(mbit: float | None, data_dir: Path) -> dict[str, float]:
    """On links of so many Mbit/s, or without a limit, milliseconds: all-reduce of 4 bytes, of the gradient, a step."""
    data = ["--data-dir", data_dir.resolve()]
    with tempfile.TemporaryDirectory() as scratch, Hosts(Path(scratch), 2) as hosts:
        for number in hosts.numbers if mbit else ():
            hosts.limit(number, mbit)
        said = on_both(hosts, *(["doctor", "--json", "--wandb", "disabled", *data, *together(number)]
                                for number in hosts.numbers))[0]
        fabric = from_doctor(json.loads(said)["findings"], "float32")
        if fabric is None:
            raise RuntimeError(said)
        exchange = 1000 * fabric.seconds(fabric.gradient_bytes)
        steps = int(max(30, min(1000, 1000 * SECONDS / (exchange + 3))))
        on_both(hosts, *(["train", *OPTIONS, *data, "--batch-size", 2 * BATCH, "--max-steps", steps, "--output-dir",
                          Path(scratch, "both"), *together(number)] for number in hosts.numbers))
        return {"latency_ms": 1000 * fabric.points[0][1], "exchange_ms": exchange,
                "measured_ms": step_ms(Path(scratch, "both"))}


def _rates(text: str) -> list[float]:
    rates = [float(word) for word in text.split(",")]
    if min(rates) <= 0:
        raise ValueError
    return rates


def main() -> int:
    """Measure, and print Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.links", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mbit", type=_rates, default="10,100,1000", metavar="A,B,…")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found: dict[float, list[dict[str, float]]] = {rate: [] for rate in given.mbit}
    try:
        for turn in range(given.repeats):
            free = measured(None, given.data_dir)
            for rate in found:
                link = measured(rate, given.data_dir)
                longer = link["exchange_ms"] - free["exchange_ms"]
                found[rate].append({**link, "free_exchange_ms": free["exchange_ms"], "free_ms": free["measured_ms"],
                                    "predicted_ms": free["measured_ms"] + longer})
                print(turn, rate, found[rate][-1], file=sys.stderr, flush=True)
                replace_json(given.output, {"machine": describe(), "batch_per_process": BATCH,
                                            "links": [{"mbit": one, "turns": turns} for one, turns in found.items()]})
    except UserError as error:
        print(f"links: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(markdown(found)))
    return 0


def markdown(found: dict[float, list[dict[str, Any]]]) -> list[str]:
    """The table: a line for each link, medians."""
    lines = []
    for rate, turns in found.items():
        off = [100 * (one["predicted_ms"] / one["measured_ms"] - 1) for one in turns]
        lines.append([f"{rate:,.0f} Mbit/s", *(cell(spread([one[name] for one in turns])) for name in (
            "latency_ms", "exchange_ms", "free_exchange_ms", "free_ms", "predicted_ms", "measured_ms")),
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*spread(off))])
    return table(["link", "doctor: 4 bytes, ms", "doctor: the gradient, ms", "the same without a limit, ms",
                  "a step without a limit, ms", "predicted, ms", "measured, ms", "predicted / measured - 1, %"], lines)


if __name__ == "__main__":
    sys.exit(main())
