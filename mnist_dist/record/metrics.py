"""The metrics that a run records, each once: name, group, unit, meaning (as `TrainConfig` has the options).

`EpochRecord` is a line of `metrics.jsonl` and an entry of `result.json`; its groups are those that W&B shows. Importing
this needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, TypeVar

from mnist_dist.errors import UserError
from mnist_dist.record.schema import check_types

R = TypeVar("R")


def metric(group: str, meaning: str, *, unit: str = "", default: Any = MISSING) -> Any:
    """A field of a record: the group under which W&B shows it, what it means, and its unit ("" is a plain number)."""
    return field(metadata={"group": group, "meaning": meaning, "unit": unit}, default=default)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch of training and its evaluation, over all processes. None stands for what was not measured."""

    epoch: int = metric("train", "counted from 0")
    step: int = metric("train", "optimizer steps since the start of the run", unit="steps")
    train_loss: float = metric("train", "mean loss per sample over the epoch's steps", unit="nats")
    noise_scale: float | None = metric("train", "gradient noise scale, over the epoch's measured steps; None: not "
                                       "measured, or not known", unit="samples", default=None)
    noise_scale_low: float | None = metric("train", "lower end of its 95 % interval", unit="samples", default=None)
    noise_scale_high: float | None = metric("train", "upper end of its 95 % interval", unit="samples", default=None)
    test_nll: float = metric("test", "mean negative log-likelihood per test image", unit="nats")
    test_nll_sum: float = metric("test", "the same, summed over the test images", unit="nats")
    test_accuracy: float = metric("test", "share of the test images that are classified right")
    test_count: int = metric("test", "test images evaluated", unit="images")
    train_seconds: float = metric("time", "all training steps, on the slowest process", unit="s")
    warmup_seconds: float = metric("time", "the part of train_seconds that the rates leave out", unit="s")
    measured_seconds: float = metric("time", "the part of train_seconds that the rates are made of", unit="s")
    eval_seconds: float = metric("time", "the evaluation, on the slowest process", unit="s")
    epoch_seconds: float = metric("time", "train_seconds + eval_seconds", unit="s")
    step_ms_p50: float | None = metric("time", "median time of a measured step", unit="ms")
    step_ms_p95: float | None = metric("time", "95th percentile of the time of a measured step", unit="ms")
    measured_samples: int = metric("throughput", "samples of the measured steps, over all processes", unit="samples")
    samples_per_second: float | None = metric("throughput", "measured_samples / measured_seconds", unit="samples/s")
    samples_per_second_per_process: float | None = metric("throughput", "the same for one process", unit="samples/s")
    data_wait_fraction: float | None = metric("throughput", "share of measured_seconds that the main process waits "
                                              "for data")
    peak_memory_bytes: int = metric("memory", "largest use of memory by a process: of the GPU if there is one",
                                    unit="bytes")
    evaluations: Sequence[Mapping[str, Any]] = metric("test", "evaluations within the epoch: step, samples and "
                                                      "train_seconds since the start of the run, test_nll, "
                                                      "test_accuracy", default=())
    ranks: Mapping[str, Any] = metric("ranks", "min, median and max over ranks of step_ms, own_ms (a step without the "
                                      "exchange of gradients; on a GPU the same as step_ms), data_wait_ms (means over "
                                      "measured steps) and peak_memory_bytes; the rank with the most own_ms, its host")
    windows: Sequence[Sequence[float]] = metric("time", "the measured steps in windows of consecutive ones, each "
                                                "[steps, samples, seconds]; after --resume only those since then; in "
                                                "windows.jsonl", default=())

    @cached_property
    def line(self) -> str:
        """This record as a line of `metrics.jsonl`; every checkpoint has the lines of all epochs, so each is made once.
        Raises `ValueError` if a metric is not finite.
        """
        return json.dumps(self.values, allow_nan=False) + "\n"

    @property
    def values(self) -> dict[str, Any]:
        """The metrics by their names, without the windows, which are in `windows.jsonl`."""
        values = asdict(self)
        del values["windows"]
        return values


GROUP_OF = {option.name: option.metadata["group"] for option in fields(EpochRecord)}


def grouped(record: EpochRecord) -> dict[str, Any]:
    """The record under W&B's names: `test_nll` is `test/test_nll`. Left out: values that are None, the windows, the
    evaluations within it, and the summary over ranks if there is one rank.
    """
    values = record.values
    ranks = values.pop("ranks")
    del values["evaluations"]
    named = {f"{GROUP_OF[name]}/{name}": value for name, value in values.items() if value is not None}
    if ranks["count"] > 1:
        for name, value in ranks.items():
            if isinstance(value, dict):
                named |= {f"ranks/{name}_{which}": inner for which, inner in value.items()}
            else:
                named[f"ranks/{name}"] = value
    return named


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The metrics of a run over all its epochs."""

    global_batch_size: int = metric("summary", "samples that one optimizer step averages over", unit="samples")
    per_device_batch_size: int = metric("summary", "the most of these on one process", unit="samples")
    learning_rate: float = metric("summary", "the rate in force, after --lr-rule")
    compile_seconds: float = metric("summary", "compiling the step, outside all other times", unit="s")
    checkpoints: int = metric("summary", "checkpoints written since the process started", default=0)
    checkpoint_pause_seconds: float | None = metric("summary", "how long one kept the training, median", unit="s",
                                                    default=None)
    checkpoint_seconds: float | None = metric("summary", "from the request until it was whole, median", unit="s",
                                              default=None)
    samples_per_second: float | None = metric("summary", "measured samples / measured seconds", unit="samples/s")
    best_test_nll: float | None = metric("summary", "the lowest test_nll of an epoch", unit="nats")
    best_test_accuracy: float | None = metric("summary", "the highest test_accuracy of an epoch", default=None)
    final_test_nll: float | None = metric("summary", "test_nll of the last epoch", unit="nats")
    seconds_to_target: float | None = metric("summary", "train_seconds until the (lowest) --target-nll is reached",
                                             unit="s")
    steps_to_target: int | None = metric("summary", "optimizer steps until then", unit="steps")
    targets: Sequence[Mapping[str, Any]] = metric("summary", "of each --target-nll the first evaluation at or below "
                                                  "it, as in evaluations, with None if there is none", default=())


def samples_at(step: int, num_train: int, batch: int) -> int:
    """Samples of a run's first steps; the last batch of an epoch, which has `num_train`, may be smaller."""
    epochs, steps = divmod(step, -(-num_train // batch))
    return epochs * num_train + steps * batch


def evaluations_of(records: Sequence[EpochRecord], num_train: int, batch: int) -> list[dict[str, Any]]:
    """Every evaluation of a run in its order, within the epochs and at their ends. An epoch has `num_train` samples."""
    evaluations, seconds = [], 0.0
    for record in records:
        evaluations += [dict(evaluation) for evaluation in record.evaluations]
        seconds += record.train_seconds
        evaluations.append({"step": record.step, "samples": samples_at(record.step, num_train, batch),
                      "train_seconds": seconds, "test_nll": record.test_nll, "test_accuracy": record.test_accuracy})
    return evaluations


def reached(targets: Sequence[float], evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each target the first evaluation at or below it."""
    names = ("step", "samples", "train_seconds", "test_nll")
    times = []
    for target in targets:
        first = next((evaluation for evaluation in evaluations if evaluation["test_nll"] <= target), {})
        times.append({"target_nll": target, **{name: first.get(name) for name in names}})
    return times


def summarise(records: Sequence[EpochRecord], targets: Sequence[float], num_train: int, batch: int) -> dict[str, Any]:
    """The part of `RunSummary` that follows from the epochs, each of `num_train` samples in batches of `batch`. Rates
    are not averaged: samples are divided by seconds.
    """
    targets_reached = reached(targets, evaluations_of(records, num_train, batch))
    last = targets_reached[-1] if targets_reached else {"step": None, "train_seconds": None}
    seconds = sum(record.measured_seconds for record in records if record.measured_samples)
    return {
        "samples_per_second": sum(record.measured_samples for record in records) / seconds if seconds else None,
        "best_test_nll": min((record.test_nll for record in records), default=None),
        "best_test_accuracy": max((record.test_accuracy for record in records), default=None),
        "final_test_nll": records[-1].test_nll if records else None,
        "seconds_to_target": last["train_seconds"],
        "steps_to_target": last["step"],
        "targets": targets_reached,
    }


def record_from(kind: type[R], values: Mapping[str, Any], source: object) -> R:
    """A record from JSON; unknown names are ignored. Raises `UserError` if one is missing: another version wrote it.
    Raises `ValueError` or `TypeError` if a value is of another type.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{kind.__name__} is a {type(values).__name__}")
    known = fields(kind)  # type: ignore[arg-type]
    missing = [option.name for option in known if option.name not in values and option.default is MISSING]
    if missing:
        raise UserError(f"{source} has no {', '.join(missing)}: another version of mnist_dist wrote it; train again")
    check_types(kind, values)
    return kind(**{option.name: values[option.name] for option in known if option.name in values})
