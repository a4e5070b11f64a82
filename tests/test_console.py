"""What a person sees: the introduction before anything is compiled, and a table that stays a table in a log."""

from __future__ import annotations

import pytest
from support import epoch_record, mnist_dist, mnist_dist_launched

from mnist_dist import console
from mnist_dist.console import Console

RECORD = epoch_record(epoch=2, step=3000)


def test_a_log_has_progress_under_the_tables_columns(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", -1.0)
    shown = Console(True)
    shown.table_head()
    shown.progress(2, 500, 1000)
    shown.table_row(RECORD)
    printed = capsys.readouterr()
    head, row = printed.out.splitlines()
    (line,) = printed.err.splitlines()
    assert line.split()[:2] == ["2", "2,500"] and "500 of the epoch's 1,000 steps" in line
    end = head.index("step") + len("step")
    assert line[:end].endswith("2,500") and row[:end].endswith("3,000"), "aligned"


def test_a_silent_console_prints_nothing(monkeypatch, capsys):
    monkeypatch.setattr(console, "LOG_SECONDS", -1.0)
    shown = Console(False)
    shown.table_head()
    shown.progress(0, 1, 2)
    shown.table_row(RECORD)
    shown.say("a")
    shown.warn("b")
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def compiled_run(small_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    done = mnist_dist("train", "--data-dir", small_dir, "--max-steps", 3, "--compile", "on", "--wandb", "disabled",
                      "--output-dir", "run", cwd=folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_introduction_comes_before_the_compiler(compiled_run):
    begins = ["1 process on", "global batch 200 = 200 per process", "writing to", "compiling the step", "compiled in",
              "epoch     step"]
    assert [line[: len(begin)].lstrip() for line, begin in zip(compiled_run, begins, strict=False)] == begins


@pytest.mark.long
def test_an_introduction_is_there_also_if_the_compiler_fails(small_dir, tmp_path):
    done = mnist_dist_launched("train", "--data-dir", small_dir, "--compile", "on", "--wandb", "disabled", cwd=tmp_path,
                      CXX=str(tmp_path / "no-compiler"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 2 and "could not be compiled" in done.stderr
    assert done.stdout.startswith("1 process on") and "compiled in" not in done.stdout
