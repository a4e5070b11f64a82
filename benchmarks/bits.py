"""What changes the bits of a `--reproducible` run, and what does not.

    python -m benchmarks.bits DATA_DIR OUTPUT.json [--steps 300]

Each way trains so many steps at batch 200 in a folder of its own, and its weights are compared with those of one
process, by SHA-256. Writes OUTPUT.json, prints Markdown; the exit status is 1 if another number of processes has other
bits.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.processes.launch import child_environment
from mnist_dist.record.files import replace_json
from mnist_dist.tables import table

TIMEOUT_SECONDS = 600.0


class Way(NamedTuple):
    """A way to train the same: in parts, each on so many processes until so many steps are done; the environment."""

    name: str
    parts: Sequence[tuple[int, float]] = ((1, 1.0),)  # processes, and the part of the steps that is done then
    environment: tuple[tuple[str, str], ...] = ()
    must_agree: bool = True


WAYS = (
    *(Way(f"{size} process{'es' if size > 1 else ''}", ((size, 1.0),)) for size in (1, 2, 4, 8)),
    Way("1, then 4, then 2 processes", ((1, 0.31), (4, 0.67), (2, 1.0))),
    Way("OMP_NUM_THREADS=2", environment=(("OMP_NUM_THREADS", "2"),)),
    *(Way(f"ATEN_CPU_CAPABILITY={name}", environment=(("ATEN_CPU_CAPABILITY", name),), must_agree=False)
      for name in ("default", "avx2", "avx512")),
    *(Way(f"MKL_CBWR={name}", environment=(("MKL_CBWR", name),), must_agree=False)
      for name in ("COMPATIBLE", "AVX2", "AVX512")),
)


def weights_of(way: Way, data_dir: str, steps: int, folder: Path) -> dict[str, Any]:
    """The weights after these steps, and their SHA-256."""
    for size, part in way.parts:
        words = ["--dataset", "mnist", "--data-dir", data_dir, "--reproducible", "--resume", "--checkpoint-every",
                 "1000steps", "--wandb", "disabled", "--max-steps", str(round(part * steps)), "--epochs", "1000"]
        outcome = runner.train(words, folder, processes=size, timeout=TIMEOUT_SECONDS,
                               environment={**child_environment(), "OMP_NUM_THREADS": "1", **dict(way.environment)})
        if outcome.note:
            raise SystemExit(f"{way.name}: {outcome.note}")
    tensors = load_file(folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {"way": way.name, "sha256": digest, "weights": tensors}


def main() -> None:
    """Train every way, and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.split("\n")[0])
    parser.add_argument("data_dir")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    rows, wrong = [], []
    for way in WAYS:
        with tempfile.TemporaryDirectory(dir=given.output.parent) as scratch:
            row = weights_of(way, given.data_dir, given.steps, Path(scratch) / "run")
        weights = row.pop("weights")
        if not rows:
            reference = weights
        row["largest_difference"] = max(float((weights[name] - reference[name]).abs().max()) for name in reference)
        rows.append(row)
        if way.must_agree and row["sha256"] != rows[0]["sha256"]:
            wrong.append(way.name)
        print(row, file=sys.stderr, flush=True)
    replace_json(given.output, {"machine": describe(), "steps": given.steps, "rows": rows})
    print("\n".join(table(["what", "SHA-256 of the weights", "largest difference of a weight"],
                          [[row["way"], f"`{row['sha256'][:16]}`", f"{row['largest_difference']:.1e}"]
                           for row in rows])))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
