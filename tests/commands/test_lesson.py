"""`mnist-dist lesson`: what it measures, what its sentences say of the figures, and that it keeps its time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support import assert_one_line_error, mnist_dist, run_here

from mnist_dist.commands import lesson
from mnist_dist.commands.lesson import BATCH_SIZES, Course, Moment, report_lines, sentences


def test_the_lesson(small_dir, tmp_path, monkeypatch, capsys):
    for name, value in (("SAMPLES", 600), ("LEAST_SECONDS", 0.2), ("MOST_SECONDS", 0.4)):
        monkeypatch.setattr(lesson, name, value)
    assert run_here(["lesson", "--data-dir", str(small_dir), "--output-dir", str(tmp_path / "lesson")]) == 0
    text = (tmp_path / "lesson" / "lesson.md").read_text()
    printed = capsys.readouterr().out
    table = printed[printed.index("test NLL after") - 60 :].splitlines()
    assert all(len(line) <= 60 for line in table[:7]) and text.splitlines()[-1][3:] in printed
    assert text.startswith("# What a mini-batch changes\n")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row[1].strip() for row in rows] == ["1", "8", "32", "200", "1,000"]
    assert [line[:2] for line in text.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3.", "4.", "5."]
    with Image.open(tmp_path / "lesson" / "lesson.png") as picture:
        assert picture.format == "PNG" and picture.width > 800


def test_where_it_cannot_write_is_named(small_dir, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line_error(mnist_dist("lesson", "--data-dir", small_dir, "--output-dir", "file/x", cwd=tmp_path),
                          "cannot be written")
    assert_one_line_error(mnist_dist("lesson", "--data-dir", tmp_path, cwd=tmp_path), "--data-dir")


def course(batch_size, seconds, samples, nll, nll_at=None):
    at = Moment(seconds / 2, 1000, nll if nll_at is None else nll_at)
    return Course(batch_size, (at, Moment(seconds, samples, nll)), at)


def test_the_sentences_say_what_the_figures_say():
    courses = [course(1, 8.0, 10_000, 0.34), course(32, 8.0, 400_000, 0.15, 0.9),
               course(1000, 8.0, 2_000_000, 0.4, 2.1)]
    first, second, third, fourth, _ = sentences(courses, 10_000, 8.0, 60_000)
    assert "takes 48.0 s one sample at a time and 0.240 s in batches of 1,000: 200 times as fast" in first
    assert "takes 0.80 ms with one sample and 4.00 ms with 1,000, which is 5.00 times as long" in second
    assert "After the same 10,000 samples one sample at a time has the lowest test NLL, 0.340" in third
    assert "batches of 1,000 have 2.100" in third
    assert "After the same 8.0 s batches of 32 have the lowest test NLL, 0.150" in fourth
    assert "one sample at a time has 0.340" in fourth
    table = report_lines(courses, 10_000, 8.0, 60_000)
    assert "| 32 | 0.64 | 1.20 | 0.900 | 0.150 |" in table


@given(st.lists(st.floats(0.01, 3.0), min_size=10, max_size=10))
def test_the_best_is_the_lowest(nlls):
    courses = [course(size, 8.0, 10_000 * size, nlls[i], nlls[i + 5]) for i, size in enumerate(BATCH_SIZES)]
    _, _, third, fourth, _ = sentences(courses, 10_000, 8.0, 60_000)
    assert f"the lowest test NLL, {min(nlls[5:]):.3f}" in third
    assert f"the lowest test NLL, {min(nlls[:5]):.3f}" in fourth


def test_the_time_is_bounded():
    """Training alone: evaluations and the start take what is left of 90 s."""
    assert len(BATCH_SIZES) * lesson.MOST_SECONDS <= 60


@pytest.mark.parametrize("batch_size", [1, 200])
def test_it_ends_when_the_time_or_the_samples_are_over(batch_size, small_dir):
    from accelerate import Accelerator

    from mnist_dist.config import TrainConfig
    from mnist_dist.data import load
    from mnist_dist.processes.team import Team

    sets = load("mnist", str(small_dir))
    done = lesson.train_for(batch_size, TrainConfig(), Team(Accelerator(cpu=True), 60), sets, 1500, 0.5)
    assert done.last.samples == 1500 if batch_size == 1 and done.last.seconds < 0.5 else done.last.seconds >= 0.5
    assert done.at_samples.samples >= 1500 or done.at_samples == done.last
    samples = [moment.samples for moment in done.moments]
    assert samples == sorted(set(samples)) and all(moment.nll > 0 for moment in done.moments)
