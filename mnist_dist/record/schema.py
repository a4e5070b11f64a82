"""The types of what a run leaves as JSON, checked when it is read: it may come from another program, or be damaged.

They are derived from the records (`EpochRecord`, `RunSummary`, `Environment`), so that each name is in one place.
pydantic checks them; it is imported when the first file is read. Needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from mnist_dist.text import cut

MOST = 2**63  # a whole number is below it


@functools.cache
def _model(kind: type, is_partial: bool) -> Any:
    """The model of a record. In a partial record any field may be missing or None, and a float may stand for an int."""
    from pydantic import create_model

    hints = get_type_hints(kind)
    types: dict[str, Any] = {}
    for option in fields(kind):
        wanted = _nested(is_partial).get(option.name) or _strict(hints[option.name])
        if is_partial:
            wanted = _strict(float) if hints[option.name] is int else wanted
            types[option.name] = (wanted | None, None)
        else:
            types[option.name] = (wanted, ... if option.default is MISSING else option.default)
    return create_model(kind.__name__, __config__=_config(), **types)


def _config() -> Any:
    from pydantic import ConfigDict

    return ConfigDict(strict=True, extra="ignore", protected_namespaces=())


def _strict(hint: Any) -> Any:
    """The type with its limits: numbers are finite, whole ones of 64 bits."""
    from typing import Annotated

    from pydantic import Field

    if hint is int:
        return Annotated[int, Field(ge=-MOST, lt=MOST)]
    if hint is float:
        return Annotated[float, Field(allow_inf_nan=False)]
    if type(None) in get_args(hint):
        (inner,) = set(get_args(hint)) - {type(None)}
        return _strict(inner) | None
    return hint


@functools.cache
def _nested(is_partial: bool) -> dict[str, Any]:
    """The fields that hold other records, by their names. Another training may evaluate other metrics."""
    from typing import Annotated

    from pydantic import Field

    whole, number = _strict(int), _strict(float)
    spread = _record("Spread", {"min": number, "median": number, "max": number})
    ours = {"train_seconds": number, "test_nll": number, "test_accuracy": number}
    place = {"step": number, "samples": number}
    evaluation = _record("Evaluation", place, ours) if is_partial else _record("Evaluation", {**place, **ours})
    needed, others = {"target_nll": number}, {**place, "train_seconds": number, "test_nll": number}
    target = _record("Target", {}, {**needed, **others}) if is_partial else _record("Target", needed, others)
    ranks = _record("Ranks", {"count": whole, "slowest_rank": whole, "slowest_host": str, "own_ms": spread},
                    {"step_ms": spread, "data_wait_ms": spread, "peak_memory_bytes": spread})
    window = Annotated[list[number], Field(min_length=3, max_length=3)]  # type: ignore[valid-type]
    return {"evaluations": list[evaluation], "targets": list[target],  # type: ignore[valid-type]
            "ranks": ranks, "windows": list[window]}  # type: ignore[valid-type]


def _record(name: str, needed: Mapping[str, Any], optional: Mapping[str, Any] = MappingProxyType({})) -> Any:
    from pydantic import create_model

    types: dict[str, Any] = {**{name: (kind, ...) for name, kind in needed.items()},
                             **{name: (kind | None, None) for name, kind in optional.items()}}
    return create_model(name, __config__=_config(), **types)


def check_types(kind: type, values: object, *, is_partial: bool = False) -> None:
    """Raises `ValueError`, which names the first value of a wrong type, and `TypeError` if these are no values by name.

    With `is_partial` whatever is missing, or None, is right: another training may leave less.
    """
    from pydantic import ValidationError

    if not isinstance(values, Mapping):
        raise TypeError(f"{kind.__name__} is a {type(values).__name__}, not a mapping of names to values")
    try:
        _model(kind, is_partial).model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{_place(first['loc'])}: {first['msg']}, got {cut(repr(first['input']))}") from None


def _place(names: Sequence[str | int]) -> str:
    """`("windows", 3, 0)` as windows[3][0]."""
    return "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix(".")
