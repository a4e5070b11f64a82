"""One training run, from a config to the folder it leaves: set-up, epochs, checkpoints, results.

Every process runs all of this; what is written or said is the main one's. `train` is the only entry.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from mnist_dist import launching, processes
from mnist_dist.config import TrainConfig, flag_of
from mnist_dist.console import Console
from mnist_dist.data import ImageSets, load, obtain
from mnist_dist.errors import Diverged, LostProcess, MnistDistError, Stopped, UserError
from mnist_dist.loop import Trainer
from mnist_dist.metrics import Stopwatch
from mnist_dist.record.checkpoint import Checkpoint, load_newest, save_checkpoint
from mnist_dist.record.figures import EpochRecord, RunSummary, record_from, summarise
from mnist_dist.record.folder import (
    CHECKPOINTS,
    CURVES,
    METRICS,
    MODEL,
    PREDICTIONS,
    RESULT,
    append_metrics,
    open_folder,
    write_config,
    write_metrics,
)
from mnist_dist.record.mirror import Mirror
from mnist_dist.record.result import RunResult, write_result
from mnist_dist.results import describe_environment, leave_results, peak_memory_bytes


def train(config: TrainConfig) -> None:
    """Run `config` with the processes of this launch. Raises `MnistDistError` where it ends early."""
    if config.reproducible:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
    config = replace(config, compile=launching.compile_choice(config.compile))
    team = processes.start(
        timeout_s=config.timeout,
        mixed_precision=launching.precision(config.mixed_precision if config.dtype == "float32" else "no"),
        dynamo_backend="no",  # it would compile the model alone: we compile the whole step
        kwargs_handlers=[processes.ddp_options(config.gradient_compression)],
    )
    console = Console(team.is_main)
    run = None
    try:
        config.global_batch_size(team.size)
        name = team.agree(lambda: obtain(config.dataset, config.data_dir, config.mirror, console.warn),
                          where="machine", patient=True)
        run = Run(config, team, console, team.agree(lambda: load(name, config.data_dir), where="everywhere"))
        run.go()
    except LostProcess:
        raise  # there is nobody to meet
    except MnistDistError as error:
        team.part()
        if run:
            run.mirror.finish(error.exit_status)
        raise
    except RuntimeError as error:
        lost = processes.lost_process(team, run.global_step if run else 0, error)
        if lost is None:
            raise
        raise lost from error
    finally:
        console.hide_bar()
    team.part()  # the other processes need not wait for W&B
    run.finish_mirror()


class Run:
    """A run in its folder: where it is in its epochs, and what it has recorded."""

    def __init__(self, config: TrainConfig, team: processes.Team, console: Console, sets: ImageSets) -> None:
        self.team, self.console, self.sets = team, console, sets
        folder, run_id = team.agree(lambda: open_folder(config))
        self.config, self.folder = replace(config, output_dir=str(folder)), folder
        kept = team.agree(lambda: load_newest(folder / CHECKPOINTS, console.warn)) if config.resume else None
        self.trainer = Trainer(config, team, sets, kept and kept.state.get("kind"))
        self.num_batches = self.trainer.batches.num_batches
        self.trainer.progress = lambda step: console.progress(self.epoch, step, self.num_batches)
        self.epoch = self.step = 0  # the next step to take
        self.records: list[EpochRecord] = []
        self.watch: dict[str, float] = {}  # of an epoch that was interrupted
        interval = config.checkpoint_interval
        self.every = {interval.unit: interval.number} if interval.number else {}
        self.trainer.checkpoint_seconds = self.every.get("seconds", float("inf"))
        self.run_id = run_id
        if kept:
            self._take_up(kept)
        self.environment = describe_environment(team, "compiled" if self.trainer.compiles else "plain")
        self._introduce()
        self._make_step()
        if kept:
            self._load(kept)
        team.agree(self._open_record)  # not before: a --resume that was refused changes nothing
        self.mirror = Mirror(folder, console.warn)
        settings = {**asdict(self.config), "global_batch_size": self.trainer.batch_size,
                    "environment": asdict(self.environment)}
        team.agree(lambda: self.mirror.start(self.config, self.run_id, settings), patient=True)

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return self.epoch * self.num_batches + self.step

    def go(self) -> None:
        """Train to the end, and leave the results. Raises `Diverged` or `Stopped`, with what there is written."""
        self._show_table()
        with self.trainer.signals:
            try:
                while not self._is_finished():
                    self._run_epoch()
            except Diverged:
                if self.team.is_main:
                    self._write_result("diverged")
                raise
        if self.team.is_main:
            self._leave()

    def _introduce(self) -> None:
        trainer, say = self.trainer, self.console.say
        place, size = self.environment, self.team.size
        say(f"{size} {'process' if size == 1 else 'processes'} on {place.device_name} ({place.device}), "
            f"{place.num_threads} threads each; {self.sets.name}: {len(self.sets.train):,} training and "
            f"{len(self.sets.test):,} test images")
        say(f"global batch {trainer.batch_size} = {'at most ' if trainer.batch_size % self.team.size else ''}"
            f"{trainer.largest_share} per process, {self.num_batches:,} steps per epoch, Adam at "
            f"{trainer.learning_rate:g}, {self.config.dtype}, mixed precision {place.mixed_precision}")
        if self.config.resume:
            say(f"continuing after step {self.global_step}" if self.global_step else
                "nothing to continue: starting afresh")
        say(f"writing to {self.folder}")

    def _make_step(self) -> None:
        if self.trainer.compiles:
            self.console.say("compiling the step: some 3 s, and up to 20 s the first time on a machine")
        self.trainer.make_step(self.console.warn)
        step = self.trainer.step
        if step.compile_seconds:
            self.console.say(f"compiled in {step.compile_seconds:.1f} s")
        self.environment = replace(self.environment, step=step.kind)

    def _open_record(self) -> None:
        write_config(self.folder, self.config)
        write_metrics(self.folder, self.records)

    def _show_table(self) -> None:
        self.console.table_head()
        for record in self.records:
            self.console.table_row(record)

    def _is_finished(self) -> bool:
        config = self.config
        return (
            self.epoch >= config.epochs
            or (config.max_steps is not None and self.global_step >= config.max_steps and bool(self.records))
            or (config.target_nll is not None and any(r.test_nll <= config.target_nll for r in self.records))
        )

    def _run_epoch(self) -> None:
        """Train and evaluate one epoch, or the part of it that --max-steps leaves."""
        trainer, epoch = self.trainer, self.epoch
        end = min(self.num_batches, (self.config.max_steps or float("inf")) - epoch * self.num_batches)
        self.stopwatch = Stopwatch(trainer.synchronize, **self.watch)
        trainer.train_epoch(epoch, range(self.step, end), self.stopwatch, self._between, self.every.get("steps"))
        self.step, self.watch = end, self.stopwatch.state()
        loss = trainer.train_loss(epoch, end)
        begin = time.perf_counter()
        figures = trainer.evaluate()
        trainer.synchronize()
        record = self._record(loss, figures, time.perf_counter() - begin)
        self.console.hide_bar()
        if self.team.is_main:
            append_metrics(self.folder, record)
            self.mirror.log(record)
        self.console.table_row(record)
        if end < self.num_batches:  # kept as an epoch in progress, so that it can be continued with more steps
            self._checkpoint(due=bool(self.every))
            self.records.append(record)
            return
        self.epoch, self.step, self.watch = epoch + 1, 0, {}
        trainer.losses.zero_()
        self.records.append(record)
        trainer.poll()
        self._checkpoint(due=self._due_after_epoch() or trainer.checkpoint_due or trainer.stop_signal > 0)
        if trainer.stop_signal and not self._is_finished():
            self._stop()

    def _due_after_epoch(self) -> bool:
        every = self.every
        return ("epochs" in every and self.epoch % every["epochs"] == 0) or (
            "steps" in every and self.global_step % every["steps"] == 0
        )

    def _record(self, loss: float, figures: dict[str, Any], eval_seconds: float) -> EpochRecord:
        watch = self.stopwatch
        slowest = self.team.highest(watch.seconds, watch.warmup_seconds, eval_seconds, peak_memory_bytes(self.team))
        seconds, warmup, eval_seconds, memory = slowest
        times = watch.figures(seconds, warmup, self.team.size)
        return EpochRecord(
            epoch=self.epoch, step=self.global_step, train_loss=loss, **figures, **times, eval_seconds=eval_seconds,
            epoch_seconds=times["train_seconds"] + eval_seconds, peak_memory_bytes=int(memory),
        )

    def _between(self, step: int) -> None:
        """In a pause of an epoch, `step` steps of it done: a checkpoint, and the end if a signal asked for it."""
        self.step, self.watch = step, self.stopwatch.state()
        self.trainer.train_loss(self.epoch, step)  # no checkpoint of a run that has diverged
        self._checkpoint(due=True)
        if self.trainer.stop_signal:
            self._stop()

    def _stop(self) -> None:
        what_next = f"continue with --resume --output-dir {self.folder}" if self.every else "no checkpoint was wanted"
        raise Stopped(self.trainer.stop_signal, self.global_step, what_next)

    def _checkpoint(self, *, due: bool) -> None:
        trainer, scaler = self.trainer, self.team.accelerator.scaler
        if not due or not self.every:
            return
        state = {
            "epoch": self.epoch, "step": self.step, "watch": self.watch,
            "records": [asdict(record) for record in self.records],
            "run_id": self.run_id, "scaler": scaler.state_dict() if scaler else None,
            "fixed": self._fixed(), "kind": trainer.step.kind,
        }
        self.team.agree(lambda: save_checkpoint(self.folder / CHECKPOINTS, self.global_step, trainer.tensors(), state,
                                                self.config.keep_checkpoints))
        trainer.last_checkpoint = time.monotonic()

    def _fixed(self) -> dict[str, Any]:
        """What a run that continues this one may not change, by its name in an error message."""
        config = self.config
        values = {flag_of(option.name): getattr(config, option.name) for option in fields(config)
                  if option.metadata.get("fixed")}
        values["--mixed-precision"] = self.team.accelerator.mixed_precision  # also if a launcher says it
        if not config.reproducible:
            del values["--logical-shards"]
        return {**values, "global batch size": self.trainer.batch_size, "data set": self.sets.summary}

    def _take_up(self, kept: Checkpoint) -> None:
        """Continue where the checkpoint ends. Raises `UserError` if it belongs to another run."""
        for name, value in self._fixed().items():
            before = kept.state["fixed"].get(name)
            if before != value:
                raise UserError(f"{kept.folder} was written with {name} {before}, this run has {value}: continue with "
                                "the same, or give another --output-dir")
        self.epoch, self.step = kept.state["epoch"], kept.state["step"]
        self.records = [record_from(EpochRecord, record, kept.folder) for record in kept.state["records"]]
        self.watch, self.run_id = kept.state["watch"], kept.state["run_id"]

    def _load(self, kept: Checkpoint) -> None:
        self.trainer.load_tensors(kept.tensors)
        if kept.state["scaler"] and self.team.accelerator.scaler:
            self.team.accelerator.scaler.load_state_dict(kept.state["scaler"])

    def _write_result(self, status: str) -> RunSummary:
        trainer = self.trainer
        summary = RunSummary(
            global_batch_size=trainer.batch_size, per_device_batch_size=trainer.largest_share,
            learning_rate=trainer.learning_rate, compile_seconds=trainer.step.compile_seconds,
            **summarise(self.records, self.config.target_nll),
        )
        write_result(self.folder, RunResult(
            status=status, config=asdict(self.config), dataset=self.sets.summary, environment=self.environment,
            epochs=tuple(self.records), summary=summary,
        ))
        return summary

    def _leave(self) -> None:
        labels, guesses = leave_results(self.folder, self.trainer, self.config.seed, self.records)
        summary = self._write_result("completed")
        self.console.say(f"everything is in {self.folder}: {RESULT}, {METRICS}, {MODEL}, {PREDICTIONS}, "
                         f"{CURVES}")
        self.mirror.log_results(summary, labels, guesses, self.folder / MODEL,
                                [self.folder / PREDICTIONS, self.folder / CURVES])

    def finish_mirror(self) -> None:
        """End the run in W&B, within a time limit, and say how to sync an offline one."""
        self.mirror.finish()
        if hint := self.mirror.sync_hint():
            self.console.say(f"W&B was offline: to bring this run there, {hint}")
