"""The way from the command line to the optimizer: how many files and loops a person reads."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch
from support import ROOT, run_here

MOST_FILES, MOST_LOOPS = 6, 3


def loops_around(path, line):
    """The loops of a file that contain this line."""
    tree = ast.parse(Path(path).read_text())
    kinds = (ast.For, ast.While)
    return [node for node in ast.walk(tree) if isinstance(node, kinds) and node.lineno <= line <= node.end_lineno]


def test_the_way_from_the_command_to_the_optimizer(small_dir, tmp_path, monkeypatch):
    """A live stack in the middle of a run: the files of the package from the command line on, and their loops."""
    stacks = []
    step = torch.optim.Adam.step

    def traced(self, *words):
        frame, frames = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(str(ROOT / "mnist_dist")):
                frames.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
            frame = frame.f_back
        stacks.append(frames[::-1])
        return step(self, *words)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mnist_dist.training.trainer.Adam.step", traced)
    assert run_here(["train", "--data-dir", str(small_dir), "--batch-size", "97", "--max-steps", "3", "--compile",
                     "off", "--gradient-accumulation-steps", "2", "--wandb", "disabled", "--output-dir", "run"]) == 0
    assert len(stacks) == 3
    for stack in stacks:
        files = list(dict.fromkeys(path for path, *_ in stack))
        loops = [(path, loop.lineno) for path, line, _ in stack for loop in loops_around(path, line)]
        print([Path(path).name for path in files], [name for *_, name in stack], loops)
        assert len(files) <= MOST_FILES and len(loops) <= MOST_LOOPS
