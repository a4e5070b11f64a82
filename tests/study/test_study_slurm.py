"""A study in SLURM's queue: the queue needs nothing of the command, and whatever ends a run is in its row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import assert_one_line_error, run_here

from mnist_dist.study.plan.table import rate_of, read_table
from mnist_dist.study.run.slurm import NEVER, main

GRID = ["--launcher", "slurm", "--batch-sizes", "10,20", "--processes", "1,2", "--wandb", "disabled"]


def words(folder, *more):
    return ["study", *GRID, "--output-dir", str(folder), *map(str, more)]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """SLURM's commands as scripts: makes one that is this bash."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def make(name, bash):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{bash}\n")
        (tmp_path / name).chmod(0o755)

    return make


@pytest.mark.parametrize(("more", "said"), [
    (["--quick"], "--launcher slurm is for mnist-dist's own training or a --command, got --quick"),
    (["--script", "train.py"], "--launcher slurm is for mnist-dist's own training or a --command, got --script"),
    (["--launcher", "torch", "--print"], "--print is for --launcher slurm"),
    (["--launcher", "ray", "--sbatch", "-p x"], "--sbatch is for --launcher slurm"),
    (["--sbatch", "-p 'x"], "--sbatch must be options of sbatch as a shell reads them"),
])
def test_what_is_wrong_is_said(more, said, tmp_path, capsys):
    drop = GRID[2:6] if "--quick" in more else []
    assert run_here([word for word in words(tmp_path / "s", *more) if word not in drop]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_the_scripts_are_printed_and_nothing_is_submitted(tmp_path, capsys):
    assert run_here(words(tmp_path / "s", "--repeats", 1, "--lr", "1e-3", "--print")) == 0
    one, two = capsys.readouterr().out.split("#!/usr/bin/env bash\n")[1:]
    assert "#SBATCH --array=0-3\n#SBATCH --ntasks=1\n" in one and "#SBATCH --array=0-1\n#SBATCH --ntasks=2\n" in two
    assert "--lr=1e-3" in one and "--dataset=mnist" in one and "b10-p2-repeat-1" in two
    assert not (tmp_path / "s").exists()
    for script in (one, two):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    done = subprocess.run(["bash"], input=one, text=True, capture_output=True,
                          env={**os.environ, "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_ID": "7"})
    assert_one_line_error(done, "has no run b10-p1-first-1: this script is submitted by `mnist-dist study")


def test_without_slurm_and_what_it_refuses(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mnist_dist.study.run.slurm.POLL_SECONDS", 0.05)
    commands("sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    assert run_here(words(tmp_path / "s", "--sbatch=--partition=x")) == 2
    assert "sbatch: sbatch: error: invalid partition specified: x" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert run_here(words(tmp_path / "s")) == 2
    assert "--launcher slurm needs SLURM's commands, and sbatch is not there" in capsys.readouterr().err


def test_what_left_the_queue_without_a_result_is_submitted_again_by_the_next_command(commands, tmp_path, monkeypatch,
                                                                                     capsys):
    """The controller does not answer at first; then it knows why one task ended, and has forgotten the others."""
    monkeypatch.setattr("mnist_dist.study.run.slurm.POLL_SECONDS", 0.05)
    commands("sbatch", f"cat > {tmp_path}/script; echo $* >> {tmp_path}/calls; wc -l < {tmp_path}/calls")
    commands("squeue", f"[ -e {tmp_path}/asked ] || {{ touch {tmp_path}/asked; echo 'no answer' >&2; exit 1; }}")
    commands("scontrol", "[ $4 = 1_2 ] && echo 'JobId=7 JobState=OUT_OF_MEMORY Reason=None' || exit 1")
    for _ in range(2):
        assert run_here(words(tmp_path / "s", "--repeats", 1, "--sbatch=-p x")) == 1
    printed = capsys.readouterr().out
    assert printed.count("squeue: no answer: the study waits") == 1
    assert (tmp_path / "calls").read_text() == 4 * "--parsable -p x\n"
    rows = read_table(tmp_path / "s")
    failed = [row for row in rows if row["status"] == "failed"]
    assert all("it left the queue before it started" in row["reason"] or row["out_of_memory"] for row in failed)
    assert all("out of memory in" in row["reason"] for row in rows if row not in failed)
    assert "SLURM: OUT_OF_MEMORY" in printed and json.loads((tmp_path / "s" / "study.json").read_text())["jobs"] == []


def test_why_runs_wait_is_said_and_what_never_starts_gets_its_row(commands, tmp_path, monkeypatch, capsys):
    """Job 1 is too large for its partition; job 2 waits for a node, then it is over."""
    for name, seconds in (("POLL", 0.02), ("NEVER", 0.1), ("AGAIN", 0.1)):
        monkeypatch.setattr(f"mnist_dist.study.run.slurm.{name}_SECONDS", seconds)
    commands("sbatch", f"cat > {tmp_path}/script; echo >> {tmp_path}/calls; wc -l < {tmp_path}/calls")
    commands("squeue", f"""echo >> {tmp_path}/looks; looks=$(wc -l < {tmp_path}/looks)
        [ -e {tmp_path}/cancelled ] || for task in 0 1 2 3; do echo "1_$task|PENDING|PartitionConfig"; done
        [ $looks -gt 40 ] || echo "2_0|PENDING|Nodes required for job are DOWN, DRAINED or reserved"
        [ $looks -gt 60 ] || echo '2_1|RUNNING|None'""")
    commands("scontrol", "exit 1")
    commands("scancel", f"echo $* >> {tmp_path}/cancelled")
    assert run_here(words(tmp_path / "s", "--repeats", 1)) == 1
    printed = capsys.readouterr().out.splitlines()
    waiting = [line for line in printed if line.startswith("waiting for")]
    assert waiting[0] == ("waiting for 5 runs: job 1: PartitionConfig; "
                          "job 2: Nodes required for job are DOWN, DRAINED or reserved")
    later = "waiting for 1 run: job 2: Nodes required for job are DOWN, DRAINED or reserved"
    assert waiting[-1] == later and waiting.count(later) > 1
    assert (tmp_path / "cancelled").read_text() == "1_0\n1_1\n1_2\n1_3\n"
    reasons = [row["reason"] for row in read_table(tmp_path / "s")]
    assert [reason.count("SLURM never starts it (PartitionConfig): ") for reason in reasons].count(1) == 4
    assert json.loads((tmp_path / "s" / "study.json").read_text())["jobs"] == []


def test_a_cell_that_slurm_refuses_has_a_row_and_the_others_go_on(commands, tmp_path, capsys):
    commands("sbatch", "if grep -q ntasks=2; then echo 'sbatch: error: no such node' >&2; exit 1; fi; echo 1")
    commands("squeue", "exit 0")
    commands("scontrol", "exit 1")
    assert run_here(words(tmp_path / "s", "--repeats", 1)) == 1
    reasons = {row["processes"]: row["reason"] for row in read_table(tmp_path / "s")}
    assert reasons == {1: "it left the queue before it started, as after scancel",
                       2: "sbatch: sbatch: error: no such node"}
    printed = capsys.readouterr().out
    assert "[1/6] " in printed and "[6/6] " in printed and "[0/6]" not in printed


@pytest.mark.parametrize("reason", [
    "BadConstraints", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "InvalidAccount", "InvalidQOS",
    "QOSMaxCpuPerJobLimit", "AssocMaxWallDurationPerJobLimit", "DependencyNeverSatisfied", "QOSMinCpuNotSatisfied"])
def test_a_reason_that_never_goes_away(reason):
    assert NEVER.fullmatch(reason)


@pytest.mark.parametrize("reason", [
    "Resources", "Priority", "PartitionDown", "PartitionInactive", "QOSMaxJobsPerUserLimit", "AssocGrpCpuLimit",
    "Dependency", "JobHeldUser", "JobArrayTaskLimit", "ReqNodeNotAvail, UnavailableNodes:n1", "BeginTime", "Licenses"])
def test_a_reason_that_may_go_away(reason):
    assert not NEVER.fullmatch(reason)


def test_a_stop_names_only_the_jobs_that_are_still_there(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mnist_dist.study.run.slurm.POLL_SECONDS", 0.02)
    commands("sbatch", f"cat > {tmp_path}/script; echo >> {tmp_path}/calls; wc -l < {tmp_path}/calls")
    commands("squeue", f"""echo >> {tmp_path}/looks; echo '2_0|RUNNING|None'; echo '2_1|RUNNING|None'
        [ $(wc -l < {tmp_path}/looks) -lt 5 ] || kill -INT {os.getpid()}""")
    commands("scontrol", "exit 1")
    assert run_here(words(tmp_path / "s", "--repeats", 1)) == 130
    assert "`scancel 2` ends its runs, which stay in SLURM's queue" in capsys.readouterr().err


@pytest.mark.parametrize(("known", "is_put_back"), [
    ("JobState=RUNNING Restarts=0 PreemptTime=None", False), ("JobState=RUNNING Restarts=1 PreemptTime=None", True),
    ("JobState=RUNNING Restarts=3 PreemptTime=None", False), ("JobState=CANCELLED Restarts=1 PreemptTime=None", False),
    ("JobState=RUNNING Restarts=0 PreemptTime=2026-01-01T00:00:00", True)])
def test_a_task_whose_run_fails_after_a_lost_node_is_put_back(known, is_put_back, commands, tmp_path, monkeypatch):
    monkeypatch.setattr("mnist_dist.study.run.slurm.POLL_SECONDS", 0.02)
    monkeypatch.setattr("mnist_dist.study.run.slurm.signal.signal", lambda *_: None)
    commands("sbatch", "echo 7")
    commands("squeue", f"kill -INT {os.getpid()}")
    assert run_here(words(tmp_path / "s", "--repeats", 1)) == 130
    commands("srun", "echo 'mnist-dist: error: stopped by SIGTERM after step 5: continue' >&2; exit 143")
    commands("scontrol", f"echo $* >> {tmp_path}/calls; echo 'JobId=7 {known}'")
    status = main([str(tmp_path / "s"), "b10-p1-first-1", "--job", "7", "--timeout", "60", "--"])
    assert status == 1 and ("requeue 7" in (tmp_path / "calls").read_text()) == is_put_back
    assert (tmp_path / "s" / "runs" / "b10-p1-first-1" / "outcome.json").exists() != is_put_back


@pytest.mark.faults
def test_a_study_whose_login_session_ends(slurm, small_dir, tmp_path):
    """One run is cancelled while it runs, and one before it does; one is put back into the queue."""
    folder = tmp_path / "s"
    command = [sys.executable, "-m", "mnist_dist", *words(folder, "--repeats", 3, "--epochs", 2, "--data-dir",
                                                          small_dir)]

    def start():
        return subprocess.Popen(command, env=slurm.environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)

    def states():
        lines = slurm.ask("squeue", "--noheader", "--array", "--format=%F_%K %T").splitlines()
        return dict(line.split() for line in lines)

    login, until = start(), time.monotonic() + 60
    while list(states().values()).count("RUNNING") < 2:
        assert time.monotonic() < until, login.communicate()
        time.sleep(0.2)
    os.killpg(login.pid, signal.SIGKILL)
    login.communicate()
    running = [task for task, state in states().items() if state == "RUNNING"]
    waiting = [task for task, state in states().items() if state == "PENDING"]
    assert slurm.ask("scancel", running[0], waiting[-1]) == "" and slurm.ask("scontrol", "requeue", running[1]) == ""
    printed, _ = start().communicate(timeout=400)
    print(printed)
    rows = read_table(folder)
    assert len(rows) == 14 and [row["reason"] for row in rows if row["status"] == "failed"] == [
        "SLURM: CANCELLED", "it left the queue before it started, as after scancel"]
    assert all(row["summary"]["global_batch_size"] for row in rows if row["status"] == "completed")
    assert (folder / "report.html").exists() and states() == {}
    printed, _ = start().communicate(timeout=200)
    assert "[2/2] " in printed and {row["status"] for row in read_table(folder)} == {"completed"}, printed


@pytest.mark.faults
def test_any_command_in_the_queue(slurm, tmp_path):
    """A shell script that is not changed: each of its processes prints a rate."""
    (tmp_path / "train.sh").write_text("echo $1 samples, tok/sec: $((1000 * $SLURM_NTASKS))\n")
    command = [sys.executable, "-m", "mnist_dist", "study", "--launcher", "slurm", "--command",
               f"srun --ntasks={{processes}} sh {tmp_path / 'train.sh'} {{batch_size}}", "--rate-from",
               r"tok/sec: (\d+)", "--unit", "tokens", "--batch-sizes", "8,16", "--processes", "1,2", "--repeats", "1",
               "--wandb", "disabled", "--output-dir", str(tmp_path / "s")]
    done = subprocess.run(command, env=slurm.environment, cwd=tmp_path, text=True, capture_output=True, timeout=400)
    print(done.stdout, done.stderr)
    rows = read_table(tmp_path / "s")
    assert done.returncode == 0 and len(rows) == 6
    for row in rows:
        assert rate_of(row) == pytest.approx(1000 * row["processes"])
        assert row["summary"]["printed_rates"] == row["processes"]
        output = (tmp_path / "s" / "runs" / row["run"] / "output.txt").read_text()
        assert output.count(f"{row['global_batch_size']} samples") == row["processes"]


@pytest.mark.faults
def test_a_cell_that_the_cluster_cannot_run_has_a_row(slurm, small_dir, tmp_path):
    """The partition has 4 CPUs, and the cell needs 16."""
    command = [sys.executable, "-m", "mnist_dist", "study", "--launcher", "slurm", "--batch-sizes", "16",
               "--processes", "1,16", "--repeats", "1", "--epochs", "1", "--wandb", "disabled", "--data-dir",
               str(small_dir), "--output-dir", str(tmp_path / "s")]
    done = subprocess.run(command, env=slurm.environment, cwd=tmp_path, text=True, capture_output=True, timeout=400)
    print(done.stdout, done.stderr)
    rows = {(row["processes"], row["status"]): row["reason"] for row in read_table(tmp_path / "s")}
    assert done.returncode == 1 and set(rows) == {(1, "completed"), (16, "failed")}
    assert "SLURM never starts it" in rows[16, "failed"]
    assert slurm.ask("squeue", "--noheader") == ""
