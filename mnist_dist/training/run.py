"""One training run, from a config to the folder that it leaves. Every rank runs all of this; the main one writes.

Read `train`, then `Run`: it opens the folder, starts or resumes, and leaves the results. loop.py has the epochs,
recorder.py what is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from mnist_dist.errors import Diverged, LocalError, MnistDistError, Stopped, UserError
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.network_interface import choose_interface
from mnist_dist.processes.spawn import runs_on_cpu
from mnist_dist.processes.stop_signals import stop_with_launcher
from mnist_dist.processes.team import Team, ddp_options, join
from mnist_dist.processes.watchdog import Watchdog
from mnist_dist.record.run_folder import close_folder, open_folder
from mnist_dist.text import first_line, without_passwords
from mnist_dist.training.loop import Loop
from mnist_dist.training.losses import Display
from mnist_dist.training.pauses import PauseSchedule
from mnist_dist.training.progress import Progress
from mnist_dist.training.recorder import Recorder
from mnist_dist.training.results import describe_environment
from mnist_dist.training.resume import BATCH, DATA, PRECISION, Earlier, fixed_options, has_ended, look_at
from mnist_dist.training.steps.fused import excluded_by
from mnist_dist.training.trainer import Trainer

RESTART_SECONDS = 30.0  # that a start waits for the previous start, which may still write its last checkpoint


def train(config: TrainConfig, launch: Launch) -> None:
    """Run `config` with the processes of this launch. Raises `MnistDistError` if the run ends early."""
    with ExitStack() as held:
        _train(config, launch, held)


def _train(config: TrainConfig, launch: Launch, held: ExitStack) -> None:
    """As `train`; `held` releases the lock of the run's folder at the end."""
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
            config = config_after_restart(config, team)
            name = team.run_on("machine", lambda: obtain(config.dataset, config.data_dir, config.mirror, console.warn),
                               patient=True)
            sets = team.run_on("every", lambda: load(name, config.data_dir))
            digest = common_digest(team, sets.digest() if launch.local_rank == 0 else None)
            notes: list[str] = []
            team.run_on("main", lambda: check_name(name, config.data_dir, digest, notes.append))
            run = Run(config, launch, team, console, sets, {**sets.summary, "digest": digest}, held, notes)
            run.train()
        except LocalError:
            raise  # a barrier would wait for others
        except MnistDistError as error:
            if team.restart_state and team.is_main and not isinstance(error, Stopped):
                team.restart_state.end = error.exit_status, str(error)
            if run:
                # before any rank ends: a launcher would then end the main rank, which has a line to print
                team.run_on("main", partial(run.recorder.mirror.finish, error.exit_status), patient=True)
            team.end()
            raise
        finally:
            console.hide_bar()
        team.end()  # the other ranks need not wait for W&B
    except torch.OutOfMemoryError as error:
        step = run.progress.global_step if run else 0
        raise LocalError(f"process {team.rank} of {team.size} has no GPU memory left after step {step}: give a "
                         "smaller batch or more --gradient-accumulation-steps, or end what else runs on this GPU "
                         f"({first_line(error)})") from error
    except RuntimeError as error:
        lost = team.lost_process(run.progress.global_step if run else 0, error, starts_again=launch.starts_again)
        if lost is None:
            raise
        raise lost from error
    run.recorder.mirror.finish()
    if hint := run.recorder.mirror.sync_hint():
        console.say(f"W&B was offline: to bring this run there, {hint}")
    elif not run.recorder.mirror.is_whole:  # what wandb keeps of an online run is not whole until it ends
        console.say("once W&B answers, the same command with --resume sends it the run again")


def common_digest(team: Team, digest: str | None) -> str:
    """The digest of the data; the first process of each machine brings that of its copy. Raises `UserError` if the
    copies differ. Collective.
    """
    first, *others = [(copy, host) for copy, host in zip(team.share(digest), team.hosts, strict=True) if copy]
    for copy, host in others:
        if copy != first[0]:
            raise UserError(f"the data set is {first[0][:12]} on {first[1]} and {copy[:12]} on {host}: copy the same "
                            "files to every machine")
    return first[0]


def config_after_restart(config: TrainConfig, team: Team) -> TrainConfig:
    """The config that continues the run of an earlier start of this launch, if one has opened its folder. Raises
    `MnistDistError` if that run has ended for good: the same options would end it again.
    """
    if not team.restart_state:
        return config
    if end := team.restart_state.end:
        again = MnistDistError(end[1])
        again.exit_status = end[0]
        raise again
    folder = team.restart_state.folder
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
    """A run in its folder, from its start or its newest checkpoint on. `data` is the data set as the record has it, and
    `notes` are lines about it; `held` releases the folder's lock.
    """

    def __init__(self, config: TrainConfig, launch: Launch, team: Team, console: Console, sets: ImageSets,
                 data: Mapping[str, Any], held: ExitStack, notes: Sequence[str]) -> None:
        self.team, self.console, self.data = team, console, data
        wait_s = RESTART_SECONDS if launch.restart or launch.max_restarts else 0.0
        self.lock: FolderLock | None = None  # of the main process
        self.folder, run_id = team.run_on("main", partial(self._open_folder, config, wait_s, held))
        if team.restart_state and team.is_main:
            team.restart_state.folder = str(self.folder)
        # as it is written down: without a password, and with the same data from any working directory
        self.config = replace(config, output_dir=str(self.folder), dataset=sets.name,
                              data_dir=str(Path(config.data_dir).absolute()),
                              mirror=config.mirror and without_passwords(config.mirror))
        earlier = team.run_on("main", lambda: look_at(self.folder, console.warn)) if config.resume else Earlier()
        checkpoint = earlier.checkpoint
        self.trainer = Trainer(config, team, sets, checkpoint and checkpoint.state)
        batches = self.trainer.batches
        self.progress = Progress(run_id, batches.num_batches)
        self.recorder = Recorder(self.config, team, console, self.trainer, self.progress, self.folder, self.lock, data)
        every = config.evaluation_samples
        schedule = PauseSchedule(config.checkpoint_interval, batches.num_batches, team,
                                 evaluates_after=lambda epoch: batches.steps_of_samples(every, epoch) if every else ())
        fixed = self._fixed()
        self.loop = Loop(self.config, team, self.trainer, schedule, self.progress, self.recorder,
                         Display(console, config, batches, self.trainer.sums, team.size), fixed)
        earlier.refuse_changes(fixed)
        is_over = earlier.result is not None and has_ended(config, earlier.result.epochs, batches.num_batches)
        self.earlier_result = earlier.result if is_over else None
        if is_over:
            return
        if earlier.result and not checkpoint:
            raise UserError(f"{self.folder} holds a completed run and no checkpoint to continue it from: give another "
                            "--output-dir")
        if checkpoint:
            self.loop.restore(checkpoint)
        self.environment = describe_environment(launch, team, self.trainer.kind, self.trainer.onednn_from)
        console.introduce(self.environment, self.config, sets.summary, notes, self.trainer.global_batch_size,
                          self.trainer.per_device_batch_size, self.progress.num_batches, self.trainer.learning_rate)
        if config.resume:
            console.say(f"continuing after step {self.progress.global_step}" if checkpoint
                        else "no checkpoint: starting at step 0")
        self._make_step(was_compiled=launch.restart > 0)
        if checkpoint:
            self.trainer.load_tensors(checkpoint.tensors)
            if checkpoint.state.get("scaler") and team.accelerator.scaler:
                team.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    def _open_folder(self, config: TrainConfig, wait_s: float, held: ExitStack) -> tuple[Path, str]:
        is_new = config.output_dir is None or not Path(config.output_dir).exists()
        folder, run_id, self.lock = open_folder(config, wait_s)
        held.callback(close_folder, folder, self.lock, is_new)
        if not self.lock.is_locked:
            self.console.warn(f"the file system of {folder} has no locks: a second start in it would not be noticed")
        return folder, run_id

    def _fixed(self) -> dict[str, Any]:
        """What a run that continues this one may not change, by its name in an error message."""
        precision = self.team.accelerator.mixed_precision  # the launcher may have set it
        return {**fixed_options(asdict(self.config)), PRECISION: precision, BATCH: self.trainer.global_batch_size,
                DATA: self.data}

    def _make_step(self, *, was_compiled: bool) -> None:
        trainer, say = self.trainer, self.console.say
        if trainer.kind in ("compiled", "fused"):
            say("compiling the step: some 3 s, and some 10 s the first time on a machine")
        elif trainer.kind == "plain" and self.config.compile == "auto" and not self.config.clashes_with_compile and (
                excluded_by(trainer.parts) is None):
            say("the step is plain; --compile fused takes some thousand steps with one launch")
        trainer.make_step(self.console.warn, was_compiled=was_compiled)
        if trainer.step.compile_seconds:
            say(f"compiled in {trainer.step.compile_seconds:.1f} s")
        self.environment = replace(self.environment, step=trainer.step.kind)

    def train(self) -> None:
        """Train to the end, and leave the results. Raises `Diverged` or `Stopped`, with what there is written."""
        if self.earlier_result is not None:
            self.console.say(f"{self.folder} holds a run that is completed: nothing is left to do, and nothing changes "
                             "(to train on, give a larger --epochs, or another --max-steps or --target-nll)")
            self.recorder.send_again(self.earlier_result)
            return
        self.recorder.open(self.environment)
        signals = self.loop.schedule.signals
        watchdog = Watchdog(self.team, signals, lambda: self.trainer.sign, lambda: self.progress.global_step)
        with signals, watchdog, self.recorder.checkpoints, self.trainer.contention as contention:
            try:
                self.loop.run()
            except Diverged:
                with suppress(MnistDistError):  # of a full disk: why the run ended matters more
                    self.recorder.close("diverged")
                raise
            self.recorder.wait_for_checkpoint()
        if contention.seconds:
            self.console.say(f"warning: CPU shared with other processes for {math.ceil(contention.seconds)} s; timings "
                             "may be slow")
        self.recorder.close("completed")
