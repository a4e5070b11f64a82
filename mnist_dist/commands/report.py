"""`mnist-dist report`: draws a study's report again, or compares two studies, with an exit status for CI."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_dist.disk.files import real, replace_synced
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.options import Parser, percent, reader
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.study.plan.grid import HoldOut
from mnist_dist.study.plan.table import JSONL, hold_out_of, read_table
from mnist_dist.text import cause, whole

if TYPE_CHECKING:  # the command line needs no numpy
    from mnist_dist.study.analysis.comparison import Comparison

# exceptions from a table that was edited by hand: only the fields that a report uses are checked
NOT_OF_A_STUDY = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("folders", metavar="STUDY_DIR", nargs="+", help="folder of a study; with two, the second is "
                        "compared with the first")
    add_hold_out(parser)
    parser.add_argument("--fail-if-slower", metavar="PERCENT", type=reader(percent), help="with two studies: exit "
                        "status 1 if the second is shown to be slower by more than this, as in 5%%, in any cell")
    parser.add_argument("--junit", metavar="FILE", help="with --fail-if-slower: write a test for each cell in JUnit's "
                        "format")


def add_hold_out(parser: Parser) -> None:
    """Add --hold-out, which a study has too."""
    parser.add_argument("--hold-out", metavar="WHAT", type=reader(hold_out), help="cells to leave out of the fit of "
                        "the model of the step time, as a check of it: processes=N, batch-size=N, or both separated by "
                        "a comma (default: the most processes)")


def hold_out(text: str) -> HoldOut:
    """The cells that `--hold-out` names. Raises `ValueError`."""
    names = {"processes": "processes", "batch-size": "global_batch_size"}
    values = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        number = whole(value)
        if name not in names or number is None:
            raise ValueError("processes=N, batch-size=N, or both separated by a comma")
        values[names[name]] = number
    return HoldOut(values)


def need_statistics() -> None:
    """Raises `UserError` if scipy is missing, before anything is run."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("a study needs scipy for its intervals: pip install -e '.[study]'")


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Draw the report of a study again, or compare two studies; returns the exit status. Raises `UserError`."""
    folders = [real(Path(folder)) for folder in args.folders]
    if len(folders) > 2:
        raise UserError(f"report takes one study or two, got {len(folders)} folders: name one or two")
    limit = args.fail_if_slower
    if limit is not None and len(folders) != 2:
        raise UserError("--fail-if-slower compares two studies, got one folder: name the baseline and the study")
    if args.junit is not None and limit is None:
        raise UserError(f"--junit {args.junit} is for --fail-if-slower: add it, or drop this")
    need_statistics()
    from mnist_dist.study.report.comparison import write_comparison
    from mnist_dist.study.report.report import write_report

    tables = [read_table(folder) for folder in folders]

    try:
        if len(folders) == 1:
            written = write_report(folders[0], tables[0], args.hold_out or hold_out_of(tables[0]))
        else:
            written, comparison = write_comparison((folders[0], tables[0]), (folders[1], tables[1]))
    except OSError as error:
        raise UserError(f"{folders[-1]} cannot be written ({error.strerror}): copy the study, and name the copy"
                        ) from None
    except NOT_OF_A_STUDY as error:
        raise UserError(f"{' or '.join(str(folder / JSONL) for folder in folders)} holds what no study writes "
                        f"({cause(error)}): run the study again, which makes it from its runs"
                        ) from error
    say(f"written: {', '.join(map(str, written))}")
    return 0 if limit is None else _gate(comparison, limit, [folder.resolve().name for folder in folders], args.junit)


def _gate(comparison: Comparison, limit: float, names: Sequence[str], file: str | None) -> int:
    """Say whether the second study is too slow; returns the exit status. Raises `UserError`."""
    from mnist_dist.study.report import baseline

    if not comparison.differences:
        raise UserError(f"{names[0]} and {names[1]} have no cell in common: nothing can be compared")
    for line in baseline.lines(comparison, limit):
        say(line)
    if file is not None:
        try:
            replace_synced(Path(file), baseline.junit(comparison, limit, f"{names[1]} against {names[0]}").encode())
        except OSError as error:
            raise UserError(f"--junit {file} cannot be written ({error.strerror}): name another file") from None
    is_slower = any(baseline.is_slower(difference, limit) for difference in comparison.differences)
    return MnistDistError.exit_status if is_slower else 0
