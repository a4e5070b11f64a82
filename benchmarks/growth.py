"""Ten times the images: the same rate, and no more memory than the images take?

    python -m benchmarks.growth [--repeats 3] [--batch-size 200]

Trains on the embedded digits and on ten copies of them, 600,000 images, in turns, each in a fresh process: the second
epoch's rate, and the peak memory of the process. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from mnist_dist import runner
from mnist_dist.data import STEMS
from mnist_dist.data.idx import IDX_MAGIC
from mnist_dist.data.synthetic import load_digits
from mnist_dist.tables import cell, spread, table

COPIES = 10


def write_copies(folder: Path, copies: int) -> int:
    """The embedded digits as IDX files, the training part so many times over; the bytes of the training images."""
    digits = load_digits(folder / "embedded")
    arrays = dict(zip(STEMS, (digits.train_images, digits.train_labels, digits.test_images, digits.test_labels),
                      strict=True))
    for (split, what), stem in STEMS.items():
        array, times = arrays[split, what], copies if split == "train" else 1
        with open(folder / stem, "wb") as file:
            file.write(np.array([IDX_MAGIC[what], len(array) * times, *array.shape[1:]], dtype=">u4").tobytes())
            for _ in range(times):
                file.write(array.tobytes())
    return digits.train_images.nbytes * copies


def trained(data_dir: Path, batch_size: int, folder: Path) -> tuple[float, int]:
    """Samples per second of the second epoch, and the peak memory in bytes."""
    outcome = runner.train(["--dataset", "mnist", "--data-dir", data_dir, "--batch-size", batch_size, "--epochs", 2,
                            "--compile", "on", "--wandb", "disabled", "--checkpoint-every", "never"], folder)
    if outcome.result is None or not outcome.result.epochs[-1].samples_per_second:
        sys.exit(f"growth: error: {outcome.note or 'nothing was measured'}")
    return outcome.result.epochs[-1].samples_per_second, outcome.result.epochs[-1].peak_memory_bytes


def main() -> None:
    """Measure in turns, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=200)
    given = parser.parse_args()
    found: dict[int, list[tuple[float, int]]] = {1: [], COPIES: []}
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {}
        for copies in found:
            Path(scratch, str(copies)).mkdir()
            sizes[copies] = write_copies(Path(scratch, str(copies)), copies)
        for repeat in range(given.repeats):
            for copies, outcomes in found.items():
                outcomes.append(trained(Path(scratch, str(copies)), given.batch_size,
                                        Path(scratch, f"run-{copies}-{repeat}")))
    lines = []
    for copies, outcomes in found.items():
        rates, peaks = zip(*outcomes, strict=True)
        lines.append([f"{60_000 * copies:,}", cell(spread(rates)), f"{sizes[copies] / 2**20:,.0f}",
                      cell(spread([peak / 2**20 for peak in peaks]))])
    print("\n".join(table(["images", "samples/s", "images take (MiB)", "peak memory (MiB)"], lines)))
    few, many = (spread([rate for rate, _ in found[copies]]).median for copies in found)
    small, large = (spread([peak for _, peak in found[copies]]).median for copies in found)
    print(f"Rate with {COPIES} times the images: {100 * (many / few - 1):+.1f} %. Memory grows by "
          f"{(large - small) / 2**20:,.0f} MiB for {(sizes[COPIES] - sizes[1]) / 2**20:,.0f} MiB more of images.")


if __name__ == "__main__":
    main()
