"""The progress of a run: the next step to take and what is recorded, as a checkpoint keeps it beside the tensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.record.checkpoint import Checkpoint, step_name
from mnist_dist.record.metrics import EpochRecord, record_from
from mnist_dist.stopwatch import Stopwatch
from mnist_dist.text import cause


@dataclass
class Progress:
    """The progress of one run, whose epochs have `num_batches` steps."""

    run_id: str
    num_batches: int
    epoch: int = 0  # the next step to take
    step: int = 0
    records: list[EpochRecord] = field(default_factory=list)  # of the whole epochs
    # of the epoch in progress
    watch: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    ending: EpochRecord | None = None  # its record, if the run has ended within it

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return self.epoch * self.num_batches + self.step

    @property
    def all_records(self) -> list[EpochRecord]:
        """The lines of `metrics.jsonl`: the whole epochs, and the one in which the run has ended."""
        return [*self.records, *([self.ending] if self.ending else [])]

    def next_epoch(self) -> None:
        """All steps of the epoch are done."""
        self.epoch, self.step, self.watch, self.evaluations = self.epoch + 1, 0, {}, []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; `restore` reads it."""
        return {"epoch": self.epoch, "step": self.step, "run_id": self.run_id, "watch": self.watch,
                "evaluations": self.evaluations, "records": [record.line for record in self.records],
                "ending": self.ending and self.ending.line}

    def restore(self, kept: Checkpoint) -> None:
        """Continue from the end of the checkpoint. Raises `UserError` if another program wrote it."""
        state = kept.state
        try:
            self.epoch, self.step = state["epoch"], state["step"]
            if kept.folder.name != step_name(self.global_step) or self.epoch < 0 or self.step < 0:
                raise ValueError(f"it is of step {self.global_step}")
            if not re.fullmatch("[0-9a-f]{8}", state["run_id"], re.ASCII):
                raise ValueError(f"its run id is {state['run_id']!r}")
            self.run_id = state["run_id"]
            self.records = [record_from(EpochRecord, json.loads(line), kept.folder) for line in state["records"]]
            line = state["ending"]
            self.ending = None if line is None else record_from(EpochRecord, json.loads(line), kept.folder)
            self.watch = dict(state["watch"])
            if not all(isinstance(value, (int, float)) for value in self.watch.values()):
                raise TypeError("its stopwatch has values that are not numbers")
            Stopwatch(lambda: None, **self.watch)  # raises TypeError for other names
            self.evaluations = [dict(evaluation) for evaluation in state["evaluations"]]
            json.dumps(self.state(), allow_nan=False)  # a number that is not finite would stop the next checkpoint
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{kept.folder} is not a checkpoint of this program ({cause(error)}): "
                            "remove it, or give another --output-dir") from None
