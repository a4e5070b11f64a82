"""What the runs of a study start: our own training, a Python script, or any command with placeholders."""

from __future__ import annotations

import re
import shlex
import shutil
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_dist.config import flag_of
from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import ENVIRONMENT, Grid, PlannedRun, arguments_of, variables_of
from mnist_dist.study.run.printed_rate import Printed, printed_of
from mnist_dist.text import cut

PLACEHOLDERS = ("batch_size", "per_process_batch_size", "processes", "seed", "output_dir", "options")


@dataclass(frozen=True)
class Program:
    """Another training than ours: a Python `script`, or a `command` with placeholders. Our own has neither. It leaves a
    `result.json`, or has its rate in what it prints (`printed`).
    """

    script: str | None = None
    command: str | None = None
    printed: Printed | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the runs are of our own training."""
        return self.script is None and self.command is None

    def as_row(self) -> dict[str, Any]:
        """As `study.json` holds it; `program_of` reads it."""
        return {"script": self.script, "program": self.command,
                "printed": None if self.printed is None else self.printed.as_row()}


def program_of(values: Mapping[str, Any]) -> Program:
    """What `study.json` holds. Raises `ValueError`, `TypeError` or `KeyError` if it is damaged."""
    return Program(values["script"], values.get("program"), printed_of(values.get("printed")))


OURS = Program()


def words_of(command: str) -> list[str]:
    """The words of a command as a shell reads them. Raises `ValueError`."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation mark that is not closed
        raise ValueError("a command as a shell reads it, with every quotation closed") from None
    if not words:
        raise ValueError("a command")
    return words


def check_command(command: str, grid: Grid, needs_folder: bool = True) -> None:
    """Raises `UserError` if the command cannot be started, or would not do what the grid says."""
    def problem(what: str) -> UserError:
        return UserError(f"--command {cut(command)!r} {what}")

    try:
        words = words_of(command)
        used = {name for word in words for name in _names(word)}
    except ValueError as error:
        raise UserError(f"--command must be {error}, got {cut(command)!r}") from None
    allowed = (*PLACEHOLDERS, *(name for name in grid.axes if not name.startswith(ENVIRONMENT)))
    if unknown := sorted(used - set(allowed)):
        names = ", ".join(f"{{{name}}}" for name in allowed)
        raise problem(f"has the placeholder {{{unknown[0]}}}: there are {names}; write {{{{ for a brace")
    if needs_folder and "output_dir" not in used:
        raise problem("has no {output_dir}: there a run leaves its result.json (or add --rate-from)")
    for name, values, others in (("batch_size", grid.batch_sizes, {"per_process_batch_size"}),
                                 ("processes", grid.processes, set())):
        if len(values) > 1 and not used & {name, *others}:
            raise problem(f"has no {{{name}}}, and the study has {len(values)} values of it: its runs would be alike")
    if "options" not in used and (left := [name for name in allowed[len(PLACEHOLDERS):] if name not in used]):
        raise problem(f"has neither {{{left[0]}}} nor {{options}}: the axis would change nothing")
    if "{" not in words[0] and shutil.which(words[0]) is None:
        raise problem(f"starts {words[0]!r}, which is no program here: name one on the PATH, or with its folder")


def _names(word: str) -> list[str]:
    """The placeholders in a word. Raises `ValueError`."""
    try:
        return [f"{name}{f'!{kind}' if kind else ''}{f':{form}' if form else ''}"
                for _, name, form, kind in string.Formatter().parse(word) if name is not None]
    except ValueError:
        raise ValueError("a command with {placeholders}, where {{ stands for a brace") from None


def command_of(run: PlannedRun, folder: Path, options: Sequence[str], program: Program, launcher: str = "torch"
               ) -> list[str]:
    """The command of a run; in a job of SLURM's, for `slurm`. Repeats have seeds that follow on the study's."""
    cell = run.cell
    if program.command is not None:
        return _filled(program.command, run, folder, options)
    words = [*options, *(f"{flag_of(name)}={value}" for name, value in arguments_of(cell).items()),
             f"--batch-size={cell.global_batch_size}", f"--output-dir={folder}"]
    if program.script is None:
        if run.role == "repeat":
            seed = next((int(word.removeprefix("--seed=")) for word in options if word.startswith("--seed=")), 0)
            words.append(f"--seed={seed + run.number - 1}")
        if launcher == "ray" or (launcher == "torch" and cell.processes > 1):
            words.append(f"--processes={cell.processes}")
        if launcher == "ray":
            words.append("--launcher=ray")
        srun = ["srun", "--kill-on-bad-exit=1", f"--ntasks={cell.processes}"] if launcher == "slurm" else []
        return [*srun, sys.executable, "-m", "mnist_dist", "train", *words]
    if cell.processes == 1:
        return [sys.executable, program.script, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cell.processes}",
            program.script, *words]


def _filled(command: str, run: PlannedRun, folder: Path, options: Sequence[str]) -> list[str]:
    """The words of the command with the values of the run. No shell reads them, so that each value stays one word."""
    words, cell = words_of(command), run.cell
    axes = arguments_of(cell)
    used = {name for word in words for name in _names(word)}
    others = [part for name, value in axes.items() if name not in used for part in (f"--{name}", value)]
    values: dict[str, Any] = {
        **axes, "batch_size": cell.global_batch_size,
        "per_process_batch_size": -(-cell.global_batch_size // cell.processes), "processes": cell.processes,
        "seed": run.number - 1 if run.role == "repeat" else 0, "output_dir": folder,
        "options": shlex.join([*options, *others]),
    }
    filled: list[str] = []
    for word in words:
        filled += [*options, *others] if word == "{options}" else [_replaced(word, values)]
    return filled


def _replaced(word: str, values: Mapping[str, Any]) -> str:
    """The word with the values of its placeholders."""
    return "".join(text + ("" if name is None else str(values[name]))
                   for text, name, _, _ in string.Formatter().parse(word))


def environment_of(run: PlannedRun, program: Program, environment: Mapping[str, str], cores: int) -> dict[str, str]:
    """The environment of a run: `environment`, and the variables that are axes of the study.

    torchrun gives each process one thread, and on the CPU it lets each think that it is alone. So another training gets
    what `mnist-dist train --processes` sets: each process's share of the cores.
    """
    changed = dict(environment)
    if not program.is_ours and run.cell.processes > 1:
        changed.setdefault("OMP_NUM_THREADS", str(max(1, cores // run.cell.processes)))
    return {**changed, **variables_of(run.cell)}


def read_axes(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The axes of `--axis NAME=V1,V2`. Raises `UserError`."""
    axes: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip()
        plain = name.removeprefix(ENVIRONMENT)
        pattern = r"[A-Za-z_]\w*" if name.startswith(ENVIRONMENT) else r"[A-Za-z][\w-]*"
        is_name = re.fullmatch(pattern, plain, re.ASCII)
        parts = tuple(dict.fromkeys(part.strip() for part in values.split(";" if ";" in values else ",")))
        if not equals or not is_name or not all(parts):
            raise UserError("--axis must be NAME=V1,V2 or env:NAME=V1,V2 (values with commas: 'NAME=V1;V2'), got "
                            f"{cut(text)!r}")
        if name in axes:
            raise UserError(f"--axis {name} is given twice: give it once, with all its values")
        if name in (*PLACEHOLDERS, *(placeholder.replace("_", "-") for placeholder in PLACEHOLDERS)):
            raise UserError(f"--axis {name} is no further axis: use --batch-sizes, --processes or --repeats")
        axes[name] = parts
    return axes
