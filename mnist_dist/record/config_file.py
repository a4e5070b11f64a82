"""A run's `config.yaml`: written, read, and merged with a command line. Defaults < config file < command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mnist_dist.config import NOT_IN_FILE, TrainConfig, checked
from mnist_dist.errors import UserError
from mnist_dist.record.files import MEGABYTE, read_limited


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> TrainConfig:
    """A config from a file's values and the command line's, which win: naming either batch size replaces both."""
    values = dict(base)
    if {"batch_size", "per_device_batch_size"} & over.keys():
        values.pop("batch_size", None)
        values.pop("per_device_batch_size", None)
    return TrainConfig(**{**values, **over})


def read_config(path: Path) -> dict[str, Any]:
    """The values of a run's `config.yaml`. Raises `UserError` if it cannot be read or has unknown keys."""
    import yaml

    try:
        # a link that a person names is followed
        values = yaml.safe_load(read_limited(path.resolve(), MEGABYTE).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read ({error}): name a run's config.yaml") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not YAML ({reason[:300]}): correct or replace it") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold a mapping of option to value, got {type(values).__name__}")
    known = {option.name for option in fields(TrainConfig)}
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(values.keys() - known)
    if unknown:
        allowed = ", ".join(sorted(known))
        raise UserError(f"--config {path} has unknown keys {', '.join(unknown)}: allowed are {allowed}")
    for option in fields(TrainConfig):
        if option.name in values:
            values[option.name] = checked(option, values[option.name])
    return values


def config_text(config: TrainConfig) -> str:
    """`config` as the YAML that `--config` reads, without `NOT_IN_FILE`."""
    import yaml

    values = {key: value for key, value in asdict(config).items() if key not in NOT_IN_FILE}
    return yaml.safe_dump(values, sort_keys=False)
