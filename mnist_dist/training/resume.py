"""What the folder of a run holds of an earlier start, and whether this start may continue it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.config import TrainConfig, flag_of
from mnist_dist.errors import UserError
from mnist_dist.record.checkpoint import FORMAT, Checkpoint, load_newest
from mnist_dist.record.config_file import read_run_config
from mnist_dist.record.metrics import EpochRecord
from mnist_dist.record.result import RunResult, read_result
from mnist_dist.record.run_folder import CHECKPOINTS, CONFIG, RESULT
from mnist_dist.text import cut

BATCH, DATA, PRECISION = "global batch size", "data set", "--mixed-precision"  # names of what is fixed


class Earlier(NamedTuple):
    """An earlier start of a run: its newest whole checkpoint, its result if it was completed, and what may not change,
    as `source` has it.
    """

    checkpoint: Checkpoint | None = None
    result: RunResult | None = None
    source: Path | None = None
    fixed: Mapping[str, Any] = {}

    def refuse_changes(self, now: Mapping[str, Any]) -> None:
        """Raises `UserError` that names everything in `now` that differs. If only the options of the earlier start are
        left, only these are compared.
        """
        if self.source is None:
            return
        has_all = bool(self.checkpoint or self.result)
        missing = [name for name in now if name not in self.fixed] if has_all else []
        if missing:
            raise UserError(f"{self.source} has no {cut(', '.join(missing), 200)}: another version of mnist_dist "
                            "wrote it; continue with that version, or give another --output-dir")
        # long enough for two descriptions of a data set with their digests
        changed = [f"{name} {cut(self.fixed[name], 130)} (now {value})" for name, value in now.items()
                   if name in self.fixed and self.fixed[name] != value]
        if changed:
            raise UserError(f"{self.source} was written with {cut(', '.join(changed), 275)}: continue with the same, "
                            "or give another --output-dir")


def fixed_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config that a run may not change when it is continued, by their flags."""
    return {flag_of(option.name): values[option.name] for option in fields(TrainConfig)
            if option.metadata.get("fixed") and option.name in values}


def look_at(folder: Path, warn: Callable[[str], None]) -> Earlier:
    """The earlier start in the folder. `warn` gets a line for each file that is damaged. Raises `UserError`."""
    config = read_run_config(folder / CONFIG, warn)
    kept, result = load_newest(folder / CHECKPOINTS, warn), None
    if (folder / RESULT).exists():
        try:
            result = read_result(folder)
        except UserError as error:
            warn(f"{error}; it is made anew")
    result = result if result and result.status == "completed" else None
    if kept:
        if kept.state.get("format") != FORMAT:
            raise UserError(f"{kept.folder} has checkpoint format {kept.state.get('format', 'unknown')!r:.80}, and "
                            f"this version of mnist_dist reads {FORMAT}: continue with the version that wrote it, or "
                            "give another --output-dir")
        fixed = kept.state.get("fixed")
        if not isinstance(fixed, dict) or not fixed:
            raise UserError(f"{kept.folder} is not a checkpoint of this program (fixed: {fixed!r:.80}): remove it, or "
                            "give another --output-dir")
        return Earlier(kept, result, kept.folder, fixed)
    if result:
        return Earlier(None, result, folder / RESULT, {
            **fixed_options(result.config), PRECISION: result.environment.mixed_precision,
            BATCH: result.summary.global_batch_size, DATA: dict(result.dataset),
        })
    # None: the launcher decides
    options = {name: value for name, value in fixed_options(config).items() if value is not None}
    return Earlier(None, None, folder / CONFIG, options) if options else Earlier()


def has_ended(config: TrainConfig, records: Sequence[EpochRecord], num_batches: int) -> bool:
    """Whether a run of `config` has come to its end with these records. Its epochs have `num_batches` steps; the last
    record may be of a part of an epoch.
    """
    if not records:
        return False
    step, nlls = records[-1].step, [record.test_nll for record in records]
    nlls += [evaluation["test_nll"] for record in records for evaluation in record.evaluations]
    return (
        step >= config.epochs * num_batches
        or (config.max_steps is not None and step >= config.max_steps)
        or (bool(config.targets) and min(nlls) <= config.targets[-1])
    )
