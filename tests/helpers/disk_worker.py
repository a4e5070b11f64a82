"""Writes what a run writes, one thing per line of its standard input, each in a process of its own for strace to join.

A line is JSON: what, and in which folder. The process that will do it prints its id, waits for a line, does it, and
prints how that went; then the first one prints the exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from support import epoch_record, run_result

from mnist_dist.config import TrainConfig
from mnist_dist.errors import MnistDistError
from mnist_dist.record.checkpoint import CheckpointWriter
from mnist_dist.record.result import write_result
from mnist_dist.record.run_folder import append_metrics, write_config, write_metrics, writing


def prepared(what, folder):
    """What is to be done in the folder, which holds an older one of the same, as a function."""
    if what == "checkpoint":
        writer = CheckpointWriter(folder, keep=2)
        tensors = {"weight": torch.arange(12.0), "sums": torch.zeros(3, dtype=torch.float64)}

        def write(step):
            writer.write(step, {name: tensor + step for name, tensor in tensors.items()}, {"step": step})
            writer.wait()

        write(1)
        write(2)
        return lambda: write(3)
    if what == "config":
        write_config(folder, TrainConfig(seed=1))
        return lambda: write_config(folder, TrainConfig(seed=2))
    if what == "metrics":
        write_metrics(folder, [epoch_record()])
        return lambda: write_metrics(folder, [epoch_record(epoch=epoch) for epoch in (0, 1)])
    if what == "line":
        write_metrics(folder, [epoch_record()])
        return lambda: append_metrics(folder, epoch_record(epoch=1))
    result = run_result([epoch_record()])
    write_result(folder, result)

    def write_another():
        with writing(folder):
            write_result(folder, replace(result, status="diverged"))

    return write_another


def say(**values):
    os.writev(1, [json.dumps(values).encode() + b"\n"])  # and not write, which strace may make fail


def main():
    lines = os.fdopen(0, "rb", buffering=0)
    for line in iter(lines.readline, b""):
        asked = json.loads(line)
        folder = Path(asked["folder"])
        folder.mkdir(parents=True)
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            say(status=os.waitstatus_to_exitcode(status))
            continue
        task = prepared(asked["what"], folder)
        say(pid=os.getpid())
        lines.readline()
        try:
            task()
        except MnistDistError as error:
            say(error=str(error))
        except BaseException:
            say(traceback=traceback.format_exc())
        os._exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
