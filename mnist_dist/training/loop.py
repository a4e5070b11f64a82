"""The loop of a run: from one stop to the next, with what is due there.

A stop is a step after which the ranks agree on what is due (pauses.py): an evaluation, a checkpoint, the end of the
run. The last stop of an epoch evaluates and records it.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.errors import Diverged, Stopped, UserError
from mnist_dist.processes.team import Team
from mnist_dist.record.checkpoint import FORMAT, Checkpoint
from mnist_dist.record.metrics import EpochRecord, samples_at
from mnist_dist.record.rank_summary import over_ranks
from mnist_dist.stopwatch import Stopwatch
from mnist_dist.training.device_events import DeviceMarks
from mnist_dist.training.losses import Display
from mnist_dist.training.pauses import PauseSchedule
from mnist_dist.training.progress import Progress
from mnist_dist.training.recorder import Recorder
from mnist_dist.training.results import peak_memory_bytes
from mnist_dist.training.resume import has_ended
from mnist_dist.training.trainer import Trainer


class Loop:
    """`fixed` is what a run that continues this one may not change."""

    def __init__(self, config: TrainConfig, team: Team, trainer: Trainer, schedule: PauseSchedule, progress: Progress,
                 recorder: Recorder, display: Display, fixed: Mapping[str, Any]) -> None:
        self.config, self.team, self.trainer, self.schedule = config, team, trainer, schedule
        self.progress, self.recorder, self.display, self.fixed = progress, recorder, display, fixed
        self.watch: Stopwatch | None = None  # of the epoch in progress

    def run(self) -> None:
        """Train to the end. Raises `Diverged` or `Stopped`. Collective."""
        while self.watch is not None or not self.is_finished:  # within an epoch no further look at all records
            self._advance()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from the end of the checkpoint. Raises `UserError` if another program wrote it."""
        progress = self.progress
        progress.restore(checkpoint)
        if progress.ending and not self.is_finished:  # the epoch goes on
            last, progress.ending = progress.ending, None
            # --max-steps ended the run at a step after which a longer run evaluates within the epoch
            steps = [evaluation["step"] for evaluation in progress.evaluations]
            if self.schedule.is_evaluation_due(progress.epoch, progress.step) and progress.global_step not in steps:
                self._add_evaluation(last.test_nll, last.test_accuracy, last.train_seconds)
        for name, tensor in self.trainer.tensors().items():
            kept = checkpoint.tensors.get(name)
            if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(f"{checkpoint.folder} has no tensor {name} of {list(tensor.shape)} {tensor.dtype}: "
                                "another program wrote it; remove it, or give another --output-dir")

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return has_ended(self.config, self.progress.all_records, self.progress.num_batches)

    def _advance(self) -> None:
        """Train up to the next stop, and do what is due there."""
        watch, trainer, progress = self.watch or self._begin_epoch(), self.trainer, self.progress
        if trainer.left:
            pauses = trainer.advance(self.schedule)
            progress.step = trainer.left.start
            self.display.show(progress.epoch, progress.step)
            if pauses and trainer.left:
                self._pause(watch)
        if not trainer.left:
            self._end_epoch(watch)

    def _begin_epoch(self) -> Stopwatch:
        """Go to the epoch's next step. --max-steps may leave a part of its steps."""
        progress, team, end = self.progress, self.team, self.progress.num_batches
        if self.config.max_steps is not None:
            end = min(end, self.config.max_steps - progress.epoch * progress.num_batches)
        self.watch = Stopwatch(team.synchronize, exchange_clock=lambda: team.exchange_seconds,
                               marks=DeviceMarks(team.wait_for) if team.is_cuda else None, **progress.watch)
        self.display.start(progress.step)
        self.trainer.begin(progress.epoch, range(progress.step, end), self.watch)
        return self.watch

    def _pause(self, watch: Stopwatch) -> None:
        """Between two steps of an epoch: evaluate, save or stop, whichever is due."""
        epoch, step = self.progress.epoch, self.progress.step
        self.progress.watch = watch.state()
        self._mean_loss(watch)  # no checkpoint of a run that has diverged
        if self.schedule.is_evaluation_due(epoch, step) and self._evaluate_within(watch):
            self.trainer.left = self.trainer.left[:0]
            return
        self.display.start(step)
        if self.schedule.is_checkpoint_due(epoch, step):
            self._save()
            self._stop_if_asked()

    def _end_epoch(self, watch: Stopwatch) -> None:
        """Evaluate and record the epoch, or the part of it that the run has; save a checkpoint if one is due."""
        progress, epoch = self.progress, self.progress.epoch
        progress.watch, self.watch = watch.state(), None
        record = self._evaluate(watch)
        if progress.step < progress.num_batches:  # an epoch in progress, so that it can be continued with more steps
            progress.ending = record
            self._save()
            return
        progress.next_epoch()
        self.trainer.sums.zero_()
        progress.records.append(record)
        self.schedule.poll()
        if self.schedule.is_checkpoint_due_after(epoch):
            self._save()
        if not self.is_finished:
            self._stop_if_asked()

    def _evaluate_within(self, watch: Stopwatch) -> bool:
        """Evaluate between two steps; whether the lowest target is reached, which ends the run. Collective."""
        test, targets = self._test(), self.config.targets
        (seconds,) = self.team.max(watch.seconds + watch.warmup_seconds)
        self.recorder.add_evaluation(self._add_evaluation(test["test_nll"], test["test_accuracy"], seconds))
        return bool(targets) and test["test_nll"] <= targets[-1]

    def _add_evaluation(self, test_nll: float, test_accuracy: float, seconds: float) -> dict[str, Any]:
        """Note an evaluation within the epoch, after `seconds` of training in it."""
        progress, trainer = self.progress, self.trainer
        evaluation = {
            "step": progress.global_step,
            "samples": samples_at(progress.global_step, trainer.batches.num_samples, trainer.global_batch_size),
            "train_seconds": sum(record.train_seconds for record in progress.records) + seconds,
            "test_nll": test_nll, "test_accuracy": test_accuracy,
        }
        progress.evaluations.append(evaluation)
        return evaluation

    def _evaluate(self, watch: Stopwatch) -> EpochRecord:
        """The record of the epoch whose steps are done, shown and written. Collective."""
        team, progress = self.team, self.progress
        loss = self._mean_loss(watch)
        noise = self.trainer.noise._asdict()
        begin = time.perf_counter()
        test = self._test()
        team.synchronize()
        totals = (watch.seconds, watch.warmup_seconds, time.perf_counter() - begin)
        of_rank = {**watch.of_this_rank(), "peak_memory_bytes": peak_memory_bytes(team), "host": platform.node()}
        everyone = team.share((totals, of_rank))
        seconds, warmup, evaluation = map(max, zip(*(totals for totals, _ in everyone), strict=True))
        ranks = over_ranks([of_rank for _, of_rank in everyone])
        times = watch.metrics(seconds, warmup, team.size)
        record = EpochRecord(
            epoch=progress.epoch, step=progress.global_step, train_loss=loss, **noise, **test, **times,
            eval_seconds=evaluation, epoch_seconds=times["train_seconds"] + evaluation, ranks=ranks,
            evaluations=progress.evaluations, peak_memory_bytes=ranks["peak_memory_bytes"]["max"],
        )
        self.recorder.add_epoch(record)
        return record

    def _mean_loss(self, watch: Stopwatch) -> float:
        """Mean loss per sample of the epoch's steps so far; its new points are recorded. Raises `Diverged` if a loss is
        not finite; the points before it are kept. Collective.
        """
        try:
            loss = self.trainer.train_loss(self.progress.epoch, self.progress.step)
        except Diverged:
            self.recorder.add_points(watch, self.progress.step)
            raise
        self.recorder.add_points(watch, self.progress.step)
        return loss

    def _test(self) -> dict[str, Any]:
        """The metrics of the test. Raises `Diverged` if the last step has made the weights useless. Collective."""
        test = self.trainer.evaluate()
        if not math.isfinite(test["test_nll"]):
            raise Diverged(f"training diverged: the test NLL is {test['test_nll']} after step "
                           f"{self.progress.global_step} (epoch {self.progress.epoch}); try a smaller --lr than "
                           f"{self.trainer.learning_rate:g}")
        return test

    def _save(self) -> None:
        """Begin to write a checkpoint, if any are wanted. Collective."""
        if not self.schedule.is_on:
            return
        scaler = self.team.accelerator.scaler
        self.recorder.save({
            **self.progress.state(), "scaler": scaler.state_dict() if scaler else None, "format": FORMAT,
            "fixed": self.fixed, "kind": self.trainer.step.kind, "onednn_from": self.trainer.onednn_from,
        })
        self.schedule.saved()

    def _stop_if_asked(self) -> None:
        """Raises `Stopped` if a signal asks for it, when the last checkpoint is whole. Collective."""
        if self.schedule.stop_signal:
            self.recorder.wait_for_checkpoint()
            what_next = (f"continue with --resume --output-dir {self.recorder.folder}" if self.schedule.is_on
                         else "no checkpoint was wanted")
            raise Stopped(self.schedule.stop_signal, self.progress.global_step, what_next)
