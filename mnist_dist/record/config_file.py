"""A run's `config.yaml`: written, read, and merged with a command line.

Defaults < the config.yaml of a run that is continued < environment < --config < command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mnist_dist import __version__
from mnist_dist.config import NOT_IN_FILE, TrainConfig, checked
from mnist_dist.disk.files import read_limited
from mnist_dist.errors import UserError
from mnist_dist.text import cause, cut

# of options. wandb's functions would read these variables too, and ours override them
VARIABLES = {"mirror": "MNIST_DIST_MIRROR", "wandb_project": "WANDB_PROJECT", "wandb_entity": "WANDB_ENTITY",
             "wandb_notes": "WANDB_NOTES", "run_name": "WANDB_NAME", "tags": "WANDB_TAGS"}
MOST_BYTES = 65_536  # of a file of options, which has 2,000
VERSION = "mnist_dist"  # key: the version of this package that wrote the file


def merged(*layers: Mapping[str, Any]) -> TrainConfig:
    """A config from several sources of values, of which a later one wins: naming either batch size replaces both."""
    values: dict[str, Any] = {}
    for layer in layers:
        if {"batch_size", "per_device_batch_size"} & layer.keys():
            values.pop("batch_size", None)
            values.pop("per_device_batch_size", None)
        values |= layer
    if values.get("data_dir") is not None and values.get("dataset", "auto") == "auto":
        values["dataset"] = "mnist"  # in a folder that the user names, the embedded digits do not replace MNIST
    return TrainConfig(**values)


def from_environment(*names: str) -> dict[str, str]:
    """The options that the environment sets, of these names or of all."""
    values = {name: os.environ.get(variable, "") for name, variable in VARIABLES.items() if not names or name in names}
    return {name: value for name, value in values.items() if value.strip()}


def read_config(path: Path) -> dict[str, Any]:
    """The values of a file that --config names. Raises `UserError` if it cannot be read or has unknown keys."""
    source = f"--config {cut(path, 200)}"
    values = _read(path, source)
    values.pop(VERSION, None)
    return _checked(values, source)


def read_run_config(path: Path, warn: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The values of a run's `config.yaml`; none if it does not exist. `warn` gets a line if an older version wrote keys
    that this one does not know: they are ignored. Raises `UserError` if it cannot be read, or a newer version wrote it.
    """
    if not path.exists():
        return {}
    values = _read(path, str(path))
    version = str(values.pop(VERSION, "0.1"))
    unknown = sorted(values.keys() - _known())
    if unknown and _order(version) > _order(__version__):
        raise UserError(f"{path} is of mnist_dist {version:.40}, and {__version__} does not know {', '.join(unknown)}: "
                        "continue with that version, or give another --output-dir")
    if unknown and version != __version__:
        warn(f"{path} is of mnist_dist {version:.40}: ignored {', '.join(unknown)}, which {__version__} does not have")
        values = {key: value for key, value in values.items() if key not in unknown}
    return _checked(values, str(path))


def _order(version: str) -> list[int]:
    """`0.10.1` as [0, 10, 1], which can be compared."""
    return [int(part) for part in re.findall(r"\d{1,9}", version, re.ASCII)]


def _known() -> set[str]:
    return {option.name for option in fields(TrainConfig)}


def _read(path: Path, source: str) -> dict[str, Any]:
    """The values of a file of options by their names. Raises `UserError`."""
    import yaml

    try:
        # a link that a person names is followed
        text = read_limited(path.resolve(), MOST_BYTES).decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):  # a few aliases unfold to gigabytes
            raise ValueError("it has an alias (*name): write the value out")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read ({cause(error)}): name a run's config.yaml") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # ValueError: no such date
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not YAML ({cut(reason, 200)}): correct or replace it") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold a mapping of option to value, got {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _checked(values: dict[str, Any], source: str) -> dict[str, Any]:
    unknown = sorted(values.keys() - _known())
    if unknown:
        raise UserError(f"{source} has unknown keys {cut(', '.join(unknown))}: mnist-dist train --help lists the "
                        "options, and a key is an option without its dashes in front")
    for option in fields(TrainConfig):
        if option.name in values:
            values[option.name] = checked(option, values[option.name])
    return values


def config_text(config: TrainConfig) -> str:
    """`config` as the YAML that `--config` reads, without `NOT_IN_FILE`."""
    import yaml

    values = {key: value for key, value in asdict(config).items() if key not in NOT_IN_FILE}
    return yaml.safe_dump({VERSION: __version__, **values}, sort_keys=False)
