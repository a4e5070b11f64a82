"""`mnist-dist study` and `mnist-dist report`: their options, checked."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mnist_dist.config import TrainConfig, checked, flag_of
from mnist_dist.disk.files import real, replace_synced
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.output import say
from mnist_dist.processes.launch_environment import read_launch
from mnist_dist.record.config_file import from_environment
from mnist_dist.study.plan.grid import (
    AXES,
    ENVIRONMENT,
    FIRST_REPEATS,
    RATE_AT,
    RATE_OF,
    SCALINGS,
    Cell,
    Grid,
    HoldOut,
    arguments_of,
)
from mnist_dist.study.plan.quick import OPTIONS as OPTIONS_OF_QUICK
from mnist_dist.study.plan.table import JSONL, SAMPLES, hold_out_of, read_table
from mnist_dist.study.run.launches import Machine, look_at_machine
from mnist_dist.study.run.printed_rate import Printed, pattern_of, read_unit
from mnist_dist.study.run.program import Program, check_command, read_axes
from mnist_dist.study.run.request import Request
from mnist_dist.study.run.study import print_scripts, run_study
from mnist_dist.text import cause, cut, whole, without_passwords

if TYPE_CHECKING:  # the command line needs no numpy
    from mnist_dist.study.analysis.cells import Comparison

T = TypeVar("T")
TRACKING = ("wandb", "wandb_project", "wandb_group", "tags")  # of the study too; another script does not get them
# what a report raises of a table that somebody has changed: it checks the fields that it computes with, and no others
NOT_OF_A_STUDY = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
OPTIONS = {option.name: option for option in fields(TrainConfig)}
# what the study sets for each run, or what says where a run is
NOT_AN_AXIS = ("batch_size", "per_device_batch_size", "output_dir", "resume", "run_name", "seed", *TRACKING)


def need_statistics() -> None:
    """Raises `UserError` if scipy is missing, before anything is run."""
    if importlib.util.find_spec("scipy") is None:
        raise UserError("a study needs scipy for its intervals: pip install -e '.[study]'")


def study(given: argparse.Namespace, argv: Sequence[str]) -> int:
    """Run, continue or print a study; returns the exit status. Raises `MnistDistError`."""
    request = request_from(given, argv)
    need_statistics()
    machine = look_at_machine(read_launch().use_cpu) if given.launcher == "torch" else Machine(0, 0, given.launcher)
    if given.print:
        print_scripts(request, machine)
        return 0
    return run_study(request, machine, dry_run=given.dry_run)


def report(given: argparse.Namespace) -> int:
    """Draw the report of a study again, or compare two studies; returns the exit status. Raises `UserError`."""
    folders = [real(Path(folder)) for folder in given.folders]
    if len(folders) > 2:
        raise UserError(f"report takes one study or two, got {len(folders)} folders: name one or two")
    limit = None if given.fail_if_slower is None else _one("--fail-if-slower", given.fail_if_slower, _percent)
    if limit is not None and len(folders) != 2:
        raise UserError("--fail-if-slower compares two studies, got one folder: name the baseline and the study")
    if given.junit is not None and limit is None:
        raise UserError(f"--junit {given.junit} is for --fail-if-slower: add it, or drop this")
    need_statistics()
    tables = [read_table(folder) for folder in folders]
    from mnist_dist.study.report.report import write_comparison, write_report

    try:
        if len(folders) == 1:
            named = hold_out(given.hold_out)
            written = write_report(folders[0], tables[0], hold_out_of(tables[0]) if named is None else named)
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
    return 0 if limit is None else _gate(comparison, limit, [folder.resolve().name for folder in folders], given.junit)


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
    return MnistDistError.exit_status if any(baseline.is_slower(one, limit) for one in comparison.differences) else 0


def hold_out(text: str | None) -> HoldOut | None:
    """The cells that `--hold-out` names. Raises `UserError`."""
    if text is None:
        return None
    names = {"processes": "processes", "batch-size": "global_batch_size"}
    values = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        number = whole(value)
        if name not in names or number is None:
            raise UserError("--hold-out must be processes=N, batch-size=N, or both separated by a comma, got "
                            f"{cut(text)!r}")
        values[names[name]] = number
    return HoldOut(values)


def request_from(given: argparse.Namespace, argv: Sequence[str]) -> Request:
    """What the command line asks for. Raises `UserError`."""
    training = {name: value for name, value in vars(given).items() if name in OPTIONS and name != "output_dir"}
    if given.quick:
        _take_quick(given, training)
    program, rest = Program(given.script, given.command_line, _printed(given)), tuple(given.rest)
    script = program.script
    if script is not None and program.command is not None:
        raise UserError(f"--script {script} and --command say two things: give one of them")
    if given.launcher != "torch" and (given.quick or script is not None):
        raise UserError(f"--launcher {given.launcher} is for mnist-dist's own training or a --command, got "
                        f"{'--quick' if given.quick else f'--script {script}'}: drop one of the two")
    if given.launcher != "slurm" and (given.sbatch or given.print):
        raise UserError(f"{'--sbatch' if given.sbatch else '--print'} is for --launcher slurm: add it, or drop this")
    if given.precision is not None and given.repeats is not None:
        raise UserError(f"--precision {given.precision} chooses the repeats, got --repeats {given.repeats}: drop one "
                        "of the two")
    if given.budget is not None and given.launcher == "slurm":
        raise UserError(f"--budget {given.budget} is for runs one at a time, and --launcher slurm starts many: limit "
                        "each with --sbatch='--time=00:20:00'")
    if program.is_ours and rest:
        raise UserError(f"words after -- are for a --script or a --command, got {shlex.join(rest)}: drop them, or name "
                        "one of the two")
    if script is not None and not Path(script).is_file():
        raise UserError(f"--script {script} is not a file: name the training to study")
    axes = {option: _list(flag_of(axis), getattr(given, axis), _of_training(option, program))
            for axis, option in AXES.items() if getattr(given, axis) is not None}
    for name, values in read_axes(given.axis or ()).items():
        option = _axis(name, program)
        if option in axes:
            raise UserError(f"--axis {name} is an axis already: give its values once")
        if program.is_ours and not name.startswith(ENVIRONMENT):
            values = tuple(dict.fromkeys(_one(f"--axis {name}", value, _of_training(option, program))
                                         for value in values))
        axes[option] = values
    for option in axes:
        if option in training:
            raise UserError(f"{flag_of(option)} {training[option]} and an axis of it say two things: give one of them")

    def of_grid(name: str, default: str) -> str:
        return default if getattr(given, name) is None else str(getattr(given, name))

    grid = Grid(
        batch_sizes=_list("--batch-sizes", of_grid("batch_sizes", "200"), _whole(1)),
        processes=_list("--processes", of_grid("processes", "1"), _whole(1, 65_536)),
        scaling=_list("--scaling", of_grid("scaling", "strong"), _scaling),
        repeats=_one("--repeats", of_grid("repeats", "5"), _whole(1, 1_000)), axes=axes,
    )
    precision = None if given.precision is None else _one("--precision", given.precision, _percent)
    if precision is not None:
        grid = replace(grid, repeats=FIRST_REPEATS)
    if program.command is not None:
        check_command(program.command, grid, needs_folder=program.printed is None)
    folder = Path(given.output_dir)
    group = folder.resolve().name
    tracking = {name: training.pop(name) for name in TRACKING if not program.is_ours and name in training}
    fixed = {flag_of(name): without_passwords(value) if isinstance(value, str) else value
             for name, value in training.items() if name not in TRACKING}
    if given.launcher != "torch":
        fixed["--launcher"] = given.launcher
    words = [_word(name, value) for name, value in training.items()]
    if program.is_ours:
        TrainConfig(**training)  # what is wrong for every cell is an error
        # on nodes without data and without a network "auto" would train on the embedded digits, unseen
        of_jobs = {"dataset": "mnist"} if given.launcher != "torch" else {}
        for name, value in {"checkpoint_every": "never", "wandb_group": group, **of_jobs}.items():
            if name not in training:
                words.append(_word(name, value))
        tracking = {name: training[name] for name in TRACKING if name in training}
    return Request(
        grid=grid, folder=folder, options=(*words, *rest), fixed={**fixed, **({"--": list(rest)} if rest else {})},
        program=program, hold_out=hold_out(given.hold_out),
        command=without_passwords(shlex.join(["mnist-dist", *argv])),
        seed=_one("--order-seed", given.order_seed, _whole(0)),
        cell_timeout=_one("--cell-timeout", given.cell_timeout, _seconds), oversubscribe=given.oversubscribe,
        quick=given.quick, precision=precision,
        seconds=math.inf if given.budget is None else _one("--budget", given.budget, _duration),
        sbatch=_one("--sbatch", given.sbatch, _shell_words),
        tracking=TrainConfig(**{"wandb_group": group, **from_environment("wandb_project", "tags"), **tracking}),
        check=_check(training) if program.is_ours else lambda cell: None,
    )


def _printed(given: argparse.Namespace) -> Printed | None:
    """What `--rate-from` and its companions say. Raises `UserError`."""
    if given.rate_from is None:
        for name in ("rate_at", "rate_of", "unit"):
            if getattr(given, name) is not None:
                raise UserError(f"{flag_of(name)} {getattr(given, name)} is for --rate-from: add it, or drop this")
        return None
    if given.script is None and given.command_line is None:
        raise UserError(f"--rate-from {cut(given.rate_from)!r} is for a --command or a --script: name one of them")
    _one("--rate-from", given.rate_from, pattern_of)
    unit, units_per_sample = _one("--unit", given.unit or SAMPLES, read_unit)
    return Printed(given.rate_from, given.rate_at or RATE_AT[0], given.rate_of or RATE_OF[0], unit, units_per_sample)


def _take_quick(given: argparse.Namespace, training: dict[str, Any]) -> None:
    """Add what `--quick` sets to the options of training. Raises `UserError` if the command line says it too."""
    for name in ("batch_sizes", "processes", "scaling", "repeats", "precision", "budget", "script", "axis",
                 "command_line", *AXES):
        if getattr(given, name) is not None:
            flag = "--command" if name == "command_line" else flag_of(name)
            raise UserError(f"--quick chooses the grid by itself, got {flag} {getattr(given, name)}: drop one of the "
                            "two")
    for name, value in OPTIONS_OF_QUICK.items():
        training.setdefault(name, value)


def _check(training: Mapping[str, Any]) -> Callable[[Cell], None]:
    def check(cell: Cell) -> None:
        config = TrainConfig(**{**training, **arguments_of(cell), "batch_size": cell.global_batch_size})
        config.global_batch_size(cell.processes)

    return check


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    return f"{flag_of(name)}={value}"


def _list(flag: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """`text`, separated by commas, each value once. Raises `UserError` naming the flag."""
    return tuple(dict.fromkeys(_one(flag, part, read) for part in text.split(",")))


def _one(flag: str, text: str, read: Callable[[str], T]) -> T:
    try:
        return read(text.strip())
    except ValueError as error:
        raise UserError(f"{flag} must be {error}, got {cut(text)!r}") from None


def _whole(minimum: int, maximum: int = 10**18) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = whole(text)
        if number is None or not minimum <= number <= maximum:
            limits = f"at least {minimum}" if maximum == 10**18 else f"from {minimum} to {maximum:,}"
            raise ValueError(f"a whole number {limits}, or some of these separated by commas")
        return number

    return read


def _shell_words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError:  # a quotation mark without its twin
        raise ValueError("options of sbatch as a shell reads them, with every quotation closed") from None


def _scaling(text: str) -> str:
    if text not in SCALINGS:
        raise ValueError("strong, weak, or strong,weak")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError("a number of seconds above 0")
    return value


def _duration(text: str) -> float:
    """`90s`, `30min` or `2h` in seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(s|min|h)", text, re.ASCII)
    if match is None or not float(match[1]):
        raise ValueError("a time above 0 with its unit, as in 90s, 30min or 2h")
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def _percent(text: str) -> float:
    """`5%` or `5 %` as 0.05."""
    number = text.removesuffix("%").strip()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not text.endswith("%") or not 0 < value < 100:
        raise ValueError("a percentage above 0 and below 100, as in 3%")
    return value / 100


def _axis(name: str, program: Program) -> str:
    """The name under which an axis is kept: of our own training, that of its option. Raises `UserError`."""
    option = name.replace("-", "_")
    if not program.is_ours or name.startswith(ENVIRONMENT):
        return name
    if option not in OPTIONS or option in NOT_AN_AXIS:
        raise UserError(f"--axis {cut(name)} is no option of training that a study can vary: "
                        f"{', '.join(flag_of(known)[2:] for known in OPTIONS if known not in NOT_AN_AXIS)}, or "
                        "env:NAME for an environment variable")
    return option


def _of_training(option: str, program: Program) -> Callable[[str], str]:
    """Values of an axis: for our training checked and in one spelling; another script checks its own."""
    def read(text: str) -> str:
        if not text:
            raise ValueError("values separated by commas")
        return str(checked(OPTIONS[option], text)) if program.is_ours else text

    return read
