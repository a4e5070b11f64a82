"""The layers: a module imports from its own part of the package and from the parts below it; many need no torch."""

from __future__ import annotations

import ast
import sys

from support import ROOT, run

PACKAGE = ROOT / "mnist_dist"
EVERYWHERE = {"errors", "text"}  # parts that every other may import
BELOW = {  # part: the parts that it may import (docs/architecture.md)
    "text": set(),
    "errors": set(),
    "config": set(),
    "tables": set(),
    "disk": set(),
    "data": {"disk", "worker"},
    "worker": set(),
    "output": set(),
    "record": {"config", "disk", "worker"},
    "processes": {"disk", "output", "worker"},
    "console": {"config", "output", "record"},
    "runner": {"processes", "record"},
    "training": {"config", "data", "disk", "processes", "record", "console"},
    "commands": {"config", "data", "disk", "output", "tables", "processes", "record", "console", "runner", "training"},
    "study": {"config", "disk", "output", "tables", "processes", "record", "runner"},
    "cli": {"config", "output", "worker", "record", "processes", "training", "commands", "study"},
    "__main__": {"cli"},
    "__init__": set(),
}
WITHOUT_TORCH = ("text", "errors", "config", "disk.files", "output", "console", "cli", "runner", "tables", "record",
                 "record.result", "record.measured", "record.mirror", "record.config_file", "processes.launch",
                 "processes.signals", "study.command")


def imports(path):
    """The parts of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
        for name in names:
            if isinstance(node, ast.ImportFrom) and name == "mnist_dist":
                yield from (alias.name for alias in node.names if not alias.name.startswith("__"))
            elif name.startswith("mnist_dist."):
                yield name.split(".")[1]


def test_a_part_imports_only_from_below():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imports(path):
            assert other == part or other in BELOW[part] | EVERYWHERE, f"{path.relative_to(ROOT)} imports {other}"


def test_only_the_team_uses_collectives():
    """Ranks meet in one module: no other names torch.distributed's or Accelerate's collectives."""
    words = ("torch.distributed as", "from torch import distributed", "dist.all_", "dist.barrier", ".wait_for_everyone",
             "accelerator.gather", "accelerator.reduce", "accelerate.local_sgd", "accelerator.log")
    for path in PACKAGE.rglob("*.py"):
        found = [word for word in words if word in path.read_text()]
        assert not found or path.name == "team.py", f"{path.relative_to(ROOT)}: {found}"


def test_no_module_but_launch_reads_a_launchers_variables():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for name in ("\"RANK\"", "WORLD_SIZE\"", "\"SLURM_", "ACCELERATE_MIXED", "ACCELERATE_DYNAMO"):
            assert name not in text or path.name == "launch.py", f"{path.relative_to(ROOT)}: {name}"


def test_what_needs_no_torch_imports_none():
    code = "import importlib, sys; [importlib.import_module('mnist_dist.' + name) for name in sys.argv[1:]]; " \
           "print(sorted({'torch', 'accelerate', 'numpy', 'matplotlib', 'wandb'} & set(sys.modules)))"
    done = run([sys.executable, "-c", code, *WITHOUT_TORCH], cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
