"""One training run, from a config to the folder it leaves: set-up, epochs, checkpoints, results.

Every process runs all of this; what is written or said is the main one's. `train` is the only entry.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from typing import Any

import torch

from mnist_dist import launching, processes
from mnist_dist.checkpoint import Checkpoint, load_newest, replace_synced, save_checkpoint
from mnist_dist.config import TrainConfig
from mnist_dist.console import Console
from mnist_dist.data import ImageSets, load, obtain
from mnist_dist.errors import Diverged, LostProcess, MnistDistError, Stopped, UserError
from mnist_dist.loop import Trainer
from mnist_dist.metrics import Stopwatch
from mnist_dist.results import describe_environment, leave_results, peak_memory_bytes, summarise
from mnist_dist.tracking import METRICS, RESULT, Trackers, open_folder, write_config

# A run can be continued with other values of everything but these, which would make it another run.
MUST_NOT_CHANGE = ("lr", "lr_rule", "seed", "shuffle", "dtype", "reproducible", "logical_shards")


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
        name = team.agree(lambda: obtain(config.dataset, config.data_dir, config.mirror, console.warn), where="machine")
        run = Run(config, team, console, team.agree(lambda: load(name, config.data_dir), where="everywhere"))
        run.go()
    except LostProcess:
        raise  # there is nobody to meet
    except MnistDistError:
        team.part()
        raise
    except RuntimeError as error:
        lost = processes.lost_process(team, run.global_step if run else 0, error)
        if lost is None:
            raise
        raise lost from error
    finally:
        console.hide_bar()
    team.part()


class Run:
    """A run in its folder: where it is in its epochs, and what it has recorded."""

    def __init__(self, config: TrainConfig, team: processes.Team, console: Console, sets: ImageSets) -> None:
        self.team, self.console, self.sets = team, console, sets
        folder, run_id = team.agree(lambda: open_folder(config))
        self.config, self.folder = replace(config, output_dir=str(folder)), folder
        kept = team.agree(lambda: load_newest(folder / "checkpoints", console.warn)) if config.resume else None
        self.trainer = Trainer(config, team, sets, console.warn, kept and kept.state.get("kind"))
        self.num_batches = self.trainer.batches.num_batches
        self.trainer.progress = lambda step: console.progress(self.epoch, step, self.num_batches)
        self.epoch = self.step = 0  # the next step to take
        self.records: list[dict[str, Any]] = []
        self.watch: dict[str, float] = {}  # of an epoch that was interrupted
        interval = config.checkpoint_interval
        self.every = {interval.unit: interval.number} if interval.number else {}
        self.trainer.checkpoint_seconds = self.every.get("seconds", float("inf"))
        self.run_id = run_id
        if kept:
            self._resume(kept)
        team.agree(lambda: write_config(folder, config))  # not before: a refused --resume changes nothing
        self.environment = {**describe_environment(team), "step": self.trainer.step.kind}
        settings = {**asdict(self.config), "global_batch_size": self.trainer.batch_size,
                    "environment": self.environment}
        self.trackers = Trackers(team.accelerator, folder, self.config, self.run_id, settings, console.warn)
        self.trackers.run_folder.start_over(self.records)

    @property
    def global_step(self) -> int:
        """Optimizer steps done since the start of the run."""
        return self.epoch * self.num_batches + self.step

    def go(self) -> None:
        """Train to the end, and leave the results. Raises `Diverged` or `Stopped`, with what there is written."""
        self._introduce()
        finished = self._is_finished()
        with self.trainer.signals:
            try:
                while not finished:
                    finished = self._run_epoch()
            except Diverged:
                if self.team.is_main:
                    self._write_result("diverged")
                raise
        if self.team.is_main:
            self._leave()

    def _introduce(self) -> None:
        trainer, say = self.trainer, self.console.say
        place, size = self.environment, self.team.size
        say(f"{size} {'process' if size == 1 else 'processes'} on {place['device_name']} ({place['device']}), "
            f"{place['num_threads']} threads each; {self.sets.name}: {len(self.sets.train):,} training and "
            f"{len(self.sets.test):,} test images")
        say(f"global batch {trainer.batch_size} = {'at most ' if trainer.batch_size % self.team.size else ''}"
            f"{trainer.largest_share} per process, {self.num_batches:,} steps per epoch, Adam at "
            f"{trainer.learning_rate:g}, {self.config.dtype}, mixed precision {place['mixed_precision']}, "
            f"{place['step']} step"
            + (f" ({trainer.step.compile_seconds:.1f} s)" if trainer.step.compile_seconds else ""))
        if self.config.resume:
            say(f"continuing after step {self.global_step}" if self.global_step else
                "nothing to continue: starting afresh")
        say(f"writing to {self.folder}")
        self.console.table_head()
        for record in self.records:
            self.console.table_row(record)

    def _is_finished(self) -> bool:
        config = self.config
        return (
            self.epoch >= config.epochs
            or (config.max_steps is not None and self.global_step >= config.max_steps and bool(self.records))
            or (config.target_nll is not None and any(r["test_nll"] <= config.target_nll for r in self.records))
        )

    def _run_epoch(self) -> bool:
        """Train and evaluate one epoch, or the part of it that --max-steps leaves; whether the run is finished."""
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
        self.trackers.log(record)
        self.console.table_row(record)
        if end < self.num_batches:  # kept as an epoch in progress, so that it can be continued with more steps
            self._checkpoint(due=bool(self.every))
            self.records.append(record)
            return True
        self.epoch, self.step, self.watch = epoch + 1, 0, {}
        trainer.losses.zero_()
        self.records.append(record)
        trainer.poll()
        self._checkpoint(due=self._due_after_epoch() or trainer.checkpoint_due or trainer.stop_signal > 0)
        finished = self._is_finished()
        if trainer.stop_signal and not finished:
            self._stop()
        return finished

    def _due_after_epoch(self) -> bool:
        every = self.every
        return ("epochs" in every and self.epoch % every["epochs"] == 0) or (
            "steps" in every and self.global_step % every["steps"] == 0
        )

    def _record(self, loss: float, figures: dict[str, Any], eval_seconds: float) -> dict[str, Any]:
        watch = self.stopwatch
        slowest = self.team.highest(watch.seconds, watch.warmup_seconds, eval_seconds, peak_memory_bytes(self.team))
        seconds, warmup, eval_seconds, memory = slowest
        times = watch.figures(seconds, warmup, self.team.size)
        return {
            "epoch": self.epoch, "step": self.global_step, "train_loss": loss, **figures, **times,
            "eval_seconds": eval_seconds, "epoch_seconds": times["train_seconds"] + eval_seconds,
            "peak_memory_bytes": int(memory),
        }

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
            "epoch": self.epoch, "step": self.step, "records": self.records, "watch": self.watch,
            "run_id": self.run_id, "scaler": scaler.state_dict() if scaler else None,
            "fixed": self._fixed(), "kind": trainer.step.kind,
        }
        self.team.agree(lambda: save_checkpoint(self.folder / "checkpoints", self.global_step, trainer.tensors(), state,
                                                self.config.keep_checkpoints))
        trainer.last_checkpoint = time.monotonic()

    def _fixed(self) -> dict[str, Any]:
        values = {name: getattr(self.config, name) for name in MUST_NOT_CHANGE}
        if not self.config.reproducible:
            del values["logical_shards"]
        return {**values, "global batch size": self.trainer.batch_size, "data set": self.sets.summary}

    def _resume(self, kept: Checkpoint) -> None:
        for name, value in self._fixed().items():
            if kept.state["fixed"].get(name) != value:
                raise UserError(f"{kept.folder} was written with {name} {kept.state['fixed'].get(name)}, this run has "
                                f"{value}: continue with the same, or give another --output-dir")
        self.trainer.load_tensors(kept.tensors)
        self.epoch, self.step, self.records = (kept.state[name] for name in ("epoch", "step", "records"))
        self.watch, self.run_id = kept.state["watch"], kept.state["run_id"]
        if kept.state["scaler"] and self.team.accelerator.scaler:
            self.team.accelerator.scaler.load_state_dict(kept.state["scaler"])

    def _write_result(self, status: str) -> dict[str, Any]:
        summary = {
            "global_batch_size": self.trainer.batch_size,
            "per_device_batch_size": self.trainer.largest_share,
            "learning_rate": self.trainer.learning_rate, "compile_seconds": self.trainer.step.compile_seconds,
            **summarise(self.records, self.config.target_nll),
        }
        result = {
            "status": status, "config": asdict(self.config), "dataset": self.sets.summary,
            "environment": self.environment, "epochs": self.records, "summary": summary,
        }
        replace_synced(self.folder / RESULT, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
        return summary

    def _leave(self) -> None:
        predictions = leave_results(self.folder, self.trainer, self.config.seed, self.records)
        self.trackers.mirror_results(self._write_result("completed"), predictions)
        say = self.console.say
        say(f"everything is in {self.folder}: {RESULT}, {METRICS}, model.safetensors, predictions.png, curves.png")
        if hint := self.trackers.sync_hint():
            say(f"W&B was offline: to bring this run there, {hint}")
