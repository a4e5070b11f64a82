"""The command line. Flags of training are generated from `TrainConfig`; a command's module is imported when it runs.

Every expected failure is one line on standard error and an exit status: 2 the command line or the data is wrong,
3 training diverged, 130 and 143 a signal, 1 anything else. `mnist-dist --help` imports no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from mnist_dist import __version__
from mnist_dist.config import HEADINGS, TrainConfig, flag_of
from mnist_dist.errors import MnistDistError, OfThisProcess, UserError
from mnist_dist.output import complain, protect, say
from mnist_dist.processes.launch_environment import Launch, number_asked_of_accelerate, read_launch
from mnist_dist.processes.spawn import PORT, local_number, read_machines, runs_on_cpu, spawn
from mnist_dist.processes.stop_signals import block_ignored, ending, interrupting, number_of
from mnist_dist.record.config_file import from_environment, merged, read_config, read_run_config
from mnist_dist.record.run_folder import CONFIG, check_place
from mnist_dist.study.plan.grid import AXES, LAUNCHERS, RATE_AT, RATE_OF
from mnist_dist.text import cut, is_text, whole, without_passwords
from mnist_dist.worker import any_left

# options of training that a study sets for each run
NOT_IN_STUDY = ("batch_size", "per_device_batch_size", "output_dir", "resume", "run_name", "quiet")
SHARED = ("dataset", "data_dir", "mirror", "seed")  # options of training that other commands have too

MOST_PROCESSES = 4096  # on a machine
CLOSE = 0.8  # likeness of an unknown option to a known one, from which on that one is meant

HOLD_OUT: Any = {"metavar": "WHAT", "help": "cells to leave out of the fit of the model of the step time, as a check "
                 "of it: processes=N, batch-size=N, or both separated by a comma (default: the most processes)"}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


class Version(argparse.Action):
    """Prints the versions, without importing what they are of."""

    def __call__(self, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        names = [f"mnist-dist {__version__}"]
        for name in ("torch", "accelerate"):
            try:
                names.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                names.append(f"{name} is not installed")
        say(", ".join(names))
        raise SystemExit(0)


def _add_launch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", metavar="N", help="start N processes on this machine: on its GPUs, else its CPU")
    parser.add_argument("--machines", metavar="M", help="run on M machines: the same command on each, but for "
                        "--machine-rank (default 1)")
    parser.add_argument("--machine-rank", metavar="R", help="this machine's number, 0 to M-1; the output folder is on "
                        "machine 0")
    parser.add_argument("--address", metavar="HOST[:PORT]", help="of machine 0, as all machines reach it (port "
                        f"{PORT} unless given)")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="mnist-dist", description="Distributed MNIST training: exact on any number of processes, and "
                    "measured.", allow_abbrev=False)
    parser.add_argument("--version", action=Version, nargs=0, help="print the versions of mnist-dist, torch and "
                        "accelerate")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, help: str, positional: str = "") -> Parser:
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False,
                                   usage=f"mnist-dist {name} {positional}[OPTIONS]")

    train = command("train", "train on one process, or on several")
    _add_launch(train)
    train.add_argument("--launcher", choices=("torch", "ray"), default="torch", help="what starts the processes: torch "
                       "or Ray, on the cluster that RAY_ADDRESS names, else on this machine; there --processes is of "
                       "the whole cluster, N or LEAST:MOST (default torch)")
    train.add_argument("--max-restarts", metavar="N", help="if a process is lost, start all again, N times at most; "
                       "they continue from the newest checkpoint (default 0)")
    train.add_argument("--config", metavar="FILE", help="a run's config.yaml; flags on the command line win")
    _add_options(train, [option.name for option in fields(TrainConfig)])

    predict = command("predict", "classify image files, or 16 random test images, with a run's model",
                      "RUN_DIR [IMAGE ...] ")
    predict.add_argument("run_dir", metavar="RUN_DIR", help="folder of a completed run")
    predict.add_argument("images", metavar="IMAGE", nargs="*", help="PNG or JPEG of one digit, dark or light, of any "
                         "size and place; a picture of 28 x 28 is taken as it is")
    predict.add_argument("--json", action="store_true", help="a line of JSON for each image file")
    predict.add_argument("--output", metavar="FILE", help="with image files: draw the first 50 of them, what the "
                         "model sees of each, and the ten probabilities; else: where the grid goes (default: "
                         "predict.png in RUN_DIR)")
    _add_options(predict, SHARED)

    show = command("show", "look at the data and the untrained model, as the tutorial does")
    show.add_argument("--output-dir", metavar="DIR", default="show", help="folder for the pictures (default: show)")
    _add_options(show, SHARED)

    lesson = command("lesson", "what a mini-batch changes, measured here in 90 seconds: one picture, five sentences")
    lesson.add_argument("--output-dir", metavar="DIR", default="lesson", help="folder for the picture and the text "
                        "(default: lesson)")
    _add_options(lesson, SHARED)

    reproduce = command("reproduce", "run the tutorial's two trainings and print its numbers beside ours")
    reproduce.add_argument("--output-dir", metavar="DIR", help="folder for both runs and the report (default: "
                           "runs/reproduce-<time>)")
    _add_options(reproduce, (*SHARED, "wandb"))

    doctor = command("doctor", "is this machine, or this launch, fit for a study: each problem with its remedy")
    _add_launch(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON, for programs; the exit status is 1 if "
                        "anything is wrong")
    _add_options(doctor, (*SHARED, "output_dir", "timeout", "wandb"))

    study = command("study", "a scaling study: throughput over batch sizes and processes; continues where it stopped")
    study.add_argument("--batch-sizes", metavar="N,N", help="global batch sizes (under --scaling weak: "
                       "per process) (default 200)")
    study.add_argument("--processes", metavar="N,N", help="numbers of processes (default 1)")
    study.add_argument("--scaling", metavar="{strong,weak}", help="strong = a batch size is global; "
                       "weak = per process; or both: strong,weak (default strong)")
    study.add_argument("--repeats", metavar="N", help="runs of each cell (default 5)")
    study.add_argument("--precision", metavar="PERCENT", help="instead of --repeats: 6 runs of each cell, then more of "
                       "those whose throughput is not known to this yet, as in 3%%")
    study.add_argument("--budget", metavar="TIME", help="start no run that would end later, as 30min; counts the "
                       "seconds of all runs in the study's folder")
    study.add_argument("--quick", action="store_true", help="choose the grid, from a first look at this machine, and "
                       "end within ten minutes: throughput, samples to a target, and the batch size that serves best")
    for axis, option in AXES.items():
        study.add_argument(flag_of(axis), metavar="A,B", help=f"a further axis: values of {flag_of(option)}")
    study.add_argument("--output-dir", metavar="DIR", default="studies/study", help="folder of the study (default "
                       "studies/study)")
    study.add_argument("--script", metavar="FILE", help="study another training: it takes --batch-size and "
                       "--output-dir, and leaves a result.json (docs/your-training.md); words after -- go to it")
    study.add_argument("--command", metavar="WORDS", dest="command_line", help="study any program: its command, with "
                       "{batch_size}, {processes}, {output_dir}, {options}, {seed} and the names of axes; words after "
                       "-- are in {options}")
    study.add_argument("--rate-from", metavar="REGEX", help="take the rate from what the program prints; the group is "
                       r"the number, as in 'tok/sec: ([\d,.]+)'")
    study.add_argument("--rate-at", choices=RATE_AT, help="which matches: all, without those of the warm-up; or the "
                       "one at the end (default all)")
    study.add_argument("--rate-of", choices=RATE_OF, help="whether the rate is that of all processes, or of each "
                       "process (default all)")
    study.add_argument("--unit", metavar="UNIT[=N]", help="what the rate counts, and how many a sample has, as "
                       "tokens=2048 (default samples)")
    study.add_argument("--axis", metavar="NAME=A,B", action="append", help="a further axis: values of --NAME, of "
                       "{NAME} in --command, or of the environment variable NAME as env:NAME=A,B; with commas in the "
                       "values, as 'NAME=A;B'")
    study.add_argument("--cell-timeout", metavar="SECONDS", default="3600", help="end a run that takes longer (default "
                       "3600)")
    study.add_argument("--launcher", choices=(*LAUNCHERS,), default="torch", help="what starts a run: torch, on this "
                       "machine; slurm, as tasks of job arrays, many at a time; ray, on its cluster (default torch)")
    study.add_argument("--sbatch", metavar="OPTIONS", default="", help="with --launcher slurm: options of sbatch, as "
                       "--sbatch='--partition=gpu --gpus-per-task=1'")
    study.add_argument("--print", action="store_true", help="with --launcher slurm: print the scripts, and submit "
                       "nothing")
    study.add_argument("--oversubscribe", action="store_true", help="also more processes than cores")
    study.add_argument("--order-seed", metavar="N", default="0", help="seed of the runs' random order (default 0)")
    study.add_argument("--hold-out", **HOLD_OUT)
    study.add_argument("--dry-run", action="store_true", help="print the plan and its time, and start nothing")
    _add_options(study, [option.name for option in fields(TrainConfig) if option.name not in NOT_IN_STUDY])

    report = command("report", "draw a study's report again, or compare two studies cell by cell",
                     "STUDY_DIR [STUDY_DIR] ")
    report.add_argument("folders", metavar="STUDY_DIR", nargs="+", help="folder of a study; with two, the second is "
                        "compared with the first")
    report.add_argument("--hold-out", **HOLD_OUT)
    report.add_argument("--fail-if-slower", metavar="PERCENT", help="with two studies: exit status 1 if the second is "
                        "shown to be slower by more than this, as in 5%%, in any cell")
    report.add_argument("--junit", metavar="FILE", help="with --fail-if-slower: write a test for each cell in JUnit's "
                        "format")
    return parser


def _add_options(parser: Parser, names: Sequence[str]) -> None:
    """Add options of training, in groups. They are read as text and checked by `TrainConfig`; only those given are set.
    """
    heading, group = "", None
    for option in fields(TrainConfig):
        heading = HEADINGS.get(option.name, heading)
        if option.name not in names:
            continue
        if group is None or group.title != heading:
            group = parser.add_argument_group(heading)
        rule = option.metadata
        described = rule["help"].replace("%", "%%")
        if option.default is not None and not isinstance(option.default, bool):
            described += f" (default {option.default})"
        extra: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": option.name}
        if rule["kind"] is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["metavar"] = "{" + ",".join(rule["choices"]) + "}" if "choices" in rule else (
                rule["metavar"] or {int: "N", float: "X", str: "TEXT"}[rule["kind"]])
        group.add_argument(flag_of(option.name), help=described, **extra)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises `UserError`; an unknown option is answered with the nearest known one."""
    parser = build_parser()
    words: list[str] = []
    end = argv.index("--") if "--" in argv and argv[0] == "study" else len(argv)  # what follows is for its --script
    argv, rest = argv[:end], argv[end + 1 :]
    for word in argv:
        if not is_text(word):
            raise UserError(f"{cut(word)} has control characters, or bytes that are no text: rename it")
        if re.fullmatch(r"--local[-_]rank=\d+", word):  # of torch.distributed.launch, which sets LOCAL_RANK too
            continue
        if match := re.match(r"--[a-z][a-z_-]*", word):  # --batch_size is --batch-size
            word = _switch(match[0].replace("_", "-") + word[match.end():])
        if words and re.fullmatch(r"-[\d.].*", word) and re.fullmatch(r"--[a-z-]+", words[-1]):
            words[-1] += f"={word}"  # a negative number is a value: let its check speak of it
        else:
            words.append(word)
    given, unknown = parser.parse_known_args(words)
    if given.command is None:
        parser.error("a command is needed: train, predict, show, lesson, reproduce, doctor, study or report")
    if unknown:
        commands: Any = next(action.choices for action in parser._actions if action.dest == "command")
        known = [flag for action in commands[given.command]._actions for flag in action.option_strings]
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE) or [
            flag for flag in known if len(name) > 3 and (flag.startswith(name) or flag.endswith(name[1:]))]
        hint = f"did you mean {near[0]}?" if near else f"mnist-dist {given.command} --help lists the options"
        raise UserError(f"unknown option {cut(unknown[0])}: {hint}")
    given.rest = rest
    return given


def _switch(word: str) -> str:
    """`--shuffle=False`, as sweeps write it, is `--no-shuffle`."""
    name, _, value = word.partition("=")
    meant = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(value.lower())
    switches = {flag_of(option.name) for option in fields(TrainConfig) if option.metadata["kind"] is bool}
    if meant is None or name not in switches:
        return word
    return name if meant else name.replace("--", "--no-", 1)


def training_config(given: argparse.Namespace) -> TrainConfig:
    """The config from defaults, the run that is continued, the environment, the file that --config names, and the
    command line. Raises `UserError`.
    """
    from_file = read_config(Path(given.config)) if getattr(given, "config", None) else {}
    names = {option.name for option in fields(TrainConfig)}
    flags = {name: value for name, value in vars(given).items() if name in names}
    return merged(_of_continued_run({**from_file, **flags}), from_environment(), from_file, flags)


def _of_continued_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that these values continue, if there is one. Raises `UserError`.

    Its --max-steps does not hold if --epochs is given: both say how long to train.
    """
    if values.get("resume") is not True or not values.get("output_dir"):
        return {}
    before = read_run_config(Path(str(values["output_dir"]), CONFIG))  # the run itself passes warnings on
    if "epochs" in values:
        before.pop("max_steps", None)
    return before


def _data_of_run(folder: Path) -> dict[str, Any]:
    """The data set that the run was trained on, as options. Raises `UserError`."""
    values = read_run_config(folder / CONFIG)
    return {name: values[name] for name in ("dataset", "data_dir") if name in values}


def _spawned(given: argparse.Namespace, argv: Sequence[str], launch: Launch, config: TrainConfig) -> int | None:
    """Start the processes that the command line asks for, here and on other machines, if no launcher has done so; the
    exit status, or None if this process is one of the run. Raises `UserError`.
    """
    asked, wanted_restarts = given.processes, getattr(given, "max_restarts", None)
    if wanted_restarts is not None and whole(wanted_restarts) is None:
        raise UserError(f"--max-restarts must be a whole number at least 0, got {cut(wanted_restarts)!r}")
    if getattr(given, "launcher", "torch") == "ray":
        if not launch.is_launched:
            return _on_ray(given, argv, launch, config)
        asked = wanted_restarts = None  # this is a process that Ray has started
    if asked is not None and not 0 < (whole(asked) or 0) <= MOST_PROCESSES:
        raise UserError(f"--processes must be a whole number from 1 to {MOST_PROCESSES:,}, got {cut(asked)!r}")
    restarts, machines = int(wanted_restarts or 0), read_machines(given.machines, given.machine_rank, given.address)
    if launch.is_launched:
        started = launch.size if machines.number == 1 else launch.local_size
        if asked is not None and int(asked) != started:
            raise UserError(f"--processes {asked} conflicts with the launcher, which started {started}: remove "
                            f"--processes, or launch {asked}")
        if machines.number > 1 and launch.num_machines != machines.number:
            raise UserError(f"--machines {machines.number} conflicts with the launcher, which runs on "
                            f"{launch.num_machines}: remove --machines")
        if wanted_restarts is not None and restarts != launch.max_restarts:
            raise UserError(f"--max-restarts {restarts} conflicts with the launcher, which has {launch.max_restarts}: "
                            "give it to the launcher")
        config.global_batch_size(launch.size)  # before anything is downloaded or imported
        return None
    wanted = int(asked) if asked else number_asked_of_accelerate()
    number = local_number(launch, 1 if wanted is None else wanted)
    if number == 1 and not restarts and machines.number == 1:
        return None
    config.global_batch_size(number * machines.number)  # before any process is started
    with interrupting():
        return spawn(launch, number, argv, machines, max_restarts=restarts, timeout_s=config.timeout,
                     options=config.common)


def _on_ray(given: argparse.Namespace, argv: Sequence[str], launch: Launch, config: TrainConfig) -> int:
    """Start the processes on a Ray cluster; the exit status. Raises `UserError`."""
    from mnist_dist.processes import ray_launcher

    if (several := ray_launcher.least_and_most(given.processes or "1")) is None:
        raise UserError(f"--processes must be a whole number at least 1, or LEAST:MOST, got {cut(given.processes)!r}")
    (least, most), restarts = several, int(given.max_restarts or 0)
    if given.machines or given.machine_rank or given.address:
        raise UserError("--launcher ray has the cluster's machines: remove --machines, --machine-rank and --address")
    if config.output_dir is None:
        raise UserError("--launcher ray needs --output-dir: a folder that all nodes of the cluster share")
    if (restarts or least < most) and not config.resume:
        raise UserError("--max-restarts and LEAST:MOST processes on Ray need --resume: each start goes on from the "
                        "newest checkpoint")
    for size in range(least, most + 1):
        config.global_batch_size(size)
    group = ray_launcher.Group(least, most, on_gpus=not runs_on_cpu(launch))
    with interrupting():
        return ray_launcher.launch(argv, group, Path(config.output_dir).resolve(), restarts, config.timeout)


def _train(given: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    # imported modules stay: searching them for garbage, again and again, takes a tenth of the start-up
    gc.set_threshold(100_000, 50, 100)
    config = training_config(given)
    check_place(config)  # before any process is started, or anything downloaded
    if (status := _spawned(given, argv, launch, config)) is not None:
        return status
    from mnist_dist.training.run import train

    train(config, launch)
    return 0


def _doctor(given: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    config = training_config(given)
    if (status := _spawned(given, argv, launch, config)) is not None:
        return status
    from mnist_dist.commands.doctor.doctor import doctor

    return doctor(config, launch, given.json)


def _predict(given: argparse.Namespace, config: TrainConfig) -> int:
    from mnist_dist.commands.predict import predict_files, predict_grid

    if given.images:
        return predict_files(Path(given.run_dir), list(map(Path, given.images)), given.output, given.json)
    if given.json:
        raise UserError("--json is of image files: name some")
    predict_grid(config, Path(given.run_dir), given.output)
    return 0


def _check_alone(given: argparse.Namespace, launch: Launch | None) -> None:
    """Raises `UserError` if a launcher has started a command that starts the processes of its runs itself."""
    launch = launch or read_launch()
    if launch.size > 1:
        raise UserError(f"mnist-dist {given.command} starts its processes itself, and {launch.variables} says that "
                        f"this is process {launch.rank} of {launch.size}: start it without a launcher, or unset these")


def run(argv: Sequence[str], launch: Launch | None = None) -> int:
    """Carry out a command; returns the exit status. `launch` is read from the environment unless it is given.

    Raises `MnistDistError`.
    """
    given = parse(argv)
    if given.command == "train":
        return _train(given, argv, launch or read_launch())
    if given.command == "doctor":
        return _doctor(given, argv, launch or read_launch())
    if given.command in ("study", "report"):
        from mnist_dist.commands import study

        if given.command == "report":
            return study.report(given)
        _check_alone(given, launch)
        with interrupting():
            return study.study(given, argv)
    options = {name: value for name, value in vars(given).items() if name in {*SHARED, "wandb"}}
    of_run = _data_of_run(Path(given.run_dir)) if given.command == "predict" and not given.images else {}
    config = merged(of_run, from_environment("mirror"), options)
    if given.command == "predict":
        return _predict(given, config)
    elif given.command == "show":
        from mnist_dist.commands.show import show

        show(config, Path(given.output_dir))
    elif given.command == "lesson":
        from mnist_dist.commands.lesson import lesson

        _check_alone(given, launch)
        lesson(config, launch or read_launch(), Path(given.output_dir))
    else:
        from mnist_dist.commands.reproduce import reproduce

        _check_alone(given, launch)
        with interrupting():
            reproduce(options, output_dir=given.output_dir)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point: returns the exit status, or ends the process if a normal exit could wait for ever, or crash."""
    # torch warns of each address that has no name: without a name server that is every one
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    protect()
    block_ignored()
    words = sys.argv[1:] if argv is None else argv
    sys.argv[1:] = map(without_passwords, sys.argv[1:])  # W&B writes it down
    status, at_once = _status(words)
    if at_once or any_left():  # Python's exit would wait for a W&B that does not answer
        sys.stdout.flush()
        os._exit(status)
    return status


def _status(argv: Sequence[str]) -> tuple[int, bool]:
    """The exit status of a command, and whether the process must end at once: one of several must. Python's exit would
    wait for processes that are lost; and gloo's threads, which live as long as the process, can crash it ("terminate
    called without an active exception"). A failure is one line on standard error.
    """
    launch = None
    with contextlib.suppress(UserError):  # for `run` to say, if the command needs a launch
        launch = read_launch()
    process = launch or Launch()
    at_once = process.size > 1

    def say_stopped(number: int) -> None:
        if process.says_errors:
            complain("error", f"stopped by {signal.Signals(number).name}: the same command starts again")

    try:
        with ending(say_stopped):
            return run(argv, launch), at_once
    except MnistDistError as error:
        if isinstance(error, OfThisProcess) or process.says_errors:
            complain("error", error)
        else:
            time.sleep(1.0)  # a launcher ends rank 0 when this one ends, and rank 0 has a line to print
        is_final = error.exit_status == MnistDistError.exit_status and not isinstance(error, OfThisProcess)
        return process.final_status if is_final else error.exit_status, at_once
    except KeyboardInterrupt as stop:
        say_stopped(number_of(stop))
        return 128 + number_of(stop), at_once
    except (OSError, MemoryError) as error:  # of a kind that no command expects
        name, reason = getattr(error, "filename", None), getattr(error, "strerror", None)
        complain("error", f"{reason or str(error) or 'no memory left'}{f': {cut(name)}' if name else ''}")
        return MnistDistError.exit_status, at_once
    except Exception:
        if process.size == 1:
            raise
        traceback.print_exc()
        return 1, True
