"""A study: continued where it stopped, whatever stopped it; a run that fails is a row with its reason."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from support import ROOT, mnist_dist, records_of, result_of, run, run_here

from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.study.plan.table import read_table

STAND_IN = str(ROOT / "tests" / "helpers" / "stand_in.py")


def study(folder, *words, sizes="10,20", repeats=2, rest=()):
    """`mnist-dist study` of the stand-in; the exit status."""
    wandb = [] if "--wandb" in words else ["--wandb", "disabled"]
    return run_here(["study", "--script", STAND_IN, "--batch-sizes", sizes, "--repeats", str(repeats), "--output-dir",
                 str(folder), *wandb, *map(str, words), *(["--", *rest] if rest else [])])


def stamps(folder):
    """Inode and times of every result."""
    found = {}
    for path in sorted(folder.glob("runs/*/result.json")):
        stat = path.stat()
        found[path.parent.name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def started(folder):
    """The names of the runs, as they were started."""
    return (folder / "started.txt").read_text().split()


def test_a_study_has_a_row_for_each_run_in_the_recorded_order(tmp_path, capsys):
    assert study(tmp_path) == 0
    rows = read_table(tmp_path)
    assert [row["run"] for row in rows] == started(tmp_path)
    assert started(tmp_path)[0] == "b10-p1-first-1" and started(tmp_path)[-1] == "b10-p1-last-1"
    assert sorted(started(tmp_path)[1:-1]) == [f"b{size}-p1-repeat-{r}" for size in (10, 20) for r in (1, 2)]
    for number, row in enumerate(rows, 1):
        assert row["status"] == "completed" and row["reason"] == "" and row["order"] == number
        assert row["epochs"][0]["measured_samples"] == 100 * row["global_batch_size"]
        assert row["study"]["seed"] == 0 and row["study"]["command"].startswith("mnist-dist study --script")
    csv = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(csv) == 7 and "environment.num_processes" in csv[0] and "epochs.measured_seconds" in csv[0]
    printed = capsys.readouterr().out
    assert "[6/6] b10-p1-last-1: " in printed and " left\n" in printed
    assert "b10-p1-last-1" in (tmp_path / "study.log").read_text()
    assert "b20-p1" not in printed.splitlines()[-1] and (tmp_path / "report.md").exists()


def test_the_same_command_runs_nothing_twice_and_another_grid_adds(tmp_path):
    assert study(tmp_path) == 0
    before = stamps(tmp_path)
    assert study(tmp_path) == 0 and stamps(tmp_path) == before and len(started(tmp_path)) == 6
    assert study(tmp_path, sizes="20,30", repeats=3) == 0
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"b20-p1-first-2", "b20-p1-last-2", "b20-p1-repeat-3", "b30-p1-repeat-1",
                                        "b30-p1-repeat-2", "b30-p1-repeat-3"}
    assert len(read_table(tmp_path)) == 12


def test_a_refused_command_changes_no_outcome(tmp_path):
    """The outcome is missing of a run that has ended when the study was killed; the study's own command writes it."""
    assert study(tmp_path) == 0
    outcome = tmp_path / "runs" / "b10-p1-repeat-1" / "outcome.json"
    command = json.loads(outcome.read_text())["command"]
    outcome.unlink()
    assert study(tmp_path, "--lr", "0.5") == 2 and not outcome.exists()
    assert study(tmp_path) == 0
    assert json.loads(outcome.read_text()) == {
        "status": "completed", "reason": "", "started": None, "seconds": None, "command": command}
    (row,) = [row for row in read_table(tmp_path) if row["run"] == outcome.parent.name]
    assert (row["command"], row["seconds"]) == (command, None)


TROUBLES = {
    20: ("kill", "ended by SIGKILL, perhaps because memory ran out"),
    30: ("memory", "out of memory: MemoryError: no room for the batch"),
    40: ("hang", "no result after 2 s (--cell-timeout): ended"),
    50: ("silent", "it left no result.json in its --output-dir"),
    60: ("breach", "its result.json has no summary, summary.global_batch_size, epochs[].measured_seconds"),
    80: ("target", "its result.json has no epochs[].step, summary.targets[] with target_nll (or name, value "
                   "and direction), step and samples"),
}


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path, capsys):
    trouble = ",".join(f"{size}:{kind}" for size, (kind, _) in TROUBLES.items())
    assert study(tmp_path, "--cell-timeout", 2, sizes="10,20,30,40,50,60,70,80", repeats=1,
                 rest=["--trouble", trouble]) == 1
    rows = {row["global_batch_size"]: row for row in read_table(tmp_path) if row["role"] == "repeat"}
    assert len(rows) == 8 and {size for size, row in rows.items() if row["status"] == "completed"} == {10, 70}
    printed, report = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    for size, (_, reason) in TROUBLES.items():
        assert rows[size]["status"] == "failed" and rows[size]["reason"] == reason
        assert reason in printed and reason in report
    assert len(started(tmp_path)) == 10, "none is tried twice by one command"


def test_values_that_are_no_file_names_stay_in_the_folder(tmp_path):
    folder = tmp_path / "inside" / "study"
    values = ["../../x", "<script>alert(1)</script>", "\"'`|", "y" * 200, "a/b"]
    assert study(folder, "--axis", f"lr={','.join(values)}", sizes="10", repeats=1) == 0
    rows = [row for row in read_table(folder) if row["role"] == "repeat"]
    assert sorted(row["options"]["lr"] for row in rows) == sorted(values)
    assert all((folder / "runs" / row["run"] / "result.json").exists() for row in rows)
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()} == {
        ("inside", "study")}
    html = (folder / "report.html").read_text()
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html


def test_a_broken_run_is_run_anew_and_alone(tmp_path):
    assert study(tmp_path) == 0
    before = stamps(tmp_path)
    (tmp_path / "runs" / "b20-p1-repeat-1" / "result.json").write_text("{")
    assert study(tmp_path) == 0
    assert started(tmp_path)[6:] == ["b20-p1-repeat-1"]
    assert {name for name, stamp in stamps(tmp_path).items() if stamp != before[name]} == {"b20-p1-repeat-1"}


@pytest.mark.parametrize("number, status", [
    (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.faults),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.faults)])
def test_stopped_in_the_middle_and_continued(number, status, tmp_path):
    words = ["study", "--script", STAND_IN, "--batch-sizes", "10,20,30", "--repeats", "2", "--output-dir",
             str(tmp_path), "--wandb", "disabled", "--", "--seconds", "0.3"]
    # a shell's background job ignores Ctrl-C, and so do the processes that it starts: these tests may be in one
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen([sys.executable, "-m", "mnist_dist", *words], cwd=ROOT, env=child_environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 60
        while len(stamps(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(number)
        _, errors = running.communicate(timeout=200)
    finally:
        running.kill()
    assert running.returncode == status
    before = stamps(tmp_path)
    assert 3 <= len(before) < 8
    if number != signal.SIGKILL:
        assert errors.count("\n") == 1 and "the same command continues the study" in errors
        assert "stopped by a signal" in {row["reason"] for row in read_table(tmp_path)}
    assert run_here(words) == 0
    after, rows = stamps(tmp_path), read_table(tmp_path)
    assert {name: after[name] for name in before} == before, "no finished run is run twice"
    assert len(rows) == len({row["run"] for row in rows}) == 8 and {row["status"] for row in rows} == {"completed"}


def test_two_processes_of_a_script(tmp_path, capsys):
    assert study(tmp_path, "--processes", "1,2,3", sizes="2", repeats=1) == 0
    rows = {row["run"]: row for row in read_table(tmp_path)}
    assert rows["b2-p2-repeat-1"]["environment"]["num_processes"] == 2
    assert rows["b2-p3"]["status"] == "impossible" and "smaller than 3 processes" in rows["b2-p3"]["reason"]
    assert "cannot run: batch 2 on 3 processes" in capsys.readouterr().out.split("[1/")[0]


@pytest.mark.long
def test_our_own_training(small_dir, tmp_path):
    words = ["study", "--batch-sizes", "100", "--repeats", "1", "--axis", "lr=1e-3",
             "--output-dir", str(tmp_path / "s"), "--data-dir", str(small_dir), "--epochs", "1", "--wandb", "disabled"]
    assert run_here(words) == 0
    row = read_table(tmp_path / "s")[1]
    assert row["run"] == "b100-p1-lr-0.001-repeat-1" and row["config"]["lr"] == 1e-3
    assert row["config"]["wandb_group"] == "s" and row["config"]["checkpoint_every"] == "never"
    (epoch,), (of_run,) = row["epochs"], result_of(tmp_path / "s" / "runs" / row["run"])["epochs"]
    assert sum(samples for _, samples, _ in epoch["windows"]) == epoch["measured_samples"], "from the run's own file"
    assert {name: value for name, value in epoch.items() if name != "windows"} == of_run
    assert (tmp_path / "s" / "runs" / row["run"] / "output.txt").read_text().startswith("1 process on ")


def test_the_study_is_in_wandb_with_its_table_and_report(tmp_path):
    folder = tmp_path / "s"
    done = mnist_dist("study", "--script", STAND_IN, "--batch-sizes", "10,20", "--repeats", 1, "--output-dir", folder,
                      "--wandb", "offline", "--tags", "a,b", "--", "--trouble", "20:memory", cwd=tmp_path)
    assert done.returncode == 1, "one run fails"
    (offline,) = (folder / "wandb").glob("offline-run-*")
    assert f"wandb sync {offline}" in done.stdout
    records = records_of(folder)
    assert records["run"][0]["run_group"] == "s" and records["run"][0]["job_type"] == "study"
    logged = {item for record in records["history"] for item in record["item"]}
    assert {"runs", "throughput_table", "pictures/throughput"} <= {name.split(".")[0] for name in logged}
    (artifact,) = (one for one in records["artifact"] if one["type"] == "study")  # W&B keeps its tables as others
    names = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert {"report.md", "report.html", "runs.jsonl", "runs.csv", "pictures/throughput.svg"} <= names
    assert {row["status"] for row in read_table(folder) if row["global_batch_size"] == 10} == {"completed"}, (
        "a script gets no option of W&B")


def test_the_parent_imports_no_torch(tmp_path):
    code = ("import sys; from mnist_dist import cli; status, _ = cli._status(sys.argv[1:]); "
            "print(status, sorted({'torch', 'accelerate'} & set(sys.modules)), 'scipy' in sys.modules, flush=True); "
            "import os; os._exit(0)")
    done = run([sys.executable, "-c", code, "study", "--script", STAND_IN, "--batch-sizes", "10", "--repeats", "1",
                "--output-dir", tmp_path, "--wandb", "offline"], cwd=ROOT, **child_environment())
    assert done.stdout.splitlines()[-1] == "0 [] True", done.stderr


def test_a_dry_run_starts_and_writes_nothing(tmp_path, capsys):
    assert study(tmp_path / "s", "--dry-run", sizes="10,20", repeats=3) == 0
    printed = capsys.readouterr().out
    assert "2 cells, 8 runs on " in printed and "about " in printed and "b20-p1-repeat-3" in printed
    assert not (tmp_path / "s").exists()


BAD = {
    "--batch-sizes": (["--batch-sizes", "10,x"], "--batch-sizes must be a whole number at least 1"),
    "no batch": (["--batch-sizes", ""], "--batch-sizes must be"),
    "--processes": (["--processes", "0"], "--processes must be a whole number from 1 to 65,536"),
    "--scaling": (["--scaling", "fast"], "--scaling must be strong, weak, or strong,weak, got 'fast'"),
    "--repeats": (["--repeats", "2.5"], "--repeats must be a whole number"),
    "--cell-timeout": (["--cell-timeout", "never"], "--cell-timeout must be a number of seconds above 0"),
    "--script": (["--script", "none.py"], "--script none.py is not a file"),
    "words": (["--", "--x"], "words after -- are for a --script or a --command"),
    "twice": (["--lr", "1", "--axis", "lr=1,2"], "--lr 1 and an axis of it say two things"),
    "axis": (["--axis", "mixed-precision=no,fp8"], "--mixed-precision must be one of no, fp16, bf16; got 'fp8'"),
    "training": (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    "nothing can run": (["--batch-sizes", "1", "--processes", "2"], "no cell of the grid can run"),
    "unknown": (["--batchsizes", "1"], "did you mean --batch-sizes?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert run_here(["study", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(("run", "study.json"))]


def test_another_study_is_not_mixed_in(tmp_path, capsys):
    assert study(tmp_path, repeats=1) == 0
    assert study(tmp_path, repeats=1, rest=["--seconds", "0"]) == 2
    assert "give the same, or another --output-dir" in capsys.readouterr().err
    (tmp_path / "study.json").write_text(json.dumps({"mark": "m"}))
    assert study(tmp_path, repeats=1) == 2
    assert "study.json cannot be read" in capsys.readouterr().err


@pytest.mark.long
def test_the_example_is_studied(tmp_path):
    """Another model on made-up data, with plain Accelerate: 2 batch sizes on 1 and 2 processes."""
    script = str(ROOT / "examples" / "your_training.py")
    words = ["study", "--script", script, "--batch-sizes", "100,400", "--processes", "1,2", "--repeats", "1",
             "--output-dir", str(tmp_path), "--wandb", "disabled", "--", "--epochs", "1"]
    assert run_here(words) == 0
    rows = read_table(tmp_path)
    assert len(rows) == 6 and {row["status"] for row in rows} == {"completed"}
    for row in rows:
        steps = 20_000 // row["global_batch_size"] - 5
        assert row["epochs"][0]["measured_samples"] == steps * row["global_batch_size"]
        assert sum(count for count, _, _ in row["epochs"][0]["windows"]) == steps
        assert row["environment"]["num_processes"] == row["processes"] and row["environment"]["torch"]
    report = (tmp_path / "report.md").read_text()
    assert "4 cells" in report and "## Strong scaling" in report and "| 400 | 2 |" in report
