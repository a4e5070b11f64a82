"""A stand-in for wandb that hangs in the function that HANGS_IN names, and then at exit too (test_wandb_run.py)."""

from __future__ import annotations

import atexit
import os
import time
from types import SimpleNamespace

CALLS: list[str] = []
plot = SimpleNamespace(confusion_matrix=lambda **_: "matrix")


def _call(name: str) -> None:
    CALLS.append(name)
    if os.environ.get("HANGS_IN") == name:
        atexit.register(time.sleep, 3600)  # as wandb's own exit does if its server does not answer
        time.sleep(3600)


class Run:
    """The part of wandb's run that a mirror uses."""

    id, step, dir = "id", 3, "somewhere/files"

    def __init__(self) -> None:
        self.summary, self.config = {}, SimpleNamespace(update=lambda values, allow_val_change: None)

    def define_metric(self, name: str, step_metric: str) -> None:
        pass

    def log(self, values: dict, step: int) -> None:
        _call("results" if "confusion_matrix" in values else "log")

    def log_artifact(self, artifact: object) -> None:
        _call("log_artifact")

    def finish(self, exit_code: int) -> None:
        _call("finish")


def setup() -> SimpleNamespace:
    return SimpleNamespace(settings=SimpleNamespace(api_key=None, base_url="http://127.0.0.1:9"))


def init(**_: object) -> Run:
    _call("init")
    return Run()


def Settings(**_: object) -> None:
    return None


def Image(path: str) -> str:
    return path


class Artifact:
    def __init__(self, name: str, type: str, metadata: dict) -> None:
        self.files: list[str] = []

    def add_file(self, path: str) -> None:
        self.files.append(path)
