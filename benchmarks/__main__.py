"""`python -m benchmarks --data-dir DIR`: our training beside a plain Accelerate loop, on this machine.

Each measurement is a fresh process, the two take turns, and a first epoch warms up and is not counted. Prints a
Markdown table of medians with minimum and maximum; writes it, with hardware and versions, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mnist_dist.launching import child_environment

HERE = Path(__file__).parent
EPOCHS = 3  # of which the first warms up


def ours(root: str, batch_size: int, folder: Path) -> tuple[list[float], dict]:
    """Rates of the counted epochs of `mnist-dist train`, and where it ran."""
    words = ["--data-dir", root, "--batch-size", str(batch_size), "--epochs", str(EPOCHS), "--wandb", "disabled",
             "--checkpoint-every", "never", "--output-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "mnist_dist", "train", *words], check=True, stdout=subprocess.DEVNULL,
                   env=child_environment())
    result = json.loads((folder / "result.json").read_bytes())
    return [epoch["samples_per_second"] for epoch in result["epochs"][1:]], result["environment"]


def plain(root: str, batch_size: int) -> list[float]:
    """Rates of the counted epochs of the plain loop."""
    command = [sys.executable, HERE / "plain_accelerate.py", root, str(batch_size), str(EPOCHS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])[1:]


def row(name: str, rates: list[float]) -> str:
    """A line of the table: median, minimum and maximum over all counted epochs."""
    return f"| {name} | {statistics.median(rates):,.0f} | {min(rates):,.0f} | {max(rates):,.0f} | {len(rates)} |"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data", help="folder below which MNIST/raw lies (default: data)")
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    rates: dict[str, list[float]] = {"mnist_dist": [], "plain Accelerate loop": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats):
            mine, environment = ours(given.data_dir, given.batch_size, Path(folder, str(repeat)))
            rates["mnist_dist"] += mine
            rates["plain Accelerate loop"] += plain(given.data_dir, given.batch_size)
    ratio = statistics.median(rates["mnist_dist"]) / statistics.median(rates["plain Accelerate loop"])
    text = "\n".join([
        f"Training throughput at batch {given.batch_size}, one process, samples per second:", "",
        "| | median | minimum | maximum | epochs |", "|---|---|---|---|---|",
        *(row(name, values) for name, values in rates.items()), "",
        f"Ratio of the medians: {ratio:.1f}. {given.repeats} interleaved repeats of {EPOCHS} epochs in fresh "
        "processes, the first epoch of each not counted.", "",
        f"{environment['device_name']} ({environment['device']}), {environment['num_threads']} threads, torch "
        f"{environment['torch']}, accelerate {environment['accelerate']}, Python {environment['python']}, "
        f"{time.strftime('%Y-%m-%d')}; "
        f"`python -m benchmarks --batch-size {given.batch_size} --repeats {given.repeats}`",
    ])
    print(text)
    stem = HERE / "results" / f"{environment['device']}-batch-{given.batch_size}"
    stem.with_suffix(".md").write_text(text + "\n")
    record = {"environment": environment, "samples_per_second": rates}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
