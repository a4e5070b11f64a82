"""Cells that are out of memory: seen, run once, and what fits is in the report."""

from __future__ import annotations

import signal
import sys

import pytest
from support import run_here
from tables import row

from mnist_dist.study.plan.grid import Cell, PlannedRun
from mnist_dist.study.plan.table import read_table
from mnist_dist.study.report.report import write_report
from mnist_dist.study.run import launches
from mnist_dist.study.run.program import Program

# 10 MiB for a sample, of an address space of 256 MiB: a batch of 8 fits, one of 32 does not
PROGRAM = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))
batch, folder = int(sys.argv[1]), sys.argv[2]
memory = bytearray(10 * 2**20 * batch)
json.dump({"status": "completed", "environment": {"num_processes": 1}, "summary": {"global_batch_size": batch},
           "epochs": [{"measured_samples": 100, "measured_seconds": 1, "peak_memory_bytes": len(memory)}]},
          open(folder + "/result.json", "w"))
"""


@pytest.mark.parametrize(("repeats", "sizes"), [
    (["--repeats", "3"], "2,8,32,64"), pytest.param(["--precision", "5%"], "8,32", marks=pytest.mark.long),
    pytest.param(["--precision", "5%"], "32,8", marks=pytest.mark.long, id="the base case does not fit"),
])
def test_a_cell_out_of_memory_runs_once(repeats, sizes, tmp_path, capsys):
    program, folder = tmp_path / "train.py", tmp_path / "s"
    program.write_text(PROGRAM)
    words = ["study", "--command", f"{sys.executable} {program} {{batch_size}} {{output_dir}}", *repeats,
             "--batch-sizes", sizes, "--wandb", "disabled", "--output-dir", str(folder)]
    assert run_here(words) == 1
    rows = read_table(folder)
    by_size = {}
    for one in rows:
        by_size.setdefault(one["global_batch_size"], []).append(one)
    for size, of_size in by_size.items():
        if size < 32:
            assert {one["status"] for one in of_size} == {"completed"} and len(of_size) >= 3
        else:
            assert sorted(one["status"] for one in of_size) == ["failed", "impossible"], size
            failed = next(one for one in of_size if one["status"] == "failed")
            assert failed["reason"].startswith("out of memory: MemoryError") and failed["out_of_memory"]
    report = (folder / "report.md").read_text()
    line = report.split("## Memory")[1].split("| 8 | 1 | 8.00 |")[1].splitlines()[0]
    assert line.split("|")[:2] == [" 80.0 ", " 32 "]
    before = capsys.readouterr().out
    assert run_here(words) == 1 and len(read_table(folder)) == len(rows), "each command tries it once"
    for printed in (before, capsys.readouterr().out):
        tried = [line for line in printed.splitlines() if line.startswith("[") and "failed: out of memory" in line]
        assert len(tried) == sum(size >= 32 for size in by_size)


def test_a_cell_that_runs_out_of_memory_later_ends_too(tmp_path):
    """With --precision: two repeats are done, the third is out of memory, and no round follows."""
    program, folder = tmp_path / "train.sh", tmp_path / "s"
    result = ('{"status": "completed", "environment": {"num_processes": 1}, "summary": {"global_batch_size": 200}, '
              '"epochs": [{"measured_samples": 100, "measured_seconds": 1.%s}]}')
    program.write_text(f"[ $2 = 2 ] && {{ echo MemoryError >&2; exit 1; }}\nprintf '{result}' $2 > $1/result.json\n")
    words = ["study", "--command", f"sh {program} {{output_dir}} {{seed}}", "--precision", "1%", "--wandb", "disabled",
             "--output-dir", str(folder)]
    assert run_here(words) == 1
    assert [(row["role"], row["status"]) for row in read_table(folder)] == [
        ("first", "completed"), *[("repeat", "completed")] * 2, ("repeat", "failed"), ("none", "impossible")]


@pytest.mark.parametrize("printed", [
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried to",
    "OSError: [Errno 12] Cannot allocate memory", "MemoryError", "terminate called after throwing an instance of "
    "'std::bad_alloc'", "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying",
    "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.28 TiB",
    "mnist-dist: error: process 1 of 3 has no GPU memory left after step 0: give a smaller batch",
])
def test_what_programs_say(printed, tmp_path):
    for status, is_out in ((1, True), (0, False)):
        outcome = outcome_of(f"echo {printed!r}; exit {status}" if "'" not in printed else
                             f'echo "{printed}"; exit {status}', tmp_path)
        assert outcome.get("out_of_memory", False) == is_out
        assert outcome["reason"].startswith("out of memory: ") == is_out


def outcome_of(script, folder):
    run = PlannedRun(Cell(10, 1), "repeat", 1)
    return launches.start(run, folder / "run", ["sh", "-c", script], {}, 60.0, Program(command="sh"))


@pytest.mark.parametrize("script, kills, reason", [
    ("kill -KILL $$", (3, 4), "out of memory: ended by SIGKILL"),
    ("kill -KILL $$", (3, 3), "ended by SIGKILL, perhaps because memory ran out"),
    ("echo 'Signal 9 (SIGKILL) received by PID 12' >&2; exit 1", (0, 1),
     "out of memory: Signal 9 (SIGKILL) received by PID 12"),
    ("echo other >&2; exit 1", (0, 1), "other"), ("kill -TERM $$", (0, 1), "ended by SIGTERM"),
])
def test_the_kernel_counts_what_it_kills(script, kills, reason, tmp_path, monkeypatch):
    counts = iter(kills)
    monkeypatch.setattr(launches, "_kills_for_memory", lambda: next(counts))
    outcome = outcome_of(script, tmp_path)
    assert outcome["reason"] == reason
    assert outcome.get("out_of_memory", False) == reason.startswith("out of memory")


def test_the_count_of_this_machine_is_read():
    assert launches._kills_for_memory() >= 0 and signal.SIGKILL in {-status for status in launches.KILLED}


def test_the_largest_batch_that_fits(tmp_path):
    """For each number of processes and option; a number of processes at which nothing fits is there too."""
    rows = []
    for processes, fits, too_large in ((1, (10, 20), 40), (2, (20, 40), 80), (4, (), 16)):
        for size in fits:
            for number in (1, 2):
                one = row(Cell(size, processes), 1000.0, number)
                one["epochs"][0]["peak_memory_bytes"] = 2**20 * size / processes + number
                rows.append(one)
        rows.append({"run": f"b{too_large}-p{processes}", "role": "repeat", "status": "failed", "out_of_memory": True,
                     "reason": "out of memory: x", **Cell(too_large, processes).as_row()})
    write_report(tmp_path, rows)
    report = (tmp_path / "report.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.split("## Memory")[1].splitlines()
             if line.startswith("|")][2:]
    assert lines[:3] == [["20", "1", "20.0", "20.0", "40"], ["40", "2", "20.0", "20.0", "80"],
                         ["none", "4", "-", "-", "16"]]
