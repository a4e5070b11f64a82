"""`mnist-dist study`: its options, checked and made a `Request`.

In one file, because half of it is the list of options, and the other half says which of them exclude each other.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mnist_dist.commands.report import add_hold_out, need_statistics
from mnist_dist.commands.shared import check_alone, typed_options
from mnist_dist.config import TrainConfig, checked, flag_of
from mnist_dist.errors import UserError
from mnist_dist.options import (
    Parser,
    add_training,
    duration,
    percent,
    reader,
    seconds,
    several,
    shell_words,
    typed,
    whole_from,
)
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.stop_signals import interrupting
from mnist_dist.record.config_file import from_environment
from mnist_dist.study.plan.grid import (
    ENVIRONMENT,
    FIRST_REPEATS,
    LAUNCHERS,
    RATE_AT,
    RATE_OF,
    SCALINGS,
    Cell,
    Grid,
    arguments_of,
)
from mnist_dist.study.plan.quick import OPTIONS as OPTIONS_OF_QUICK
from mnist_dist.study.plan.table import SAMPLES
from mnist_dist.study.run.launches import Machine, look_at_machine
from mnist_dist.study.run.printed_rate import Printed, pattern_of, read_unit
from mnist_dist.study.run.program import Program, check_command, read_axes
from mnist_dist.study.run.request import Request
from mnist_dist.study.run.study import print_scripts, run_study
from mnist_dist.text import cut, without_passwords

OPTIONS = {option.name: option for option in fields(TrainConfig)}
NOT_IN_STUDY = ("batch_size", "per_device_batch_size", "output_dir", "resume", "run_name", "quiet")  # set for each run
TRACKING = ("wandb", "wandb_project", "wandb_group", "tags")  # of the study too; another script does not get them
# what the study sets for each run, or what says where a run is
NOT_AN_AXIS = ("batch_size", "per_device_batch_size", "output_dir", "resume", "run_name", "seed", *TRACKING)


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("--batch-sizes", metavar="N,N", type=reader(several(whole_from(1))), help="global batch sizes "
                        "(under --scaling weak: per process) (default 200)")
    parser.add_argument("--processes", metavar="N,N", type=reader(several(whole_from(1, 65_536))), help="numbers of "
                        "processes (default 1)")
    parser.add_argument("--scaling", metavar="{strong,weak}", type=reader(scalings), help="strong = a batch "
                        "size is global; weak = per process; or both: strong,weak (default strong)")
    parser.add_argument("--repeats", metavar="N", type=reader(whole_from(1, 1_000)), help="runs of each cell (default "
                        "5)")
    parser.add_argument("--precision", metavar="PERCENT", type=typed(percent), help="instead of --repeats: 6 runs of "
                        "each cell, then more of those whose throughput is not known to this yet, as in 3%%")
    parser.add_argument("--budget", metavar="TIME", type=typed(duration), help="start no run that would end later, as "
                        "30min; counts the seconds of all runs in the study's folder")
    parser.add_argument("--quick", action="store_true", help="choose the grid, from a first look at this machine, and "
                        "end within ten minutes: throughput, samples to a target, and the batch size that serves best")
    parser.add_argument("--output-dir", metavar="DIR", default="studies/study", help="folder of the study (default "
                        "studies/study)")
    parser.add_argument("--script", metavar="FILE", help="study another training: it takes --batch-size and "
                        "--output-dir, and leaves a result.json (docs/your-training.md); words after -- go to it")
    parser.add_argument("--command", metavar="WORDS", dest="command_line", help="study any program: its command, with "
                        "{batch_size}, {processes}, {output_dir}, {options}, {seed} and the names of axes; words after "
                        "-- are in {options}")
    parser.add_argument("--rate-from", metavar="REGEX", type=typed(pattern_of), help=r"take the rate from what the "
                        r"program prints; the group is the number, as in 'tok/sec: ([\d,.]+)'")
    parser.add_argument("--rate-at", choices=RATE_AT, help="which matches: all, without those of the warm-up; or the "
                        "one at the end (default all)")
    parser.add_argument("--rate-of", choices=RATE_OF, help="whether the rate is that of all processes, or of each "
                        "process (default all)")
    parser.add_argument("--unit", metavar="UNIT[=N]", type=typed(read_unit), help="what the rate counts, and how many "
                        "a sample has, as tokens=2048 (default samples)")
    parser.add_argument("--axis", metavar="NAME=A,B", action="append", help="a further axis: values of --NAME, of "
                        "{NAME} in --command, or of the environment variable NAME as env:NAME=A,B; with commas in the "
                        "values, as 'NAME=A;B'")
    parser.add_argument("--cell-timeout", metavar="SECONDS", type=reader(seconds), default=3600.0, help="end a run "
                        "that takes longer (default 3600)")
    parser.add_argument("--launcher", choices=(*LAUNCHERS,), default="torch", help="what starts a run: torch, on this "
                        "machine; slurm, as tasks of job arrays, many at a time; ray, on its cluster (default torch)")
    parser.add_argument("--sbatch", metavar="OPTIONS", type=reader(shell_words), default=(), help="with --launcher "
                        "slurm: options of sbatch, as --sbatch='--partition=gpu --gpus-per-task=1'")
    parser.add_argument("--print", action="store_true", help="with --launcher slurm: print the scripts, and submit "
                        "nothing")
    parser.add_argument("--oversubscribe", action="store_true", help="also more processes than cores")
    parser.add_argument("--order-seed", metavar="N", type=reader(whole_from(0)), default=0, help="seed of the runs' "
                        "random order (default 0)")
    add_hold_out(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its time, and start nothing")
    add_training(parser, [option.name for option in fields(TrainConfig) if option.name not in NOT_IN_STUDY])


def scalings(text: str) -> tuple[str, ...]:
    """Reads one or both kinds of scaling."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(kinds) <= set(SCALINGS):
        raise ValueError("strong, weak, or strong,weak")
    return kinds


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Run, continue or print a study; returns the exit status. Raises `MnistDistError`."""
    check_alone(args, launch)
    with interrupting():
        request = request_from(args, argv)
        need_statistics()
        machine = look_at_machine(launch.use_cpu) if args.launcher == "torch" else Machine(0, 0, args.launcher)
        if args.print:
            print_scripts(request, machine)
            return 0
        return run_study(request, machine, dry_run=args.dry_run)


def request_from(args: argparse.Namespace, argv: Sequence[str]) -> Request:
    """What the command line asks for. Raises `UserError`."""
    training = {name: value for name, value in typed_options(args).items() if name != "output_dir"}
    program = Program(args.script, args.command_line, _printed(args))
    _refuse_conflicts(args, program)
    if args.quick:
        for name, value in OPTIONS_OF_QUICK.items():
            training.setdefault(name, value)
    grid = Grid(batch_sizes=args.batch_sizes or (200,), processes=args.processes or (1,),
                scaling=args.scaling or ("strong",), axes=_axes(args, program, training),
                repeats=FIRST_REPEATS if args.precision else args.repeats or 5)
    if program.command is not None:
        check_command(program.command, grid, needs_folder=program.printed is None)
    folder, rest = Path(args.output_dir), tuple(args.rest)
    of_study = {"wandb_group": folder.resolve().name}
    tracking = {name: value for name, value in training.items() if name in TRACKING}
    fixed = {flag_of(name): without_passwords(value) if isinstance(value, str) else value
             for name, value in training.items() if name not in TRACKING}
    if args.launcher != "torch":
        fixed["--launcher"] = args.launcher
    if program.is_ours:
        TrainConfig(**training)  # an option that is wrong for every cell is an error
        # on nodes without data and without a network "auto" would train on the embedded digits, unseen
        of_jobs = {"dataset": "mnist"} if args.launcher != "torch" else {}
        words = {"checkpoint_every": "never", **of_study, **of_jobs, **training}
    else:
        words = {name: value for name, value in training.items() if name not in TRACKING}
    return Request(
        grid=grid, folder=folder, options=(*(_word(name, value) for name, value in words.items()), *rest),
        fixed={**fixed, **({"--": list(rest)} if rest else {})}, program=program, hold_out=args.hold_out,
        command=without_passwords(shlex.join(["mnist-dist", *argv])), seed=args.order_seed,
        cell_timeout=args.cell_timeout, oversubscribe=args.oversubscribe, quick=args.quick,
        precision=None if args.precision is None else percent(args.precision.strip()),
        seconds=math.inf if args.budget is None else duration(args.budget.strip()), sbatch=args.sbatch,
        tracking=TrainConfig(**{**of_study, **from_environment("wandb_project", "tags"), **tracking}),
        check=_check(training) if program.is_ours else lambda cell: None,
    )


def _refuse_conflicts(args: argparse.Namespace, program: Program) -> None:
    """Raises `UserError` if two options say different things."""
    if args.quick:
        _refuse_beside_quick(args)
    if program.script is not None and program.command is not None:
        raise UserError(f"--script {program.script} and --command say two things: give one of them")
    if args.launcher != "torch" and (args.quick or program.script is not None):
        raise UserError(f"--launcher {args.launcher} is for mnist-dist's own training or a --command, got "
                        f"{'--quick' if args.quick else f'--script {program.script}'}: drop one of the two")
    if args.launcher != "slurm" and (args.sbatch or args.print):
        raise UserError(f"{'--sbatch' if args.sbatch else '--print'} is for --launcher slurm: add it, or drop this")
    if args.precision is not None and args.repeats is not None:
        raise UserError(f"--precision {args.precision} chooses the repeats, got --repeats {args.repeats}: drop one of "
                        "the two")
    if args.budget is not None and args.launcher == "slurm":
        raise UserError(f"--budget {args.budget} is for runs one at a time, and --launcher slurm starts many: limit "
                        "each with --sbatch='--time=00:20:00'")
    if program.is_ours and args.rest:
        raise UserError(f"words after -- are for a --script or a --command, got {shlex.join(args.rest)}: drop them, "
                        "or name one of the two")
    if program.script is not None and not Path(program.script).is_file():
        raise UserError(f"--script {program.script} is not a file: name the training to study")


def _refuse_beside_quick(args: argparse.Namespace) -> None:
    """Raises `UserError` if the command line says what `--quick` chooses."""
    names = ("batch_sizes", "processes", "scaling", "repeats", "precision", "budget", "script", "axis", "command_line")
    for name in names:
        if (value := getattr(args, name)) is not None:
            flag = "--command" if name == "command_line" else flag_of(name)
            text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else value
            raise UserError(f"--quick chooses the grid by itself, got {flag} {text}: drop one of the two")


def _printed(args: argparse.Namespace) -> Printed | None:
    """What `--rate-from` and its companions say. Raises `UserError`."""
    if args.rate_from is None:
        for name in ("rate_at", "rate_of", "unit"):
            if getattr(args, name) is not None:
                raise UserError(f"{flag_of(name)} {getattr(args, name)} is for --rate-from: add it, or drop this")
        return None
    if args.script is None and args.command_line is None:
        raise UserError(f"--rate-from {cut(args.rate_from)!r} is for a --command or a --script: name one of them")
    return Printed(args.rate_from, args.rate_at or RATE_AT[0], args.rate_of or RATE_OF[0],
                   *read_unit((args.unit or SAMPLES).strip()))


def _axes(args: argparse.Namespace, program: Program, training: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The values of each further axis, each once: those of our training checked and in one spelling; another program
    checks its values itself. Raises `UserError`.
    """
    axes: dict[str, tuple[str, ...]] = {}
    for name, values in read_axes(args.axis or ()).items():
        option = _axis(name, program)
        if option in axes:
            raise UserError(f"--axis {name} is an axis already: give its values once")
        is_option = program.is_ours and not name.startswith(ENVIRONMENT)
        axes[option] = tuple(dict.fromkeys(_spelling(option, value) for value in values)) if is_option else values
    for option in axes:
        if option in training:
            raise UserError(f"{flag_of(option)} {training[option]} and an axis of it say two things: give one of them")
    return axes


def _spelling(option: str, text: str) -> str:
    """A value of an option of training, in one spelling. Raises `UserError`."""
    value = checked(OPTIONS[option], text)
    return "none" if value is None else str(value)


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


def _check(training: Mapping[str, Any]) -> Callable[[Cell], None]:
    def check(cell: Cell) -> None:
        config = TrainConfig(**{**training, **arguments_of(cell), "batch_size": cell.global_batch_size})
        config.global_batch_size(cell.processes)

    return check


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return flag_of(name) if value else flag_of(f"no_{name}")
    return f"{flag_of(name)}={value}"
