"""What a run writes while it trains and at its end: its folder, its checkpoints, W&B, and rows on the screen.

Every rank calls these methods; the main one writes, if the folder is still the folder of this run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnist_dist.config import TrainConfig
from mnist_dist.console import Console
from mnist_dist.disk.lock import FolderLock
from mnist_dist.processes.team import Team
from mnist_dist.record.checkpoint import CheckpointWriter
from mnist_dist.record.environment import Environment
from mnist_dist.record.metrics import EpochRecord, RunSummary, summarise
from mnist_dist.record.result import RunResult, write_result
from mnist_dist.record.run_folder import (
    CHECKPOINTS,
    METRICS,
    STEPS,
    WINDOWS,
    append_all,
    append_metrics,
    cut_back,
    read_points,
    remove_result,
    write_config,
    write_metrics,
    writing,
)
from mnist_dist.record.wandb_run import Mirror, Rows, run_name
from mnist_dist.stopwatch import Stopwatch
from mnist_dist.training.losses import LossLog
from mnist_dist.training.progress import Progress
from mnist_dist.training.results import leave_results, load_model, predict
from mnist_dist.training.trainer import Trainer


class Recorder:
    """The record of one run. `data` is the data set as the record has it; `lock` is the main process's."""

    def __init__(self, config: TrainConfig, team: Team, console: Console, trainer: Trainer, progress: Progress,
                 folder: Path, lock: FolderLock | None, data: Mapping[str, Any]) -> None:
        self.config, self.team, self.console, self.trainer, self.progress = config, team, console, trainer, progress
        self.folder, self.lock, self.data = folder, lock, data
        self.mirror = Mirror(folder, console.warn)
        self.rows = Rows(trainer.batches.num_samples, trainer.global_batch_size)
        self.losses = LossLog(config.log_interval, trainer.batches)
        self.checkpoints = CheckpointWriter(folder / CHECKPOINTS, config.keep_checkpoints,
                                            lock.check if lock else lambda: None)
        self.name = run_name(trainer.global_batch_size, team.size, config.lr, config.seed)

    def write(self, task: Callable[[], None], *, patient: bool = False) -> None:
        """Write to the folder on the main process. Raises `UserError` if it is another run's by now. Collective."""
        def checked() -> None:
            assert self.lock is not None
            self.lock.check()
            task()

        self.team.run_on("main", checked, patient=patient)

    def open(self, environment: Environment) -> None:
        """Write what the folder holds from the start, and begin the run in W&B. Not earlier: a --resume that is refused
        changes nothing. Collective.
        """
        self.environment = environment
        progress, records = self.progress, self.progress.all_records
        self.losses.start(progress.global_step)

        def task() -> None:
            remove_result(self.folder)
            write_config(self.folder, self.config)
            write_metrics(self.folder, records)
            cut_back(self.folder / STEPS, lambda line: line["step"] <= progress.global_step)
            cut_back(self.folder / WINDOWS, lambda line: line["epoch"] < len(records))
            self.checkpoints.tidy(progress.global_step)
            self.mirror.start(self.config, progress.run_id, {
                **asdict(self.config), "global_batch_size": self.trainer.global_batch_size,
                "environment": asdict(environment),
            }, name=self.name)
            self.mirror.log_again(self.rows.of_run(records, progress.evaluations, read_points(self.folder)))

        self.write(task, patient=True)
        self.console.table_head()
        self.console.earlier_rows(records, self.folder / METRICS)
        for evaluation in progress.evaluations:
            self.console.evaluation_row(progress.epoch, evaluation)

    def add_points(self, watch: Stopwatch, done: int) -> None:
        """Keep the new points of the loss, when `done` steps of the epoch are done. They go to W&B now, which takes
        rows in the order of their steps, and to the folder with the next write.
        """
        losses, times = self.trainer.losses, watch.step_seconds
        if self.team.is_main:
            with_loss = max(0, len(times) - done + len(losses))  # if a step diverges, there are fewer losses than steps
            if new := self.losses.add(self.progress.epoch, losses, times[:with_loss]):
                self.mirror.log(list(map(self.rows.of_point, new)))

    def _write_points(self) -> None:
        if self.losses.unwritten:
            append_all(self.folder / STEPS, self.losses.unwritten)
            self.losses.unwritten.clear()

    def add_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Show an evaluation within the epoch, and send it."""
        self.console.evaluation_row(self.progress.epoch, evaluation)
        if self.team.is_main:
            self.mirror.log([self.rows.of_evaluation(evaluation)])

    def add_epoch(self, record: EpochRecord) -> None:
        """Write an epoch's record, show it, and send it. Collective."""
        def task() -> None:
            self._write_points()
            append_metrics(self.folder, record)
            append_all(self.folder / WINDOWS, [{"epoch": record.epoch, "windows": record.windows}])

        self.write(task)
        if self.team.is_main:
            self.mirror.log([self.rows.of_epoch(record)])
        self.console.epoch_row(record)

    def save(self, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint with this state and the trainer's tensors. Collective."""
        step = self.progress.global_step

        def task() -> None:
            self._write_points()  # before the checkpoint: a resume continues with the next point
            self.checkpoints.write(step, self.trainer.tensors(), state)

        self.write(task)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is whole. Collective."""
        self.team.run_on("main", self.checkpoints.wait)

    def close(self, status: str) -> None:
        """Write `result.json`, and before it, of a completed run, the model and the pictures. Collective."""
        self.write(lambda: self._close(status), patient=True)

    def _close(self, status: str) -> None:
        trainer, is_completed, records = self.trainer, status == "completed", self.progress.all_records
        summary = RunSummary(
            global_batch_size=trainer.global_batch_size, per_device_batch_size=trainer.per_device_batch_size,
            learning_rate=trainer.learning_rate, compile_seconds=trainer.step.compile_seconds,
            **self.checkpoints.metrics(),
            **summarise(records, self.config.targets, trainer.batches.num_samples, trainer.global_batch_size),
        )
        self._write_points()
        with writing(self.folder):
            predictions = leave_results(self.folder, trainer, self.config.seed, records) if is_completed else None
            write_result(self.folder, RunResult(
                status=status, config=asdict(self.config), dataset=self.data, environment=self.environment,
                epochs=tuple(records), summary=summary, run_id=self.progress.run_id,
            ))
        if predictions:
            self.console.close(self.folder, summary, records)
            self.mirror.log_results(summary, *predictions, self._of_model(records[-1]))

    def send_again(self, result: RunResult) -> None:
        """Send a completed run to W&B, if W&B has not taken all of it yet. Collective."""
        self.team.run_on("main", lambda: self._send_again(result), patient=True)

    def _send_again(self, result: RunResult) -> None:
        if not self.mirror.is_unsent:
            return
        settings = {**result.config, "global_batch_size": result.summary.global_batch_size,
                    "environment": asdict(result.environment)}
        self.mirror.start(self.config, result.run_id or self.progress.run_id, settings, name=self.name)
        self.mirror.log_again(self.rows.of_run(result.epochs, (), read_points(self.folder)))
        test = self.trainer.sets.test
        guesses: Sequence[int] = predict(load_model(self.folder), test.images).argmax(dim=1).tolist()
        self.mirror.log_results(result.summary, test.labels.tolist(), guesses, self._of_model(result.epochs[-1]))

    def _of_model(self, record: EpochRecord) -> dict[str, Any]:
        """What W&B keeps beside the model: how good it is, what it is, and on which data."""
        return {"test_nll": record.test_nll, "test_accuracy": record.test_accuracy, "epoch": record.epoch,
                "step": record.step, "sizes": list(self.trainer.module.sizes), **dict(self.data)}
