"""Makes the ranks of a launch wait at a moment of the run. Python imports this when each of its processes starts, if
PYTHONPATH has this folder.

WAITS_AT names the moment; a rank that has come to it leaves a file in the folder WAITS_IN, and waits WAITS_SECONDS.
"""

import functools
import importlib.abc
import importlib.machinery
import operator
import os
import sys
import time
from pathlib import Path

MOMENTS = {  # of a moment: the module, the function, and at which of its calls
    "start": ("mnist_dist.cli", "run", 1),
    "joining": ("mnist_dist.processes.team", "join", 1),
    "data": ("mnist_dist.data", "obtain", 1),
    "compiling": ("mnist_dist.training.trainer", "Trainer.make_step", 1),
    "step": ("mnist_dist.training.steps.reproducible", "ReproducibleStep.take_one", 30),
    "evaluation": ("mnist_dist.training.trainer", "Trainer.evaluate", 2),
    "checkpoint": ("mnist_dist.record.checkpoint", "_write_checkpoint", 2),
    "record": ("mnist_dist.record.run_folder", "append_metrics", 2),
    "results": ("mnist_dist.training.results", "leave_results", 1),
}


def waiting(function, number):
    """The function, which waits before it does its work for the `number`-th time."""
    calls = [0]

    @functools.wraps(function)
    def waits(*words, **named):
        calls[0] += 1
        if calls[0] == number:
            Path(os.environ["WAITS_IN"], f"rank-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
            end = time.monotonic() + float(os.environ["WAITS_SECONDS"])
            while time.monotonic() < end:
                time.sleep(0.01)
        return function(*words, **named)

    return waits


class Loader(importlib.abc.Loader):
    """Loads the module as another loader does, and changes the function."""

    def __init__(self, loader, name, number):
        self.loader, self.name, self.number = loader, name, number

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        *owner, name = self.name.split(".")
        holder = operator.attrgetter(".".join(owner))(module) if owner else module
        setattr(holder, name, waiting(getattr(holder, name), self.number))


class Finder(importlib.abc.MetaPathFinder):
    """Finds the one module that has the moment."""

    def __init__(self, module, name, number):
        self.module, self.words = module, (name, number)

    def find_spec(self, name, path, target=None):
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = Loader(spec.loader, *self.words)
        return spec


if "WAITS_AT" in os.environ and "RANK" in os.environ:  # the launcher has no rank
    sys.meta_path.insert(0, Finder(*MOMENTS[os.environ["WAITS_AT"]]))
