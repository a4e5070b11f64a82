"""The table of a study: one row per run, with its config, environment and every metric, as JSONL and as CSV.

`result.json` is the contract with a training (docs/your-training.md): the fields of `NEEDED` must be there, all others
are copied as they are. The report is made from `runs.jsonl` alone.

In one file, because the contract, its checks and the two files of the table name the same fields.
"""

from __future__ import annotations

import csv
import gc
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import read_json, read_json_lines, read_limited, replace_synced
from mnist_dist.errors import UserError
from mnist_dist.record.environment import Environment
from mnist_dist.record.metrics import EpochRecord, RunSummary
from mnist_dist.record.run_folder import RESULT, WINDOWS
from mnist_dist.record.schema import MOST, check_types
from mnist_dist.study.plan.goals import goal_of, is_goal, is_number
from mnist_dist.study.plan.grid import MOST_PROCESSES, HoldOut
from mnist_dist.text import cause, cut

JSONL, CSV = "runs.jsonl", "runs.csv"
Row = dict[str, Any]
# By which part the sums of windows may differ from their epoch's: seconds are those of the slowest process.
PARTS_OF_WINDOWS = {"measured_samples": (1, "samples", 0.001), "measured_seconds": (2, "seconds", 0.2)}
SAMPLES = "samples"  # the default unit of a rate
UNIT = r"[A-Za-z][A-Za-z ]{0,29}"  # what a unit may be
# What each epoch of a result must have. An epoch without measured steps has 0 samples.
NEEDED_OF_EPOCH = ("measured_samples", "measured_seconds")


def read_contract(folder: Path) -> dict[str, Any]:
    """A run's `result.json`, checked. Raises `UserError` naming what is missing or is no number."""
    path = folder / RESULT
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise UserError(f"it left no {RESULT} in its --output-dir") from None
    except (OSError, ValueError) as error:
        raise UserError(f"its {RESULT} cannot be read ({cause(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"its {RESULT} holds no mapping of names to values")
    _add_windows(values, folder / WINDOWS)
    if missing := _missing(values):
        raise UserError(f"its {RESULT} has no {', '.join(missing)}")
    return values


def _add_windows(values: dict[str, Any], path: Path) -> None:
    """Add to each epoch its windows from `windows.jsonl`. Raises `UserError`."""
    try:
        windows = {line["epoch"]: line["windows"] for line in read_json_lines(path)}
    except FileNotFoundError:
        return  # another training has them in its epochs, or none
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"its {path.name} cannot be read ({cause(error)})") from None
    epochs = values.get("epochs")
    for epoch in epochs if isinstance(epochs, list) else ():
        if isinstance(epoch, dict) and isinstance(number := epoch.get("epoch"), int) and number in windows:
            epoch.setdefault("windows", windows[number])


def _missing(values: Mapping[str, Any]) -> list[str]:
    """What is missing in a result, or in the row of a completed run."""
    problems = [name for name in ("status", "environment", "summary", "epochs") if name not in values]
    problems += [f"environment.{name}" for name in ("num_processes",) if name not in _part(values, "environment")]
    problems += [f"summary.{name}" for name in ("global_batch_size",) if name not in _part(values, "summary")]
    epochs = values.get("epochs")
    if not isinstance(epochs, list) or not all(isinstance(epoch, dict) for epoch in epochs):
        problems.append("epochs (a list of mappings)")
    else:
        for name in (*NEEDED_OF_EPOCH, *(["step"] if _part(values, "summary").get("targets") else [])):
            if any(not _is_quantity(epoch.get(name)) for epoch in epochs):
                problems.append(f"epochs[].{name}")
    targets = _part(values, "summary").get("targets") or []
    if not isinstance(targets, list) or not all(map(_is_target, targets)):
        problems.append("summary.targets[] with target_nll (or name, value and direction), step and samples")
    return list(dict.fromkeys(problems)) or _wrong(values)


def _wrong(values: Mapping[str, Any]) -> list[str]:
    """The first part of a result that has another type than the report needs; nothing if there is none."""
    parts = [("environment", Environment, values["environment"]), ("summary", RunSummary, values["summary"])]
    parts += [(f"epochs[{number}]", EpochRecord, epoch) for number, epoch in enumerate(values["epochs"])]
    for name, kind, part in parts:
        try:
            check_types(kind, part, is_partial=True)
        except ValueError as error:
            return [f"right {name} ({error})"]
    for name, inner, least in (("config", "seed", 0), ("dataset", "train", 1)):
        if not isinstance(values.get(name), dict | None):
            return [f"right {name} (a mapping of names to values)"]
        number = (values.get(name) or {}).get(inner)
        if number is not None and (not isinstance(number, int) or number < least):
            return [f"right {name}.{inner} (a whole number of at least {least})"]
    for key in {goal_of(target).key for target in values["summary"].get("targets") or []}:
        for number, epoch in enumerate(values["epochs"]):
            evaluations = (epoch, *(epoch.get("evaluations") or []))
            if not all(evaluation.get(key) is None or is_number(evaluation[key]) for evaluation in evaluations):
                return [f"right epochs[{number}] ({cut(key)} is no number)"]
    unit = values["summary"].get("unit")
    if unit is not None and not (isinstance(unit, str) and re.fullmatch(UNIT, unit)):
        return [f"right summary.unit (at most 30 letters, as tokens; got {unit!r:.50})"]
    for name in ("units_per_sample", "flop_per_sample", "printed_rates"):
        metric = values["summary"].get(name)
        if metric is not None and not (_is_quantity(metric) and metric > 0):
            return [f"right summary.{name} (a number above 0, got {metric!r:.50})"]
    for number, epoch in enumerate(values["epochs"]):
        if problem := _wrong_windows(epoch):
            return [f"right epochs[{number}].windows ({problem})"]
    return []


def _wrong_windows(epoch: Mapping[str, Any]) -> str:
    """What is wrong with an epoch's windows: they are all measured steps, so that their sums are those of the epoch."""
    windows = epoch.get("windows") or []
    if any(min(window) <= 0 for window in windows):
        return "a number is not above 0"
    for name, (place, unit, part) in PARTS_OF_WINDOWS.items():
        total = sum(window[place] for window in windows)
        if windows and abs(total - epoch[name]) > part * epoch[name]:
            return f"they have {total:g} {unit}, and {name} is {epoch[name]:g}"
    return ""


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _is_target(target: Any) -> bool:
    """A target that was reached says where; for a target that was not, there is null."""
    return isinstance(target, dict) and is_goal(target) and _is_quantity(target.get("target_nll") or 0) and (
        all(name in target and (target[name] is None or _is_quantity(target[name])) for name in ("step", "samples"))
        and (target["step"] is None) == (target["samples"] is None))


def _is_quantity(value: Any) -> bool:
    """A number from 0 to MOST. Less than 1e-9 is neither a time nor a number of samples."""
    return is_number(value) and (value == 0 or 1e-9 <= value <= MOST)


def rate_of(row: Row) -> float | None:
    """The throughput of a run in its unit per second, over all its epochs; None if it did not complete or measured no
    step.
    """
    if row["status"] != "completed":
        return None
    samples, seconds = (sum(epoch[name] for epoch in row["epochs"]) for name in NEEDED_OF_EPOCH)
    return samples * units_per_sample(row) / seconds if samples and seconds else None


def step_ms_of(row: Row, rate: float) -> float:
    """Milliseconds for a step on a whole global batch, of a run with this throughput."""
    return 1000 * row["global_batch_size"] * units_per_sample(row) / rate


def unit_of(row: Row) -> str:
    """What the run's rate counts: samples, tokens, images."""
    return str(row["summary"].get("unit") or SAMPLES)


def units_per_sample(row: Row) -> float:
    """How many of the unit a sample has: for tokens, the length of a sequence."""
    return float(row["summary"].get("units_per_sample") or 1.0)


def write_table(folder: Path, rows: Iterable[Row]) -> None:
    """Write the rows as `runs.jsonl` and `runs.csv`, each atomically."""
    rows = list(rows)
    replace_synced(folder / JSONL, "".join(json.dumps(row) + "\n" for row in rows).encode())
    flat = [flattened(row) for row in rows]
    write_csv(folder / CSV, list(dict.fromkeys(name for row in flat for name in row)), flat)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_synced(path, text.getvalue().encode())


def flattened(row: Row) -> dict[str, Any]:
    """A row for the CSV: `environment.torch`; of the epochs, a JSON list for each figure."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": _text(value_of_inner) for inner, value_of_inner in value.items()}
        elif name == "epochs":
            metrics = dict.fromkeys(metric for epoch in value for metric in epoch)
            flat |= {f"epochs.{metric}": _text([epoch.get(metric) for epoch in value]) for metric in metrics}
        else:
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def read_table(folder: Path) -> list[Row]:
    """The rows of a study. Raises `UserError` if there is no table or a line is damaged."""
    path = folder / JSONL
    try:
        lines = read_limited(path).decode().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no {JSONL}: name the folder of a study") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({cause(error)}): run the study again, which makes it from its runs"
                        ) from None
    collecting = gc.isenabled()
    gc.disable()  # none of the objects is garbage, and to look for it among millions doubles the time
    try:
        rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    finally:
        if collecting:
            gc.enable()
    _check_names(path, rows)
    return rows


def _check_names(path: Path, rows: Iterable[Row]) -> None:
    """Raises `UserError` if two rows are of one run, which would count twice."""
    lines: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        if (first := lines.setdefault(str(row["run"]), number)) != number:
            raise UserError(f"{path}, lines {first} and {number}, are both of the run {cut(str(row['run']))}: delete "
                            "one of them, or run the study again, which makes the table from its runs")


def hold_out_of(rows: Iterable[Row]) -> HoldOut:
    """The cells that the study of these rows left out of its model's fit."""
    for row in rows:
        values = (row.get("study") or {}).get("hold_out")
        if isinstance(values, dict):
            return HoldOut(values)
    return MOST_PROCESSES


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
        if row["status"] == "completed" and (missing := _missing(row)):
            raise ValueError(f"it has no {', '.join(missing)}")
        return {**row, "status": row["status"], "run": row["run"], "role": row["role"],
                "global_batch_size": int(row["global_batch_size"]), "processes": int(row["processes"])}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}, line {number}, is damaged ({cause(error)}): run the study "
                        "again, which makes the table from its runs") from None
