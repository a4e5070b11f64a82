"""float32 beside bf16, the batch-200 protocol of the tutorial: the test NLL of five seeds, and the rates.

    python -m benchmarks.precision DATA_DIR OUTPUT.json [--precisions no,bf16] [--seeds 5]

Each run is a fresh process; the precisions take turns, with the same seed. Prints Markdown: of each epoch that has a
reference, the test NLL of every seed, summed over the test images; and the rate, in samples per second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.commands.reproduce import PROTOCOLS
from mnist_dist.disk.files import replace_json
from mnist_dist.tables import cell, spread, table

PROTOCOL = PROTOCOLS[1]
REFERENCE = PROTOCOL.reference  # epoch to (mean, deviation) of the test NLL sum
NAMES = {"no": "float32"}


def trained(data_dir: Path, precision: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run: its NLL sums, by epoch, and the median of its epochs' rates. Ends the benchmark if it fails."""
    outcome = runner.train(["--dataset", "mnist", "--data-dir", data_dir.resolve(), "--seed", seed, "--epochs",
                            max(REFERENCE) + 1, "--mixed-precision", precision, "--compile", "on", "--wandb",
                            "disabled", "--checkpoint-every", "never"], folder)
    if outcome.result is None:
        sys.exit(f"precision: error: {outcome.note}")
    epochs = outcome.result.epochs
    return {"precision": precision, "seed": seed,
            "test_nll_sums": {epoch: epochs[epoch].test_nll_sum for epoch in REFERENCE},
            "samples_per_second": statistics.median(one.samples_per_second or 0.0 for one in epochs)}


def markdown(found: list[dict[str, Any]]) -> list[str]:
    """A line for each epoch and precision, and one for each precision's rate."""
    precisions = list(dict.fromkeys(one["precision"] for one in found))
    own = {precision: [one for one in found if one["precision"] == precision] for precision in precisions}
    lines = []
    for epoch, (mean, deviation) in REFERENCE.items():
        for precision, runs in own.items():
            sums = [run["test_nll_sums"][epoch] for run in runs]
            lines.append([str(epoch), NAMES.get(precision, precision), ", ".join(f"{value:.1f}" for value in sums),
                          f"{statistics.mean(sums):.1f}", f"{mean} ± {deviation}"])
    rates = {precision: [run["samples_per_second"] for run in runs] for precision, runs in own.items()}
    first = rates[precisions[0]]
    return [*table(["epoch", "precision", "seeds", "mean", "reference"], lines),
            *table(["precision", "samples/s", f"times {NAMES.get(precisions[0], precisions[0])}"], [
                [NAMES.get(precision, precision), cell(spread(values)),
                 cell(spread([value / other for value, other in zip(values, first, strict=True)]))]
                for precision, values in rates.items()])]


def main() -> int:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--precisions", default="no,bf16")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(given.seeds):
            for precision in given.precisions.split(","):
                found.append(trained(given.data_dir, precision, seed, Path(scratch, f"{precision}-{seed}")))
                print(found[-1], file=sys.stderr, flush=True)
    replace_json(given.output, {"machine": describe(), "runs": found})
    print("\n".join(markdown(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
