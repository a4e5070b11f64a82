"""`mnist-dist reproduce`: the tutorial's two trainings beside its numbers (its steps 4 and 6), and their speeds.

Each training is a run of `mnist-dist train` in a new process, read back from its `result.json`. A run that is
whole already is not run again. Writes `report.md` and the prediction grid.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist import runner
from mnist_dist.commands.shared import check_alone, data_config, typed_options, writing_to
from mnist_dist.config import flag_of
from mnist_dist.disk.files import read_limited, real, replace_synced
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.options import SHARED, Parser, add_training
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.stop_signals import interrupting
from mnist_dist.record.result import RunResult, read_result
from mnist_dist.record.run_folder import RESULT
from mnist_dist.tables import table


class Protocol(NamedTuple):
    """One of the tutorial's trainings, with its numbers."""

    folder: str
    title: str
    options: tuple[str, ...]
    tutorial_seconds: float  # train + test, per epoch, on the author's GPU
    tutorial_nll_sums: Mapping[int, float]  # epoch to the sum of the test NLL over 10,000 images
    reference: Mapping[int, tuple[float, float]]  # mean and deviation of independent runs in plain PyTorch


PROTOCOLS = (
    Protocol(
        "batch-1", "one sample at a time, in file order", ("--batch-size=1", "--no-shuffle", "--epochs=3"),
        110.0, {0: 2077.4, 1: 1488.8, 2: 1271.0},
        {0: (2001, 63), 1: (1545, 20), 2: (1498, 43)},
    ),
    Protocol(
        "batch-200", "mini-batches of 200, shuffled", ("--batch-size=200", "--epochs=20"), 5.28,
        {1: 3416.8, 6: 2425.9, 11: 1816.4, 16: 1435.5},
        {1: (3435, 30), 6: (2445, 45), 11: (1855, 34), 16: (1440, 29)},
    ),
)


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--output-dir", metavar="DIR", help="folder for both runs and the report (default: "
                        "runs/reproduce-<time>)")
    add_training(parser, (*SHARED, "wandb"))


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Train both protocols; returns the exit status. Raises `MnistDistError`."""
    data_config(args)  # for its errors, before anything is trained
    check_alone(args, launch)
    options = {name: value for name, value in typed_options(args).items() if name != "output_dir"}
    with interrupting():
        reproduce(options, output_dir=args.output_dir)
    return 0


def reproduce(options: Mapping[str, Any], output_dir: str | None) -> None:
    """Run both protocols with these options of training, print and write the report. Raises `MnistDistError`."""
    root = real(Path(output_dir or f"runs/reproduce-{time.strftime('%Y%m%d-%H%M%S')}"))
    results: list[RunResult] = []
    for protocol in PROTOCOLS:
        results.append(run_protocol(protocol, root / protocol.folder, options))
        # the next training has the same kind of step, so that the ratio of their speeds is that of the batch sizes
        options = {"compile": "on" if results[0].environment.step == "compiled" else "off", **options}
    report = "\n".join(report_lines(results))
    with writing_to(root):
        replace_synced(root / "report.md", (report + "\n").encode())
        replace_synced(root / "predictions.png", read_limited(root / "batch-200" / "predictions.png"))
    say(f"\n{report}\n\nwritten: {root / 'report.md'}, {root / 'predictions.png'}")


def run_protocol(protocol: Protocol, folder: Path, options: Mapping[str, Any]) -> RunResult:
    """The result of one protocol, run in a fresh process unless it is there already. Raises `MnistDistError`."""
    if (folder / RESULT).exists():
        return read_result(folder)
    say(f"\n{protocol.title}:")
    words = [*protocol.options, "--resume"]
    words += [f"{flag_of(name)}={value}" for name, value in options.items()]
    outcome = runner.train(words, folder, show=True)
    if outcome.result is None or outcome.status:
        error = UserError if outcome.status == 2 else MnistDistError
        raise error(f"the training with {protocol.title} ended with {outcome.note}: correct the error above, and start "
                    f"again with --output-dir {folder.parent} to go on from here")
    return outcome.result


def report_lines(results: Sequence[RunResult]) -> list[str]:
    """The report as Markdown: a table for each protocol, then the ratio of their speeds."""
    environment, dataset = results[0].environment, results[0].dataset["name"]
    lines = ["# The tutorial, reproduced", ""]
    if dataset != "mnist":
        lines += [f"**Trained on {dataset}, not MNIST: the numbers are not to be compared.**", ""]
    lines += [f"{dataset}, {environment.device_name} ({environment.device}), torch {environment.torch}, "
              f"accelerate {environment.accelerate}, seed {results[0].config['seed']}. NLL sums are over the "
              f"{results[0].dataset['test']:,} test images, in nats; 'reference' is the mean ± deviation of "
              "independent runs in plain PyTorch.", ""]
    for protocol, result in zip(PROTOCOLS, results, strict=True):
        lines += protocol_lines(protocol, result)
    ours = [result.summary.samples_per_second for result in results]
    theirs = PROTOCOLS[0].tutorial_seconds / PROTOCOLS[1].tutorial_seconds
    if ours[0] and ours[1]:
        lines.append(f"An epoch in mini-batches of 200 trains {ours[1] / ours[0]:.0f} times as fast as one sample at a "
                     f"time ({ours[1]:,.0f} against {ours[0]:,.0f} samples/s); in the tutorial {theirs:.0f} times.")
    return lines


def protocol_lines(protocol: Protocol, result: RunResult) -> list[str]:
    """One protocol's table."""
    lines = []
    steps_per_epoch = -(-result.dataset["train"] // result.summary.global_batch_size)
    for record in result.epochs:
        epoch = record.epoch
        cut = record.step < (epoch + 1) * steps_per_epoch
        shown = epoch in protocol.tutorial_nll_sums or record is result.epochs[-1]
        if not shown:
            continue
        theirs, reference, seconds = "-", "-", "-"
        if epoch in protocol.reference and not cut:
            mean, deviation = protocol.reference[epoch]
            theirs, reference = f"{protocol.tutorial_nll_sums[epoch]}", f"{mean} ± {deviation}"
            seconds = f"{protocol.tutorial_seconds}"
        lines.append([f"{epoch}{f' (cut at step {record.step})' if cut else ''}", f"{record.test_nll_sum:.1f}", theirs,
                      reference, f"{100 * record.test_accuracy:.2f} %", f"{record.epoch_seconds:.2f}", seconds])
    head = ("epoch", "test NLL sum: ours", "tutorial", "reference", "accuracy", "seconds per epoch: ours", "tutorial")
    return [f"## {protocol.title[0].upper()}{protocol.title[1:]}", "", *table(head, lines)]
