"""What a run tells, as it runs: its folder, and Weights & Biases, both as trackers of Accelerate.

The folder is the record; W&B mirrors it. W&B is started by the main process alone, is never waited for longer than a
few seconds, and never stops a run: where it cannot be reached, the run goes on offline and says how to sync later.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker, WandBTracker, on_main_process

from mnist_dist.checkpoint import replace_synced
from mnist_dist.config import TrainConfig
from mnist_dist.config_file import config_text
from mnist_dist.errors import UserError
from mnist_dist.metrics import GROUP_OF

if TYPE_CHECKING:
    from accelerate import Accelerator

ANSWER_SECONDS = 4.0  # for the W&B server's first answer
INIT_SECONDS = 6.0  # for wandb.init after it; wandb itself would wait for 90
METRICS, RESULT, CONFIG, MODEL = "metrics.jsonl", "result.json", "config.yaml", "model.safetensors"


def open_folder(config: TrainConfig) -> tuple[Path, str]:
    """Make the run's folder; returns it and the run's id. Raises `UserError`."""
    run_id = secrets.token_hex(4)
    folder = Path(config.output_dir or f"runs/{datetime.now():%Y%m%d-%H%M%S}-{run_id}")
    if not config.resume and any((folder / name).exists() for name in (RESULT, METRICS, "checkpoints")):
        raise UserError(f"--output-dir {folder} already holds a run: give another, or continue that one with --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from None
    return folder, run_id


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the run's `config.yaml`. Raises `UserError`."""
    try:
        replace_synced(folder / CONFIG, config_text(config).encode())
    except OSError as error:
        raise UserError(f"{folder / CONFIG} cannot be written ({error.strerror}): give another --output-dir") from None


class RunFolder(GeneralTracker):
    """Appends each epoch's record to the run's `metrics.jsonl`, as it happens."""

    name = "run_folder"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def tracker(self) -> Path:
        """The folder."""
        return self.folder

    @on_main_process
    def start_over(self, records: list[dict[str, Any]]) -> None:
        """Make `metrics.jsonl` hold just these records: those of the checkpoint that is continued, or none."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        replace_synced(self.folder / METRICS, text.encode())

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Append one line. The names lose the group that W&B shows them under."""
        record = {name.rsplit("/", 1)[-1]: value for name, value in values.items()}
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def grouped(record: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch's record under W&B's names: `test_nll` is `test/test_nll`. What was not measured is left out."""
    return {f"{GROUP_OF[name]}/{name}": value for name, value in record.items() if value is not None}


def wandb_mode(asked: str, warn: Callable[[str], None]) -> str:
    """"online", "offline" or "disabled", from `--wandb` and what can be reached: a key, and a server that answers."""
    if asked == "disabled" or (asked == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return "disabled"
    # wandb's error reporting goes to the same server, and at exit waits ten seconds for one that hangs
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        warn("wandb is not installed: this run is not tracked there (pip install wandb)")
        return "disabled"
    settings = wandb.setup().settings
    has_key = bool(settings.api_key) or _key_in_netrc(settings.base_url)
    if asked == "offline" or (asked == "auto" and (not has_key or os.environ.get("WANDB_MODE") == "offline")):
        return "offline"
    if not has_key:
        warn("W&B: no API key is configured (wandb login); going on offline")
        return "offline"
    question = urllib.request.Request(f"{settings.base_url}/graphql", data=b'{"query": "{ __typename }"}',
                                      headers={"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(question, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, of whatever kind
    except (OSError, ValueError) as error:
        warn(f"W&B: {settings.base_url} does not answer ({error}); going on offline")
        return "offline"
    return "online"


def _key_in_netrc(base_url: str) -> bool:
    from netrc import NetrcParseError, netrc
    from urllib.parse import urlsplit

    try:
        return netrc().authenticators(urlsplit(base_url).hostname or "") is not None
    except (OSError, NetrcParseError):
        return False


class Trackers:
    """The trackers of one run: `log` for each epoch, `finish` at the end."""

    def __init__(self, accelerator: Accelerator, folder: Path, config: TrainConfig, run_id: str,
                 settings: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self.accelerator, self.folder, self.warn = accelerator, folder, warn
        self.run_folder = RunFolder(folder)
        self.mode = "disabled"
        trackers: list[GeneralTracker] = [self.run_folder]
        if accelerator.is_main_process:
            wandb_tracker = self._start_wandb(config, run_id)
            if wandb_tracker is not None:
                trackers.append(wandb_tracker)
        accelerator.log_with = trackers
        accelerator.init_trackers(config.wandb_project, config=dict(settings))

    def _start_wandb(self, config: TrainConfig, run_id: str) -> WandBTracker | None:
        """A W&B tracker whose run has begun, or None. `init_trackers` would give no second try where it fails."""
        mode = wandb_mode(config.wandb, self.warn)
        while mode != "disabled":
            import wandb

            tracker = _StartedWandB(
                config.wandb_project, mode=mode, dir=str(self.folder), id=run_id, resume="allow",
                name=config.run_name or self.folder.name, group=config.wandb_group,
                tags=[tag.strip() for tag in (config.tags or "").split(",") if tag.strip()],
                settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS,
                                        login_timeout=int(INIT_SECONDS)),
            )
            try:
                tracker.begin()
                self.mode = mode
                return tracker
            except Exception as error:  # whatever W&B raises, training goes on
                reason = " ".join(str(error).split())
                mode, after = ("offline", "going on offline") if mode == "online" else ("disabled", "going on without")
                self.warn(f"W&B could not start ({reason}); {after}")
        return None

    @property
    def wandb_run(self) -> Any:
        """The W&B run on the main process, or None."""
        return next((t.run for t in self.accelerator.trackers if isinstance(t, WandBTracker)), None)

    def log(self, record: Mapping[str, Any]) -> None:
        """One epoch's record to all trackers."""
        self.accelerator.log(grouped(record), step=record["step"])

    def mirror_results(self, summary: Mapping[str, Any], predictions: Mapping[str, Any]) -> None:
        """The run's summary, pictures, confusion matrix and model to W&B. `predictions` has labels and guesses."""
        if self.wandb_run is None:
            return
        import wandb

        try:
            self.wandb_run.summary.update({"batch_size": summary["global_batch_size"], **summary})
            last = self.wandb_run.step
            images = {name: wandb.Image(str(self.folder / f"{name}.png")) for name in ("predictions", "curves")}
            matrix = wandb.plot.confusion_matrix(
                y_true=predictions["labels"], preds=predictions["guesses"], class_names=[str(i) for i in range(10)]
            )
            self.wandb_run.log({**images, "confusion_matrix": matrix}, step=last)
            artifact = wandb.Artifact(f"model-{self.wandb_run.id}", type="model")
            for name in (MODEL, CONFIG):
                artifact.add_file(str(self.folder / name))
            self.wandb_run.log_artifact(artifact)
        except Exception as error:  # whatever W&B raises, the run's folder is whole
            self.warn(f"W&B did not take the results ({' '.join(str(error).split())}); they are in {self.folder}")

    def sync_hint(self) -> str | None:
        """How to bring an offline run to the server, or None."""
        if self.mode != "offline" or self.wandb_run is None:
            return None
        return f"wandb sync {Path(self.wandb_run.dir).parent}"


class _StartedWandB(WandBTracker):
    """Accelerate's W&B tracker, begun before Accelerate starts its trackers, so that a failure has a second try."""

    begin = WandBTracker.start

    def start(self) -> None:
        """Nothing: it has begun."""
