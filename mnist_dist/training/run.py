"""One training run, from a config to the folder that it leaves. Every rank runs all of this; the main one writes.

Read `train`, then `Run.go`: start or resume, then for each epoch train, evaluate, record and save; leave the results.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mnist_dist.config import TrainConfig
from mnist_dist.console import Console
from mnist_dist.data import ImageSets, check_name, load, obtain
from mnist_dist.disk.lock import FolderLock
from mnist_dist.errors import Diverged, MnistDistError, OfThisProcess, Stopped, UserError
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.network_interface import choose_interface
from mnist_dist.processes.spawn import runs_on_cpu
from mnist_dist.processes.stop_signals import stop_with_launcher
from mnist_dist.processes.team import Team, ddp_options, join
from mnist_dist.record.checkpoint import FORMAT, Checkpoint, CheckpointWriter
from mnist_dist.record.figures import EpochRecord, RunSummary, samples_at, summarise
from mnist_dist.record.rank_summary import over_ranks
from mnist_dist.record.result import RunResult, write_result
from mnist_dist.record.run_folder import (
    CHECKPOINTS,
    METRICS,
    STEPS,
    WINDOWS,
    append_all,
    append_metrics,
    cut_back,
    open_folder,
    read_points,
    remove_result,
    write_config,
    write_metrics,
    writing,
)
from mnist_dist.record.wandb_run import Mirror, Rows, run_name
from mnist_dist.text import first_line, without_passwords
from mnist_dist.training.device_events import DeviceMarks
from mnist_dist.training.losses import Display, LossLog
from mnist_dist.training.metrics import Stopwatch
from mnist_dist.training.pauses import Pacer
from mnist_dist.training.progress import Progress
from mnist_dist.training.results import describe_environment, leave_results, load_model, peak_memory_bytes, predict
from mnist_dist.training.resume import (
    BATCH,
    DATA,
    PRECISION,
    Earlier,
    fixed_options,
    has_ended,
    look_at,
)
from mnist_dist.training.trainer import Trainer

RESTART_SECONDS = 30.0  # that a start waits for the one before it, which may still write its last checkpoint


def train(config: TrainConfig, launch: Launch) -> None:
    """Run `config` with the processes of this launch. Raises `MnistDistError` if the run ends early."""
    with ExitStack() as held:
        _train(config, launch, held)


def _train(config: TrainConfig, launch: Launch, held: ExitStack) -> None:
    """As `train`; `held` gives back the run's folder at the end."""
    if launch.has_store:  # torch's elastic launcher, which starts processes in its main thread
        stop_with_launcher()
    if config.compile == "auto" and launch.compiles:
        config = replace(config, compile="on")
    interface = choose_interface(launch)
    team = join(
        launch, timeout_s=config.timeout, mixed_precision=mixed_precision(config, launch), options=config.common,
        dynamo_backend="no",  # it would compile the model alone: we compile the whole step
        kwargs_handlers=[ddp_options(config.gradient_compression)],
    )
    console = Console(team.is_main, config.quiet)
    if interface and launch.num_machines > 1:
        console.say(f"{launch.num_machines} machines, over the network interface {interface}: GLOO_SOCKET_IFNAME names "
                    "another")
    if team.clocks_apart:
        console.warn(team.clocks_apart)
    run = None
    try:
        try:
            config = of_earlier_start(config, team)
            name = team.run_on("machine", lambda: obtain(config.dataset, config.data_dir, config.mirror, console.warn),
                               patient=True)
            sets = team.run_on("every", lambda: load(name, config.data_dir))
            digest = common_digest(team, sets.digest() if launch.local_rank == 0 else None)
            notes: list[str] = []
            team.run_on("main", lambda: check_name(name, config.data_dir, digest, notes.append))
            run = Run(config, launch, team, console, sets, {**sets.summary, "digest": digest}, held, notes)
            run.go()
        except OfThisProcess:
            raise  # a barrier would wait for others
        except MnistDistError as error:
            if team.starts and team.is_main and not isinstance(error, Stopped):
                team.starts.end = error.exit_status, str(error)
            if run:
                # before any rank ends: a launcher would then end the main one, which has a line to print
                team.run_on("main", partial(run.mirror.finish, error.exit_status), patient=True)
            team.end()
            raise
        finally:
            console.hide_bar()
        team.end()  # the other ranks need not wait for W&B
    except torch.OutOfMemoryError as error:
        step = run.progress.global_step if run else 0
        raise OfThisProcess(f"process {team.rank} of {team.size} has no GPU memory left after step {step}: give a "
                            "smaller batch or more --gradient-accumulation-steps, or end what else runs on this GPU "
                            f"({first_line(error)})") from error
    except RuntimeError as error:
        lost = team.lost_process(run.progress.global_step if run else 0, error, starts_again=launch.starts_again)
        if lost is None:
            raise
        raise lost from error
    run.mirror.finish()
    if hint := run.mirror.sync_hint():
        console.say(f"W&B was offline: to bring this run there, {hint}")
    elif not run.mirror.is_whole:  # what wandb keeps of an online run is not whole until it ends
        console.say("once W&B answers, the same command with --resume sends it the run again")


def common_digest(team: Team, digest: str | None) -> str:
    """The digest of the data; the first process of each machine brings that of its copy. Raises `UserError` if the
    copies differ. Collective.
    """
    first, *others = [(found, host) for found, host in zip(team.share(digest), team.hosts, strict=True) if found]
    for found, host in others:
        if found != first[0]:
            raise UserError(f"the data set is {first[0][:12]} on {first[1]} and {found[:12]} on {host}: copy the same "
                            "files to every machine")
    return first[0]


def of_earlier_start(config: TrainConfig, team: Team) -> TrainConfig:
    """The config that continues the run of an earlier start of this launch, if one has opened its folder. Raises
    `MnistDistError` if that run has ended for good: the same options would end it again.
    """
    if not team.starts:
        return config
    if end := team.starts.end:
        again = MnistDistError(end[1])
        again.exit_status = end[0]
        raise again
    folder = team.starts.folder
    return config if folder is None else replace(config, output_dir=folder, resume=True)


def mixed_precision(config: TrainConfig, launch: Launch) -> str:
    """The mixed precision in force: what was asked for, else the launcher's. Raises `UserError` if it cannot be."""
    wanted = "no" if config.dtype == "float64" else config.mixed_precision or launch.mixed_precision
    if wanted not in ("no", "fp16", "bf16"):
        raise UserError(f"the launcher's mixed precision must be no, fp16 or bf16; got {wanted!r}")
    if wanted == "fp16" and runs_on_cpu(launch):
        raise UserError("--mixed-precision fp16 needs a GPU, and this run is on the CPU: give bf16 or no")
    if wanted != "no" and config.reproducible:  # the launcher may have set it
        raise UserError(f"--reproducible and mixed precision {wanted} exclude each other: give --mixed-precision no, "
                        "or drop --reproducible")
    return wanted


class Run:
    """A run in its folder: the next step to take, and what is recorded so far. `data` is the data set as the record
    has it, and `notes` are lines about it; `held` gives the folder's lock back.
    """

    def __init__(self, config: TrainConfig, launch: Launch, team: Team, console: Console, sets: ImageSets,
                 data: Mapping[str, Any], held: ExitStack, notes: Sequence[str]) -> None:
        self.team, self.console, self.sets, self.data, self.held = team, console, sets, data, held
        self.lock: FolderLock | None = None  # of the main process
        wait_s = RESTART_SECONDS if launch.restart or launch.max_restarts else 0.0
        self.folder, run_id = team.run_on("main", partial(self._open_folder, config, wait_s))
        if team.starts and team.is_main:
            team.starts.folder = str(self.folder)
        # as it is written down: without a password, and with the same data from any working directory
        self.config = replace(config, output_dir=str(self.folder), dataset=sets.name,
                              data_dir=str(Path(config.data_dir).absolute()),
                              mirror=config.mirror and without_passwords(config.mirror))
        self.mirror = Mirror(self.folder, console.warn)
        earlier = Earlier()
        if config.resume:
            earlier = team.run_on("main", lambda: look_at(self.folder, console.warn))
        kept = earlier.checkpoint
        self.trainer = Trainer(config, team, sets, kept and kept.state)
        self.rows = Rows(len(sets.train), self.trainer.global_batch_size)
        self.losses = LossLog(config.log_interval, self.trainer.batches)
        self.display = Display(console, config, self.trainer.batches, self.trainer.sums, team.size)
        self.progress = Progress(run_id, self.trainer.batches.num_batches)
        every, batches = config.evaluation_samples, self.trainer.batches
        self.pacer = Pacer(config.checkpoint_interval, batches.num_batches, team,
                           evaluates_after=lambda epoch: batches.steps_of_samples(every, epoch) if every else ())
        self.checkpoints = CheckpointWriter(self.folder / CHECKPOINTS, config.keep_checkpoints,
                                            self.lock.check if self.lock else lambda: None)
        earlier.refuse_changes(self._fixed())
        self.is_over = earlier.result is not None and has_ended(config, earlier.result.epochs, batches.num_batches)
        self.result = earlier.result
        if self.is_over:
            return
        if earlier.result and not kept:
            raise UserError(f"{self.folder} holds a completed run and no checkpoint to continue it from: give another "
                            "--output-dir")
        if kept:
            self._restore(kept)
        self.environment = describe_environment(launch, team, "compiled" if self.trainer.compiles else "plain",
                                                self.trainer.onednn_from)
        console.introduce(self.environment, self.config, sets.summary, notes, self.trainer.global_batch_size,
                          self.trainer.per_device_batch_size, self.progress.num_batches, self.trainer.learning_rate)
        if config.resume:
            console.say(f"continuing after step {self.progress.global_step}" if kept
                        else "no checkpoint: starting at step 0")
        self._make_step(was_compiled=launch.restart > 0)
        if kept:
            self.trainer.load_tensors(kept.tensors)
            if kept.state.get("scaler") and team.accelerator.scaler:
                team.accelerator.scaler.load_state_dict(kept.state["scaler"])

    def _open_folder(self, config: TrainConfig, wait_s: float) -> tuple[Path, str]:
        folder, run_id, self.lock = open_folder(config, wait_s)
        self.held.callback(self.lock.release)
        if not self.lock.is_locked:
            self.console.warn(f"the file system of {folder} has no locks: a second start in it would not be noticed")
        return folder, run_id

    def _write(self, task: Callable[[], None], *, patient: bool = False) -> None:
        """Write to the folder, on the main process, if it is still the folder of this run. Collective."""
        def checked() -> None:
            assert self.lock is not None
            self.lock.check()
            task()

        self.team.run_on("main", checked, patient=patient)

    def go(self) -> None:
        """Train to the end, and leave the results. Raises `Diverged` or `Stopped`, with what there is written."""
        if self.is_over:
            self.console.say(f"{self.folder} holds a run that is completed: nothing is left to do, and nothing changes "
                             "(to train on, give a larger --epochs, or another --max-steps or --target-nll)")
            self.team.run_on("main", self._send_again, patient=True)
            return
        self._open_record()
        with self.pacer.signals, self.checkpoints, self.trainer.neighbours as neighbours:
            try:
                while not self._is_finished():
                    self._run_epoch()
            except Diverged:
                with suppress(MnistDistError):  # of a full disk: why the run ended matters more
                    self._leave("diverged")
                raise
            self._wait_for_checkpoint()
        if neighbours.seconds:
            self.console.say(f"for {math.ceil(neighbours.seconds)} s other processes wanted this machine's cores: the "
                             "times are not those of a quiet machine")
        self._leave("completed")

    def _send_again(self) -> None:
        """Send a completed run to W&B, if W&B has not taken all of it yet."""
        result, test = self.result, self.sets.test
        if result is None or not self.mirror.is_unsent:
            return
        settings = {**result.config, "global_batch_size": result.summary.global_batch_size,
                    "environment": asdict(result.environment)}
        self.mirror.start(self.config, result.run_id or self.progress.run_id, settings, name=self._name)
        self.mirror.log_again(self.rows.of_run(result.epochs, (), read_points(self.folder)))
        guesses = predict(load_model(self.folder), test.images).argmax(dim=1)
        self.mirror.log_results(result.summary, test.labels.tolist(), guesses.tolist(),
                                self._of_model(result.epochs[-1]))

    @property
    def _name(self) -> str:
        return run_name(self.trainer.global_batch_size, self.team.size, self.config.lr, self.config.seed)

    def _of_model(self, record: EpochRecord) -> dict[str, Any]:
        """What W&B keeps beside the model: how good it is, what it is, and on which data."""
        return {"test_nll": record.test_nll, "test_accuracy": record.test_accuracy, "epoch": record.epoch,
                "step": record.step, "sizes": list(self.trainer.module.sizes), **dict(self.data)}

    def _run_epoch(self) -> None:
        """Train and evaluate one epoch, or the part of it that --max-steps leaves; record it, save a checkpoint."""
        trainer, pacer, progress = self.trainer, self.pacer, self.progress
        epoch = progress.epoch
        end = progress.num_batches
        if self.config.max_steps is not None:
            end = min(end, self.config.max_steps - epoch * progress.num_batches)
        watch = Stopwatch(self.team.synchronize, exchange_clock=lambda: self.team.exchange_seconds,
                          marks=DeviceMarks(self.team.wait_for) if self.team.queues else None, **progress.watch)
        self.display.start(progress.step)
        for done in trainer.steps(epoch, range(progress.step, end), watch, pacer, partial(self.display.show, epoch)):
            progress.step, progress.watch = done, watch.state()
            self._mean_loss(watch, done)  # no checkpoint of a run that has diverged
            if pacer.wants_evaluation(epoch, done) and self._evaluate_within(watch):
                end = done
                break
            self.display.start(done)
            if pacer.wants_checkpoint(epoch, done):
                self._save()
                self._stop_if_asked()
        progress.step, progress.watch = end, watch.state()
        record = self._evaluate(watch)
        if end < progress.num_batches:  # kept as an epoch in progress, so that it can be continued with more steps
            progress.ending = record
            self._save()
            return
        progress.next_epoch()
        trainer.sums.zero_()
        progress.records.append(record)
        pacer.poll()
        if pacer.wants_checkpoint_after(epoch):
            self._save()
        if not self._is_finished():
            self._stop_if_asked()

    def _is_finished(self) -> bool:
        return has_ended(self.config, self.progress.all_records, self.progress.num_batches)

    def _evaluate_within(self, watch: Stopwatch) -> bool:
        """Evaluate between two steps; whether the lowest target is reached, which ends the run. Collective."""
        test, targets = self._test(), self.config.targets
        (seconds,) = self.team.max(watch.seconds + watch.warmup_seconds)
        evaluation = self._add_evaluation(test["test_nll"], test["test_accuracy"], seconds)
        self.console.evaluation_row(self.progress.epoch, evaluation)
        if self.team.is_main:
            self.mirror.log([self.rows.of_evaluation(evaluation)])
        self.trainer.module.train()
        return bool(targets) and test["test_nll"] <= targets[-1]

    def _add_evaluation(self, test_nll: float, test_accuracy: float, seconds: float) -> dict[str, Any]:
        """Record an evaluation within the epoch, after so many seconds of training in it."""
        progress = self.progress
        evaluation = {
            "step": progress.global_step,
            "samples": samples_at(progress.global_step, len(self.sets.train), self.trainer.global_batch_size),
            "train_seconds": sum(record.train_seconds for record in progress.records) + seconds,
            "test_nll": test_nll, "test_accuracy": test_accuracy,
        }
        progress.evaluations.append(evaluation)
        return evaluation

    def _evaluate(self, watch: Stopwatch) -> EpochRecord:
        """The record of the epoch whose steps are done, shown and written. Collective."""
        team, progress = self.team, self.progress
        loss = self._mean_loss(watch, progress.step)
        noise = self.trainer.noise._asdict()
        begin = time.perf_counter()
        test = self._test()
        team.synchronize()
        totals = (watch.seconds, watch.warmup_seconds, time.perf_counter() - begin)
        own = {**watch.of_this_rank(), "peak_memory_bytes": peak_memory_bytes(team), "host": platform.node()}
        everyone = team.share((totals, own))
        seconds, warmup, evaluation = map(max, zip(*(totals for totals, _ in everyone), strict=True))
        ranks = over_ranks([own for _, own in everyone])
        times = watch.figures(seconds, warmup, team.size)
        record = EpochRecord(
            epoch=progress.epoch, step=progress.global_step, train_loss=loss, **noise, **test, **times,
            eval_seconds=evaluation, epoch_seconds=times["train_seconds"] + evaluation, ranks=ranks,
            evaluations=progress.evaluations, peak_memory_bytes=ranks["peak_memory_bytes"]["max"],
        )
        self._write(lambda: self._append(record))
        if team.is_main:
            self.mirror.log([self.rows.of_epoch(record)])
        self.console.epoch_row(record)
        return record

    def _append(self, record: EpochRecord) -> None:
        self._write_points()
        append_metrics(self.folder, record)
        append_all(self.folder / WINDOWS, [{"epoch": record.epoch, "windows": record.windows}])

    def _mean_loss(self, watch: Stopwatch, done: int) -> float:
        """Mean loss per sample of the epoch's steps so far. Its new points are kept for the folder, and go to W&B now,
        which takes rows in the order of their steps. Raises `Diverged` if a loss is not finite; the points before it
        are kept. Collective.
        """
        try:
            loss = self.trainer.train_loss(self.progress.epoch, done)
        except Diverged:
            self._keep_points(watch, done)
            raise
        self._keep_points(watch, done)
        return loss

    def _keep_points(self, watch: Stopwatch, done: int) -> None:
        losses, times = self.trainer.losses, watch.step_seconds
        if self.team.is_main:
            with_loss = max(0, len(times) - done + len(losses))  # where a step diverges, fewer losses than steps
            if new := self.losses.add(self.progress.epoch, losses, times[:with_loss]):
                self.mirror.log(list(map(self.rows.of_point, new)))

    def _write_points(self) -> None:
        """Write the points that are not in the folder yet, on the main process."""
        if self.losses.unwritten:
            append_all(self.folder / STEPS, self.losses.unwritten)
            self.losses.unwritten.clear()

    def _test(self) -> dict[str, Any]:
        """The figures of the test. Raises `Diverged` if the last step has made the weights useless. Collective."""
        test = self.trainer.evaluate()
        if not math.isfinite(test["test_nll"]):
            raise Diverged(f"training diverged: the test NLL is {test['test_nll']} after step "
                           f"{self.progress.global_step} (epoch {self.progress.epoch}); try a smaller --lr than "
                           f"{self.trainer.learning_rate:g}")
        return test

    def _stop_if_asked(self) -> None:
        if self.pacer.stop_signal:
            self._wait_for_checkpoint()
            what_next = (f"continue with --resume --output-dir {self.folder}" if self.pacer.is_on
                         else "no checkpoint was wanted")
            raise Stopped(self.pacer.stop_signal, self.progress.global_step, what_next)

    def _make_step(self, *, was_compiled: bool) -> None:
        trainer, say = self.trainer, self.console.say
        if trainer.compiles:
            say("compiling the step: some 3 s, and some 10 s the first time on a machine")
        trainer.make_step(self.console.warn, was_compiled=was_compiled)
        if trainer.step.compile_seconds:
            say(f"compiled in {trainer.step.compile_seconds:.1f} s")
        self.environment = replace(self.environment, step=trainer.step.kind)

    def _open_record(self) -> None:
        """Write what the folder holds from the start, and begin the run in W&B. Not earlier: a --resume that is refused
        changes nothing. Collective.
        """
        records = self.progress.all_records
        self.losses.start(self.progress.global_step)

        def task() -> None:
            remove_result(self.folder)
            write_config(self.folder, self.config)
            write_metrics(self.folder, records)
            cut_back(self.folder / STEPS, lambda line: line["step"] <= self.progress.global_step)
            cut_back(self.folder / WINDOWS, lambda line: line["epoch"] < len(records))
            self.checkpoints.tidy(self.progress.global_step)
            self.mirror.start(self.config, self.progress.run_id, {
                **asdict(self.config), "global_batch_size": self.trainer.global_batch_size,
                "environment": asdict(self.environment),
            }, name=self._name)
            self.mirror.log_again(self.rows.of_run(records, self.progress.evaluations, read_points(self.folder)))

        self._write(task, patient=True)
        self.console.table_head()
        self.console.earlier_rows(records, self.folder / METRICS)
        for evaluation in self.progress.evaluations:
            self.console.evaluation_row(self.progress.epoch, evaluation)

    def _save(self) -> None:
        """Begin to write a checkpoint, if any are wanted. Collective."""
        if not self.pacer.is_on:
            return
        scaler = self.team.accelerator.scaler
        state = {
            **self.progress.state(),
            "scaler": scaler.state_dict() if scaler else None,
            "format": FORMAT, "fixed": self._fixed(), "kind": self.trainer.step.kind,
            "onednn_from": self.trainer.onednn_from,
        }
        step = self.progress.global_step

        def task() -> None:
            self._write_points()  # before the checkpoint, from which a resume goes on with the next point
            self.checkpoints.write(step, self.trainer.tensors(), state)

        self._write(task)
        self.pacer.saved()

    def _wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is whole. Collective."""
        self.team.run_on("main", self.checkpoints.wait)

    def _fixed(self) -> dict[str, Any]:
        """What a run that continues this one may not change, by its name in an error message."""
        precision = self.team.accelerator.mixed_precision  # the launcher may have set it
        return {**fixed_options(asdict(self.config)), PRECISION: precision, BATCH: self.trainer.global_batch_size,
                DATA: self.data}

    def _restore(self, kept: Checkpoint) -> None:
        """Continue from the end of the checkpoint. Raises `UserError` if another program wrote it."""
        progress = self.progress
        progress.restore(kept)
        if progress.ending and not self._is_finished():  # the epoch goes on
            last, progress.ending = progress.ending, None
            # --max-steps ended the run at a step after which a longer run evaluates within the epoch
            if (self.pacer.wants_evaluation(progress.epoch, progress.step)
                    and progress.global_step not in [one["step"] for one in progress.evaluations]):
                self._add_evaluation(last.test_nll, last.test_accuracy, last.train_seconds)
        for name, tensor in self.trainer.tensors().items():
            found = kept.tensors.get(name)
            if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(f"{kept.folder} has no tensor {name} of {list(tensor.shape)} {tensor.dtype}: another "
                                "program wrote it; remove it, or give another --output-dir")

    def _leave(self, status: str) -> None:
        """Write `result.json`, and before it, of a completed run, the model and the pictures. Collective."""
        self._write(lambda: self._leave_here(status), patient=True)

    def _leave_here(self, status: str) -> None:
        trainer, done, records = self.trainer, status == "completed", self.progress.all_records
        summary = RunSummary(
            global_batch_size=trainer.global_batch_size, per_device_batch_size=trainer.per_device_batch_size,
            learning_rate=trainer.learning_rate, compile_seconds=trainer.step.compile_seconds,
            **self.checkpoints.figures(),
            **summarise(records, self.config.targets, len(self.sets.train), trainer.global_batch_size),
        )
        self._write_points()
        with writing(self.folder):
            predictions = leave_results(self.folder, trainer, self.config.seed, records) if done else None
            write_result(self.folder, RunResult(
                status=status, config=asdict(self.config), dataset=self.data, environment=self.environment,
                epochs=tuple(records), summary=summary, run_id=self.progress.run_id,
            ))
        if predictions:
            self.console.close(self.folder, summary, records)
            self.mirror.log_results(summary, *predictions, self._of_model(records[-1]))
