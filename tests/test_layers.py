"""The layers: a module imports from its own part of the package and from the parts below it; many need no torch."""

from __future__ import annotations

import ast
import sys

from support import ROOT, run

from mnist_dist.cli import COMMANDS

PACKAGE = ROOT / "mnist_dist"
EVERYWHERE = {"__init__", "errors", "text"}  # parts that every other may import
BELOW = {  # part: the parts that it may import (docs/architecture.md)
    "text": set(),
    "errors": set(),
    "config": set(),
    "tables": set(),
    "disk": set(),
    "data": {"disk", "worker"},
    "worker": set(),
    "stopwatch": set(),
    "output": set(),
    "record": {"config", "disk", "stopwatch", "worker"},
    "processes": {"disk", "output", "worker"},
    "console": {"config", "output", "record"},
    "runner": {"processes", "record"},
    "training": {"config", "data", "disk", "processes", "record", "console", "stopwatch", "worker"},
    "commands": {"config", "options", "data", "disk", "output", "tables", "processes", "record", "console", "runner",
                 "training", "study"},
    "study": {"config", "disk", "output", "tables", "processes", "record", "runner"},
    "options": {"config"},
    "cli": {"config", "options", "output", "worker", "processes", "commands"},
    "__main__": {"cli"},
    "__init__": set(),
}
WITHOUT_TORCH = ("text", "errors", "config", "disk.files", "output", "console", "cli", "runner", "stopwatch", "tables",
                 "record", "record.result", "record.rank_summary", "record.wandb_run", "record.config_file",
                 "processes.launch_environment", "processes.stop_signals",
                 *(f"commands.{command}" for command in COMMANDS))


# the rooms of the study, and the other rooms that each may import
ROOMS = {"plan": set(), "analysis": {"plan"}, "report": {"analysis", "plan"}, "run": {"plan", "analysis", "report"}}


def name_of(path):
    """The dotted name of a module, without the package's."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """What a file imports, at its head, inside functions and for type checks: modules, and names in modules."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(imported):
    """The module that an import needs: `a.b` of `mnist_dist.a.b` or of `mnist_dist.a.b.NAME`; None of another package.
    """
    name = imported.removeprefix("mnist_dist.")
    if name != imported:
        return name if name in MODULES else name.rpartition(".")[0] or "__init__"
    return None


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {name: set(map(module_of, imports(path))) - {name, None} for name, path in MODULES.items()}


def test_every_import_is_of_a_module():
    assert set().union(*IMPORTS.values()) <= set(MODULES) and sum(map(len, IMPORTS.values())) > len(MODULES)


def test_a_part_imports_only_from_below():
    for name, imported in IMPORTS.items():
        part = name.split(".")[0]
        for other in {other.split(".")[0] for other in imported}:
            assert other == part or other in BELOW[part] | EVERYWHERE, f"{name} imports {other}"


def test_a_room_of_the_study_imports_only_from_below():
    for name, imported in IMPORTS.items():
        if name.startswith("study."):
            room = name.split(".")[1]
            for other in {other.split(".")[1] for other in imported if other.startswith("study.")}:
                assert other == room or other in ROOMS[room], f"{name} imports {other}"


def test_no_modules_form_a_circle():
    left = dict(IMPORTS)
    while leaves := [name for name, imported in left.items() if not imported & set(left)]:
        for name in leaves:
            del left[name]
    assert not left, f"these modules import each other, directly or not: {sorted(left)}"


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
            assert name not in text or path.name == "launch_environment.py", f"{path.relative_to(ROOT)}: {name}"


def test_what_needs_no_torch_imports_none():
    code = "import importlib, sys; [importlib.import_module('mnist_dist.' + name) for name in sys.argv[1:]]; " \
           "print(sorted({'torch', 'accelerate', 'numpy', 'matplotlib', 'wandb'} & set(sys.modules)))"
    done = run([sys.executable, "-c", code, *WITHOUT_TORCH], cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_long_modules_and_functions_have_a_reason():
    """A module of more than 250 lines says in its docstring why it is one file; no function has more than 60."""
    for name, path in MODULES.items():
        text = path.read_text()
        tree = ast.parse(text)
        assert len(text.splitlines()) <= 250 or "In one file" in (ast.get_docstring(tree) or ""), f"{name} is long"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} is long"


# Of a module without a test file of its name: the file that tests it.
TESTED_IN = {
    "__main__": "test_cli", "errors": "test_cli", "options": "test_cli", "tables": "test_benchmarks",
    "worker": "record/test_wandb_run",
    "commands.doctor.bandwidth": "commands/test_doctor", "commands.doctor.machine": "commands/test_doctor",
    "commands.reproduce": "commands/test_predict", "commands.shared": "test_cli",
    "commands.show": "commands/test_predict",
    "commands.train": "training/test_loop",
    "data.download": "data/test_data", "data.idx": "data/test_data", "data.images": "data/test_data",
    "data.npz": "data/test_layouts", "data.sources": "data/test_data",
    "processes.launch_environment": "processes/test_launch_words", "processes.stop_signals": "processes/test_signals",
    "processes.stores": "processes/test_rendezvous",
    "record.config_file": "test_config", "record.environment": "training/test_cpu_products",
    "record.metrics": "record/test_record", "record.result": "record/test_record",
    "record.run_folder": "record/test_record",
    "record.run_pictures": "commands/test_lesson",
    "study.analysis.analysis": "study/test_report", "study.analysis.cells": "study/test_report",
    "study.analysis.comparison": "study/test_baseline", "study.analysis.fitted_models": "study/test_step_time_section",
    "study.analysis.slowdown_causes": "study/test_time_to_target",
    "study.analysis.step_time_check": "study/test_step_time",
    "study.analysis.step_time_fit": "study/test_step_time",
    "study.plan.goals": "study/test_targets",
    "study.report.charts": "study/test_screens", "study.report.comparison": "study/test_baseline",
    "study.report.labels": "study/test_report", "study.report.origin": "study/test_measured_network",
    "study.report.page": "study/test_table",
    "study.report.throughput": "study/test_report", "study.report.wandb_study": "study/test_study",
    "study.run.folder": "study/test_study", "study.run.in_queue": "study/test_study_slurm",
    "study.run.launches": "study/test_study", "study.run.request": "study/test_study",
    "training.device_events": "training/test_fake_cuda", "training.evaluation": "test_stopwatch",
    "training.recorder": "training/test_resume", "training.run": "training/test_trainer",
    "training.steps.ahead": "training/test_fused",
    "training.steps.cuda_graph": "training/test_fake_cuda", "training.steps.exact_sums": "training/test_reproducible",
    "training.steps.fused_kernels": "training/test_fused",
    "training.steps.graph_pass": "training/test_compiled", "training.steps.inductor": "training/test_compiled",
    "training.steps.plain": "training/test_exactness", "training.steps.step": "training/test_exactness",
}


def test_every_module_is_tested_somewhere():
    tests = ROOT / "tests"
    files = {path.relative_to(tests).with_suffix("").as_posix() for path in tests.rglob("test_*.py")}
    names = {file.split("/")[-1] for file in files}
    without = {name for name, path in MODULES.items()
               if path.name != "__init__.py" and f"test_{path.stem}" not in names}
    assert without == set(TESTED_IN), without ^ set(TESTED_IN)
    assert set(TESTED_IN.values()) <= files
