"""`python -m benchmarks --data-dir DIR`: ours beside its peers and beside the machine's limit, on this machine.

Each measurement is a fresh process and the rows take turns. Prints a report in Markdown and writes it, a picture and
all measurements as JSON; the JSON after every measurement, so that an interrupted benchmark loses nothing. The rows
that need more than the project does: pip install -e ".[benchmarks]".
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report, rows
from mnist_dist.errors import UserError

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data-dir", default="data", metavar="DIR", help="folder with MNIST, or to download it into "
                      "(default: data)")
    made.add_argument("--quick", action="store_true", help="two repeats of fewer images at batches 1 and 200: minutes, "
                      "for a first look")
    made.add_argument("--repeats", type=_positive, help="of each measurement (default: 5; quick: 2)")
    made.add_argument("--batch-sizes", type=_sizes, metavar="A,B,…", help="for one process and, from 2 on, for two "
                      "(default: 1,32,200,1000,8192 and 32,200,1000,2000,8192)")
    made.add_argument("--rows", type=_names, metavar="A,B,…", help=f"some of {', '.join(rows.BY_NAME)} (default: all)")
    made.add_argument("--compile", choices=("auto", "on", "off", "fused"), default="on", help="of ours (default: on)")
    made.add_argument("--output", metavar="STEM", help="write STEM.json, STEM.md and STEM.png (default: "
                      "benchmarks/results/ and the name of the processor or GPU)")
    made.add_argument("--report", metavar="FILE.json", help="measure nothing: report again on this file")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _sizes(text: str) -> list[int]:
    return sorted({_positive(word) for word in text.split(",")})


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in rows.BY_NAME]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(rows.BY_NAME)}")
    return names


def write_json(record: dict[str, Any], stem: Path) -> None:
    """The record, whole or not at all."""
    written = stem.with_name(stem.name + ".json.part")
    written.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(written, stem.with_name(stem.name + ".json"))


def write_report(record: dict[str, Any], stem: Path) -> None:
    """Print the Markdown, and write it and the picture."""
    from benchmarks.picture import draw

    text = report.markdown(record)
    print(text)
    stem.with_name(stem.name + ".md").write_text(text.rstrip() + "\n")
    draw(record, stem.with_name(stem.name + ".png"))


def run(args: argparse.Namespace, words: Sequence[str], scratch: Path) -> tuple[dict[str, Any], Path]:
    """Measure everything that was asked for; the record, and the stem of its files."""
    from benchmarks.machine import describe, slug
    from benchmarks.measure import measure, run_all, torchvision_root

    sizes = rows.QUICK_BATCH_SIZES if args.quick else rows.BATCH_SIZES
    if args.batch_sizes:
        sizes = {count: [size for size in args.batch_sizes if size >= count] for count in sizes}
    machine = describe()
    chosen = [row for row in rows.ROWS if (args.rows is None or row.name in args.rows)
              and (machine["gpus"] or not row.needs_gpu)]
    repeats = args.repeats or (2 if args.quick else 5)
    stem = Path(args.output or RESULTS / (slug(machine) + ("-quick" if args.quick else "")))
    stem.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks", *words]), "date": time.strftime("%Y-%m-%d"),
        "settings": {"quick": args.quick, "repeats": repeats, "batch_sizes": sizes, "compile": args.compile},
        "machine": machine, "measurements": [],
    }
    root = torchvision_root(args.data_dir, scratch / "data")

    def measure_row(row: rows.Row, batch_size: int) -> dict[str, Any]:
        return measure(row, root, batch_size, rows.num_samples(batch_size, args.quick), args.compile, scratch)

    def keep(measurement: dict[str, Any]) -> None:
        record["measurements"].append(measurement)
        write_json(record, stem)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the measured processes are ended too
    try:
        run_all(rows.schedule(chosen, sizes, repeats), measure_row, keep,
                lambda text: print(text, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("interrupted: a report on what was measured", file=sys.stderr)
    return record, stem


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report, or report again."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    if args.report:
        path = Path(args.report)
        record, stem = json.loads(path.read_bytes()), Path(args.output or path.with_suffix(""))
    else:
        try:
            with tempfile.TemporaryDirectory(prefix="mnist-dist-benchmark-") as scratch:
                record, stem = run(args, words, Path(scratch))
        except UserError as error:
            print(f"benchmarks: error: {error}", file=sys.stderr)
            return 2
    if not record["measurements"]:
        return 1
    write_report(record, stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
