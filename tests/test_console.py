"""What a person sees: the introduction before anything is compiled, a table that fits, one bar, a closing line."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, epoch_record, mnist_dist, mnist_dist_launched, run_summary

from mnist_dist import console
from mnist_dist.console import COLUMNS, Console, cell, fitting
from mnist_dist.output import wrapped
from mnist_dist.text import counted

RECORD = epoch_record(epoch=2, step=3000)


def test_a_row_is_as_wide_as_its_head_and_as_the_terminal(monkeypatch, capsys):
    record = epoch_record(evaluations=[{"step": 100, "samples": 20_000, "train_seconds": 1.0, "test_nll": 0.5,
                                        "test_accuracy": 0.9}])
    for width in range(20, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = Console(True)
        shown.table_head()
        shown.epoch_rows(record)
        head, *rows = capsys.readouterr().out.splitlines()
        assert len(rows) == 2 and all(len(row) <= len(head) for row in rows)
        assert len(head) <= max(width, len("epoch      step test NLL accuracy samples/s"))
        assert ("train s" in head) == (width >= 63) and ("test s" in head) == (width >= 79), (width, head)


def test_an_evaluation_within_an_epoch_is_a_row_under_the_same_heads(capsys):
    shown = Console(True)
    shown.table_head()
    shown.evaluation_row(3, {"step": 950, "test_nll": 0.25, "test_accuracy": 0.91234, "samples": 1, "train_seconds": 9})
    head, row = capsys.readouterr().out.splitlines()
    at = {heading: row[head.index(heading) + len(heading) - 8 :][:8].strip() for heading in ("test NLL", "accuracy")}
    assert at == {"test NLL": "0.25000", "accuracy": "91.23 %"} and row.split() == ["3", "950", "0.25000", "91.23", "%"]


@given(st.sampled_from(COLUMNS), st.floats(0, 1e99) | st.integers(0, 10**15))
def test_no_figure_overflows_its_column(column, value):
    if column.form.endswith("d"):
        value = min(int(value), 99_999 if column.width == 5 else 9_999_999)
    if column.is_share:
        value = min(value, 1.0)
    text = cell(column, {column.metric: value})
    assert len(text) == column.width
    assert float(text.replace(",", "").replace("%", "")) == pytest.approx(
        100 * value if column.is_share else value, rel=0.05, abs=0.5)


def test_narrow_terminals_leave_the_least_important_out():
    assert [column.heading for column in fitting(60)] == ["epoch", "step", "train loss", "test NLL", "accuracy",
                                                          "samples/s"]
    assert fitting(79) == list(COLUMNS) and len(fitting(1)) == 5


@given(st.text(st.sampled_from("ab c-/"), max_size=200), st.integers(5, 60))
def test_lines_wrap_at_words_and_nothing_is_lost(line, width):
    parts = wrapped(line, width)
    assert [word for part in parts for word in part.split()] == line.split()
    assert all(len(part) <= width or len(part.split()) == 1 for part in parts)


def test_numbers_of_things():
    assert [counted(n, "step") for n in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
    assert counted(1, "process", "processes") == "1 process" and counted(3, "process", "processes") == "3 processes"


def test_a_log_has_progress_under_the_tables_columns(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", -1.0)
    shown = Console(True)
    shown.table_head()
    shown.progress(2, 20, 2500, 20_000, loss=0.4, samples_per_second=12_345.6)
    shown.progress(2, 20, 2700, 20_000, loss=0.3, samples_per_second=12_345.6, is_share=True)
    shown.epoch_row(RECORD)
    printed = capsys.readouterr()
    head, row = printed.out.splitlines()
    line, of_rank = printed.err.splitlines()
    assert line.split() == ["2", "2,500", "0.40000", "12,346", "of", "20,000", "steps"]
    assert of_rank.endswith("of 20,000 steps, loss of rank 0")
    for heading, text in (("step", "2,500"), ("train loss", "0.40000"), ("samples/s", "12,346")):
        assert line[: head.index(heading) + len(heading)].endswith(text), "aligned"
    assert row[: head.index("step") + 4].endswith("3,000")


def test_a_log_has_a_line_between_rows_every_ten_seconds_at_most(monkeypatch, capsys):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.seconds)
    shown = Console(True)
    for step in range(1, 101):
        now.seconds += 0.5
        shown.progress(0, 1, step, 100)
    assert 4 <= len(capsys.readouterr().err.splitlines()) <= 5


def test_a_slow_start_brings_no_line_before_the_first_ten_seconds(monkeypatch, capsys):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: now.seconds)
    shown = Console(True)
    now.seconds = 60.0  # a download
    shown.table_head()
    shown.progress(0, 1, 1, 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("number", "head"), [(0, []), (2, []), (3, ["1 earlier epoch: run/metrics.jsonl"]),
                                              (40, ["38 earlier epochs: run/metrics.jsonl"])])
def test_a_resume_prints_the_last_two_epochs_again(number, head, capsys):
    records = [epoch_record(epoch=epoch) for epoch in range(number)]
    Console(speaks=True).earlier_rows(records, Path("run/metrics.jsonl"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(head)] == head
    assert [int(line.split()[0]) for line in lines[len(head):]] == list(range(number))[-2:]


def test_a_silent_console_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", -1.0)
    shown = Console(False)
    shown.table_head()
    shown.progress(0, 1, 1, 2)
    shown.epoch_rows(RECORD)
    shown.say("a")
    shown.warn("b")
    shown.close(ROOT, run_summary(), [RECORD])
    assert capsys.readouterr() == ("", "")


def test_a_quiet_console_prints_warnings_and_the_closing_line(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", -1.0)
    shown = Console(True, quiet=True)
    shown.table_head()
    shown.progress(0, 1, 1, 2)
    shown.epoch_rows(RECORD)
    shown.warn("b")
    shown.close(ROOT, run_summary(samples_per_second=1234.5), [RECORD])
    printed = capsys.readouterr()
    assert printed.err == "mnist-dist: warning: b\n"
    assert re.fullmatch(r"test NLL 0\.25000, accuracy \S+ %; 1,234 samples/s, 1 epoch in \S+ s; everything is in \S+\n",
                        printed.out), printed.out


def on_a_terminal(words, width, cwd, **environment):
    """What a command writes to a terminal of this width, standard output and standard error together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    with subprocess.Popen([sys.executable, "-m", "mnist_dist", *map(str, words)], cwd=cwd, stdin=theirs, stdout=theirs,
                          stderr=theirs, close_fds=True, env={**environment, "TERM": "xterm", "PYTHONPATH": str(ROOT),
                                                              **{name: value for name, value in os.environ.items()
                                                                 if name != "COLUMNS"}}) as command:
        os.close(theirs)
        content, end = b"", time.monotonic() + 120
        while time.monotonic() < end:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            content += part
        assert command.wait(10) == 0, content.decode()
    os.close(ours)
    return content.decode()


def screen(written):
    """The lines that are left on the screen: a carriage return goes back, and what is written there replaces."""
    lines = []
    for line in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part):]
        lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize("width", [pytest.param(80, marks=pytest.mark.long),
                                   pytest.param(60, marks=pytest.mark.faults)])
def test_the_screen_of_a_run(width, small_dir, tmp_path):
    written = on_a_terminal(["train", "--data-dir", small_dir, "--epochs", 60, "--batch-size", 2, "--evaluate-every",
                             "700samples", "--target-nll", "0.0001", "--max-steps", 1000, "--wandb", "disabled",
                             "--output-dir", "run"], width, tmp_path, NO_COLOR="1")
    lines = screen(written)
    assert all(len(line) <= width for line in lines if " " in line), [line for line in lines if len(line) > width]
    assert "\x1b[3" not in written, "no colour"
    (bar, *_) = re.findall(r"epoch \d of 60 \|[^|]*\|[^\r]*", written) or [""]
    assert re.search(r"samples/s, loss [\d.]+, [\d:?]+ left", bar), written
    assert not any("|" in line for line in lines), "the bar is gone"
    head = next(i for i, line in enumerate(lines) if line.startswith("epoch"))
    rows = [line.split() for line in lines[head + 1 :] if re.match(r" +\d+ +[\d,]+ ", line)]
    assert [row[1] for row in rows] == ["350", "505", "701", "1,000"]
    assert [len(row) > 5 for row in rows] == [False, True, False, True], "evaluations within an epoch are rows"
    assert " ".join(lines[head + 5 :]).startswith("test NLL")


@pytest.fixture(scope="module")
def compiled_run(small_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    done = mnist_dist("train", "--data-dir", small_dir, "--max-steps", 3, "--compile", "on", "--wandb", "disabled",
                      "--output-dir", "run", cwd=folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.long
def test_the_introduction_comes_before_the_compiler(compiled_run):
    begins = ["1 process on", "global batch 200 = 200 per process", "writing to", "compiling the step", "compiled in",
              "epoch      step"]
    assert [line[: len(begin)].lstrip() for line, begin in zip(compiled_run, begins, strict=False)] == begins


@pytest.mark.faults
def test_an_introduction_is_there_also_if_the_compiler_fails(small_dir, tmp_path):
    done = mnist_dist_launched("train", "--data-dir", small_dir, "--compile", "on", "--wandb", "disabled", cwd=tmp_path,
                      CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2 and "could not be compiled" in done.stderr
    assert done.stdout.startswith("1 process on") and "compiled in" not in done.stdout
