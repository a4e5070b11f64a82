"""Weights & Biases: a mirror of the folder of a run or a study. It never stops a run and never makes it wait for long.

All calls of wandb run in one thread. The run waits for each call up to a time limit; a call that takes longer stays in
the thread, and the run continues. If the server cannot be reached, the run is recorded offline, to be synced later.

In one file, because every call of wandb is here, behind the same thread and time limit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one from Python 3.11 on
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mnist_dist.config import TrainConfig
from mnist_dist.record.metrics import GROUP_OF, EpochRecord, RunSummary, grouped, samples_at
from mnist_dist.record.run_folder import CONFIG, CURVES, MODEL, PREDICTIONS, WANDB
from mnist_dist.record.wandb_mode import Mode, leave_environment, trusted_settings, wandb_mode
from mnist_dist.worker import Worker

UNSENT = "unsent"  # in W&B's folder from the run's start there until W&B has taken everything
INIT_SECONDS = 6.0  # for wandb.init after it; wandb itself would wait for 90
START_SECONDS = 20.0  # for importing and starting wandb, all attempts together
LOG_SECONDS = 2.0  # for the rows of an epoch
SYSTEM_SECONDS = 2.0  # between two looks at the machine: wandb's 15 are longer than a short run
END_SECONDS = 10.0  # for everything that is left to do after the run's last result


Row = Mapping[str, Any]  # values by W&B's names; `step`, `samples` and `epoch`, of the run so far, are in each


class Rows(NamedTuple):
    """The rows that W&B gets from a run whose epochs have `num_train` samples in batches of `batch`."""

    num_train: int
    batch: int

    def of_point(self, point: Mapping[str, Any]) -> Row:
        """A line of `steps.jsonl`."""
        metrics = {f"steps/{name}": point[name] for name in ("train_loss", "samples_per_second")}
        return {**self._place(point["step"]), **{name: value for name, value in metrics.items() if value is not None}}

    def of_evaluation(self, evaluation: Mapping[str, Any]) -> Row:
        """An evaluation within an epoch."""
        return {**self._place(evaluation["step"]),
                **{f"test/{name}": evaluation[name] for name in ("test_nll", "test_accuracy")}}

    def of_epoch(self, record: EpochRecord) -> Row:
        """An epoch's record."""
        return {**self._place(record.step), **grouped(record)}

    def of_run(self, records: Sequence[EpochRecord], evaluations: Sequence[Mapping[str, Any]],
               points: Sequence[Mapping[str, Any]]) -> list[Row]:
        """These epochs, these evaluations of a further one, and these points, in the order of their steps."""
        evaluations = [*evaluations, *(evaluation for record in records for evaluation in record.evaluations)]
        return sorted([*map(self.of_point, points), *map(self.of_evaluation, evaluations),
                       *map(self.of_epoch, records)], key=lambda row: row["step"])

    def _place(self, step: int) -> dict[str, Any]:
        samples = samples_at(step, self.num_train, self.batch)
        return {"step": step, "samples": samples, "epoch": samples / self.num_train}


def run_name(batch: int, num_processes: int, learning_rate: float, seed: int) -> str:
    """The name of a run in W&B: `b200-p2-lr1e-4-seed0`."""
    mantissa, exponent = f"{learning_rate:e}".split("e")
    return f"b{batch}-p{num_processes}-lr{float(mantissa):g}e{int(exponent)}-seed{seed}"


class Mirror:
    """One run in W&B: `start`, then `log` for what is new, `log_results`, `finish`. Does nothing before `start`."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.warn = folder, warn
        self.mode: Mode = "disabled"
        self.run: Any = None  # wandb's
        self._worker: Worker | None = None
        self._late = False  # a call has exceeded its limit: only `finish` waits for it
        self._errors: list[str] = []
        self.is_whole = True  # whether W&B has taken everything, as far as is known

    def start(self, config: TrainConfig, run_id: str, settings: Mapping[str, Any], *, name: str | None = None,
              job_type: str = "train") -> None:
        """Begin a run with these settings; after a failure online try offline, then continue without W&B. `name` is for
        a run that is given none; the default is that of the folder.
        """
        if config.wandb == "disabled":
            return
        self._worker = Worker()
        warnings: list[str] = []
        future = self._worker.submit(lambda: _started(config, self.folder, run_id, settings,
                                                       config.run_name or name or self.folder.name, job_type,
                                                       warnings.append))
        try:
            self.run, self.mode = future.result(START_SECONDS)
        except FutureTimeout:
            warnings.append(f"W&B did not start within {START_SECONDS:g} s; continuing without W&B")
        except Exception as error:  # a damaged installation may raise anything
            warnings.append(f"W&B could not start ({' '.join(str(error).split())}); continuing without W&B")
        for line in warnings:
            self.warn(line)
        if self.run is None:
            self._worker.close()
            self._worker = None
        else:
            self._mark_unsent()

    def _mark_unsent(self) -> None:
        try:
            self._unsent.parent.mkdir(exist_ok=True)
            self._unsent.touch()
        except OSError as error:
            self.warn(f"{self._unsent} could not be written ({error.strerror}): --resume will not send the run again")

    @property
    def _unsent(self) -> Path:
        return self.folder / WANDB / UNSENT

    @property
    def is_unsent(self) -> bool:
        """Whether W&B may not have all of the run in this folder: its process ended too early, or the server failed."""
        return self._unsent.exists()

    def _call(self, task: Callable[[], None], seconds: float) -> bool:
        """Run `task` in the thread; whether it ended within `seconds`. `finish` prints its exception."""
        if self._worker is None:
            return True

        def guarded() -> None:
            try:
                task()
            except Exception as error:  # whatever W&B raises, the run continues
                self._errors.append(" ".join(str(error).split()) or type(error).__name__)

        future = self._worker.submit(guarded)
        try:
            future.result(0 if self._late else seconds)
        except FutureTimeout:
            return False
        return True

    def log(self, rows: Sequence[Row]) -> None:
        """These rows, in the order of their steps."""
        def task() -> None:
            for row in rows:
                self.run.log(row, step=row["step"])

        done = self._call(task, LOG_SECONDS)
        if not done and not self._late:
            self._late = True
            self.warn(f"W&B took more than {LOG_SECONDS:g} s for an epoch: the run continues without waiting for it")

    def log_again(self, rows: Sequence[Row]) -> None:
        """The rows of earlier starts of the run that W&B does not have. Offline it has none, so that the newest of a
        run's offline folders has all of it.
        """
        def task(run: Any) -> None:
            for row in rows:
                if row["step"] >= run.step:
                    run.log(row, step=row["step"])

        self.send(task)

    def send(self, task: Callable[[Any], None]) -> None:
        """Call `task` with W&B's run, in the thread; `finish` waits for it."""
        self._call(lambda: task(self.run), 0)

    def log_results(self, summary: RunSummary, labels: Sequence[int], guesses: Sequence[int],
                    of_model: Mapping[str, Any]) -> None:
        """The run's summary, pictures, model with what is known `of_model`, and the confusion matrix of the test set;
        `finish` waits for them.
        """
        def task(run: Any) -> None:
            import wandb

            run.summary.update({"batch_size": summary.global_batch_size, **asdict(summary)})
            last = run.step
            images = {Path(name).stem: wandb.Image(str(self.folder / name)) for name in (PREDICTIONS, CURVES)}
            matrix = wandb.plot.confusion_matrix(y_true=labels, preds=guesses, class_names=[str(i) for i in range(10)])
            run.log({**images, "confusion_matrix": matrix}, step=last)
            artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(of_model))
            for name in (MODEL, CONFIG):
                artifact.add_file(str(self.folder / name))
            run.log_artifact(artifact)

        self.send(task)

    def finish(self, exit_code: int = 0) -> None:
        """End the run in W&B; waits at most `END_SECONDS` for this and all calls before it."""
        if self._worker is None:
            return
        self._late = False
        done = self._call(lambda: self.run.finish(exit_code=exit_code), END_SECONDS)
        if done and self._errors:
            self._call(_teardown, END_SECONDS)
        self._worker.close()
        self._worker = None
        problems = [] if done else [f"no answer within {END_SECONDS:g} s"]
        problems += dict.fromkeys(self._errors)  # each once
        if problems:
            self.is_whole = False
            self.warn(f"W&B did not take all of the run ({'; '.join(problems)}); it is in {self.folder}")
        else:
            with contextlib.suppress(OSError):  # it is gone, or the folder is
                self._unsent.unlink()

    def sync_hint(self) -> str | None:
        """The command that brings an offline run to the server, or None."""
        if self.mode != "offline" or self.run is None:
            return None
        return f"wandb sync {Path(self.run.dir).parent}"


def _teardown() -> None:
    """End wandb's service now, if it is there: at exit wandb would print a traceback if it is not."""
    import wandb

    with contextlib.suppress(Exception):
        wandb.teardown()


def _started(config: TrainConfig, folder: Path, run_id: str, settings: Mapping[str, Any], name: str, job_type: str,
             warn: Callable[[str], None]) -> tuple[Any, Mode]:
    """(wandb's run, its mode); (None, "disabled") if it cannot start. What fails online is tried offline, and then
    without anything that wandb takes from its environment.
    """
    mode = wandb_mode(config.wandb, warn)
    if mode == "disabled":
        return None, mode
    import wandb

    given_id = None if os.environ.get("WANDB_SWEEP_ID") else run_id  # a sweep's agent has given the run its id
    home, reason = folder / WANDB / ".home", ""
    if not os.environ.get("HOME"):  # wandb would write to the working directory
        os.environ["HOME"] = str(home)
    online: list[tuple[Mode, bool]] = [("online", False)] if mode == "online" else []
    for mode, is_bare in [*online, ("offline", False), ("offline", True)]:
        try:
            if is_bare:
                leave_environment(home)
            else:
                trusted_settings()
            run = wandb.init(
                project=config.wandb_project, entity=config.wandb_entity, notes=config.wandb_notes, mode=mode,
                dir=str(folder), job_type=job_type, id=given_id,
                resume="allow" if mode == "online" else None,  # offline it has no effect, and 0.22 warns about that
                name=name, group=config.wandb_group,
                tags=[tag.strip() for tag in (config.tags or "").split(",") if tag.strip()],
                settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS,
                                        login_timeout=int(INIT_SECONDS), x_stats_sampling_interval=SYSTEM_SECONDS),
            )
            for group in dict.fromkeys([*GROUP_OF.values(), "steps"]):  # runs of different batch sizes overlay
                run.define_metric(f"{group}/*", step_metric="samples")
            run.config.update(dict(settings), allow_val_change=True)
            return run, mode
        except Exception as error:  # whatever W&B raises, training continues
            reason = " ".join(str(error).split())[:300]
            if mode == "online":
                warn(f"W&B could not start ({reason}); continuing offline")
    warn(f"W&B could not start ({reason}); continuing without W&B")
    return None, "disabled"
