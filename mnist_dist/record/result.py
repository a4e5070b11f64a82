"""`result.json`: what a run writes last, and how others read it. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mnist_dist.disk.files import read_json, replace_synced
from mnist_dist.errors import UserError
from mnist_dist.record.environment import Environment
from mnist_dist.record.metrics import EpochRecord, RunSummary, record_from
from mnist_dist.record.run_folder import RESULT
from mnist_dist.text import cause


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A run that ended: `status` is "completed" or "diverged"; `config` has all options of training."""

    status: str
    config: Mapping[str, Any]
    dataset: Mapping[str, Any]  # name, and the numbers of train and test images
    environment: Environment
    epochs: tuple[EpochRecord, ...]
    summary: RunSummary
    run_id: str | None = None  # in W&B


def write_result(folder: Path, result: RunResult) -> None:
    """Write the run's `result.json`, atomically."""
    values = {**asdict(result), "epochs": [epoch.values for epoch in result.epochs]}
    replace_synced(folder / RESULT, result_text(values).encode())


def result_text(values: Mapping[str, Any]) -> str:
    """A result as JSON with one line for each epoch. Raises `ValueError` if a number is not finite."""
    epochs = ",\n".join(f"  {json.dumps(epoch, allow_nan=False)}" for epoch in values["epochs"])
    texts = {name: json.dumps(value, indent=1, allow_nan=False).replace("\n", "\n ") for name, value in values.items()}
    texts["epochs"] = f"[\n{epochs}\n ]" if epochs else "[]"
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {text}" for name, text in texts.items()) + "\n}\n"


def read_result(folder: Path) -> RunResult:
    """The run's result. Raises `UserError` if there is none, or it cannot be read."""
    path = folder / RESULT
    try:
        values = read_json(path)
        for name, kind in (("status", str), ("config", dict), ("dataset", dict), ("epochs", list)):
            if not isinstance(values[name], kind):
                raise TypeError(f"{name} is a {type(values[name]).__name__}")
        if not isinstance(run_id := values.get("run_id"), str | None):
            raise TypeError(f"run_id is a {type(run_id).__name__}")
        return RunResult(
            status=values["status"], config=values["config"], dataset=values["dataset"],
            environment=record_from(Environment, values["environment"], path),
            epochs=tuple(record_from(EpochRecord, epoch, path) for epoch in values["epochs"]),
            summary=record_from(RunSummary, values["summary"], path), run_id=run_id,
        )
    except FileNotFoundError:
        raise UserError(f"{folder} has no {RESULT}: name the folder of a run that ended") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({cause(error)}): train again") from None
