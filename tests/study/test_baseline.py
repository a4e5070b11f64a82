"""`report A B --fail-if-slower`: it fails if a slow-down is shown, and only then; the same bytes each time."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from support import run_here
from tables import study

from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import write_table

RATES = {Cell(batch, 1): 1000.0 for batch in (10, 20, 40)}


def judged(folder, factors, *words, repeats=5, spread=0.01):
    """The exit status of a comparison with a study whose cells are so many times as fast."""
    folder.mkdir(exist_ok=True)
    slower = {cell: rate * factor for (cell, rate), factor in zip(RATES.items(), factors, strict=True)}
    for name, rates, seed in (("baseline", RATES, 1), ("study", slower, 2)):
        (folder / name).mkdir(exist_ok=True)
        write_table(folder / name, study(rates, repeats, spread, seed))
    return run_here(["report", str(folder / "baseline"), str(folder / "study"), *words])


def test_a_slow_down_fails_and_is_named(tmp_path, capsys):
    junit = tmp_path / "junit.xml"
    assert judged(tmp_path, (1, 0.8, 1), "--fail-if-slower", "5%", "--junit", str(junit)) == 1
    assert "slower by more than 5 %: batch 20 on 1 process: 0.8" in capsys.readouterr().out
    suite = ElementTree.parse(junit).getroot()
    assert dict(suite.attrib) == {"name": "study against baseline", "tests": "3", "failures": "1", "errors": "0",
                                  "skipped": "0"}
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["batch 20 on 1 process"]


@pytest.mark.parametrize("factors, words", [((1, 1, 1), "no cell of 3 is shown to be slower by more than 5 %"),
                                            ((1, 0.97, 1), "no cell of 3"), ((1, 2, 3), "no cell of 3")])
def test_what_is_not_shown_passes(factors, words, tmp_path, capsys):
    assert judged(tmp_path, factors, "--fail-if-slower", "5 %") == 0
    assert words in capsys.readouterr().out


def test_a_slow_down_that_may_be_missed_is_said(tmp_path, capsys):
    assert judged(tmp_path, (1, 0.9, 1), "--fail-if-slower", "5%", spread=0.2) == 0
    assert "a slow-down of 5 % may be missed, do more repeats" in capsys.readouterr().out
    assert judged(tmp_path / "two", (1, 0.1, 1), "--fail-if-slower=5%", f"--junit={tmp_path / 'j.xml'}", repeats=2) == 0
    assert "nothing can be shown: a cell needs 3 repeats" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("skipped") == "3"


@pytest.mark.parametrize("value", ["a\nb", "\x00", "\x1b[31m", "<&\""])
def test_hostile_options_give_xml_that_can_be_read(value):
    from mnist_dist.study.analysis.analysis import Analysis
    from mnist_dist.study.analysis.comparison import compare
    from mnist_dist.study.report import baseline

    tables = [Analysis(study({Cell(10, 1, (("lr", value),)): rate}, 3, 0.01, 1)) for rate in (10.0, 1.0)]
    text = baseline.junit(compare(*tables), 0.05, value)
    assert ElementTree.fromstring(text.encode()).get("failures") == "1"


def test_ten_reruns_give_the_same_bytes(tmp_path):
    names = ("junit.xml", "study/compared-with-baseline.md", "study/compared-with-baseline.html")
    found = set()
    for _ in range(10):
        assert judged(tmp_path, (1, 0.8, 1), "--fail-if-slower", "5%", "--junit", str(tmp_path / "junit.xml")) == 1
        found.add(tuple((tmp_path / name).read_bytes() for name in names))
    assert len(found) == 1


@pytest.mark.parametrize("words, message", [
    (["a", "--fail-if-slower", "5%"], "--fail-if-slower compares two studies, got one folder"),
    (["a", "b", "--junit", "j.xml"], "--junit j.xml is for --fail-if-slower"),
    *((["a", "b", "--fail-if-slower", limit], "--fail-if-slower must be a percentage above 0 and below 100")
      for limit in ("5", "x%", "0%", "100%", "-1%", "nan%", "")),
])
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_here(["report", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors and not list(tmp_path.iterdir())


def test_studies_without_a_common_cell_and_a_file_that_cannot_be_written(tmp_path, capsys):
    for name, cell in (("baseline", Cell(1, 1)), ("study", Cell(2, 1))):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name, study({cell: 10.0}, 3, 0.01, 1))
    words = ["report", str(tmp_path / "baseline"), str(tmp_path / "study"), "--fail-if-slower", "5%"]
    assert run_here(words) == 2
    assert "baseline and study have no cell in common" in capsys.readouterr().err
    write_table(tmp_path / "study", study({Cell(1, 1): 10.0}, 3, 0.01, 1))
    assert run_here([*words, "--junit", str(tmp_path / "none" / "j.xml")]) == 2
    assert "cannot be written" in capsys.readouterr().err
