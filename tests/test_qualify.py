"""`launch/qualify.sh`: each part's outcome is kept, the page tells all, and the same command goes on."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from benchmarks import qualify
from benchmarks.qualify import Part
from benchmarks.rows import BY_NAME
from mnist_dist import runner
from mnist_dist.record.gains import Gain

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="bad"><failure message="assert 1 == 2 | `x`">more</failure></testcase>
<testcase classname="tests.a" name="away"><skipped message="needs CUDA GPUs: 2; on this machine: 1"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def some_parts(tmp_path, monkeypatch):
    """A part that passes and notes that it ran, one that fails until a file is there, and one that takes too long."""
    output, ran, mended = tmp_path / "out", tmp_path / "ran", tmp_path / "mended"

    def chosen(folder, data_dir, gpus, is_short):
        assert folder == output and data_dir == str(tmp_path / "data")
        return [
            Part("tests", "Tests", ["-c", f"open({str(ran)!r}, 'a').write('x'); print('so it is')"], 60),
            Part("benchmark", "Benchmark", ["-c", f"import os, sys; print('oh', file=sys.stderr); "
                                                  f"sys.exit(3 * (not os.path.exists({str(mended)!r})))"], 60),
            Part("study", "Scaling study", ["-c", "import time; time.sleep(60)"], 0.5),
        ]

    monkeypatch.setattr(qualify, "parts", chosen)
    for name in (runner.MARK, "MNIST_DIST_TEST_DATA"):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    return output, ran, mended


def test_outcomes_and_page(some_parts, tmp_path, capsys):
    output, ran, mended = some_parts
    output.mkdir()
    (output / "tests.xml").write_text(JUNIT)
    (output / "benchmark.md").write_text("# Of this machine\n\n## Speed\n\n![picture](b.png)\n\n| a |\n|---|\n| 1 |\n")
    words = [str(output), "--data-dir", str(tmp_path / "data")]
    assert qualify.main(words) == 1
    outcomes = [json.loads((output / "parts" / f"{name}.json").read_text()) for name in ("tests", "benchmark", "study")]
    assert [outcome["status"] for outcome in outcomes] == [
        "passed", "failed: exit status 3", "failed: took more than 0.5 s"]
    assert [(output / "parts" / name).read_text() for name in ("tests.txt", "benchmark.txt")] == ["so it is\n", "oh\n"]
    page = (output / "qualify.md").read_text()
    for line in ("**Failed: Benchmark, Scaling study.**", "- passed: 1", "| Tests | passed |", "\n### Speed\n",
                 "- **failed**: `tests.a::bad`: `assert 1 == 2 | 'x'`",
                 "- skipped: 1 (needs CUDA GPUs: 2; on this machine: 1)", "[benchmark.md](benchmark.md)"):
        assert line in page, page
    assert "![" not in page and "Of this machine" not in page
    mended.touch()
    assert qualify.main(words) == 1
    assert ran.read_text() == "x", "what has passed is not done again"
    assert json.loads((output / "parts" / "benchmark.json").read_text())["status"] == "passed"
    assert "Tests: has passed already" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "needle"), [
    (["--batch-size", "3"], "unrecognized arguments: --batch-size"), (["{file}"], "cannot be written"),
    (["{file}/below"], "cannot be written"),
])
def test_bad_input_is_one_line(words, needle, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert qualify.main([word.format(file=file) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qualify: error: ") and needle in line


@pytest.mark.parametrize("content", ["", "[]", "{}", "{\"status\": \"passed\"}"])
def test_a_damaged_outcome_is_done_again(content, some_parts, tmp_path):
    output, ran, _ = some_parts
    (output / "parts").mkdir(parents=True)
    (output / "parts" / "tests.json").write_text(content)
    qualify.main([str(output), "--data-dir", str(tmp_path / "data")])
    assert ran.read_text() == "x"


def test_the_parts_are_for_the_machine(tmp_path):
    on_cpu, on_two = ({part.name: [str(word) for word in part.words] for part in qualify.parts(tmp_path, "data", gpus)}
                      for gpus in (0, 2))
    assert "cuda and not long" in on_two["tests"] and "cuda and not long" not in on_cpu["tests"]
    assert on_two["study"][on_two["study"].index("--processes") + 1] == "1,2"
    assert on_cpu.keys() == on_two.keys() == {"tests", "benchmark", "reproduce", "study"}
    short = {part.name: part for part in qualify.parts(tmp_path, "data", 1, is_short=True)}
    assert short.keys() == {"tests", "benchmark"} and "--quick" not in short["benchmark"].words
    benchmarked = dict(pairwise(map(str, short["benchmark"].words)))
    assert set(benchmarked["--rows"].split(",")) <= set(BY_NAME) and benchmarked["--repeats"] == "3"


def row(compile, batch, seconds_per_step, compile_seconds=0.0, status="completed"):
    """A run of a study, of one measured step."""
    return {"run": "r", "role": "repeat", "status": status, "global_batch_size": batch, "processes": 1,
            "options": {"compile": compile} if compile else {}, "environment": {"torch": "2.11"},
            "summary": {"compile_seconds": compile_seconds},
            "epochs": [{"measured_samples": batch, "measured_seconds": seconds_per_step}]}


def test_the_least_that_compiling_saves_counts():
    rows = [row("off", 200, 4e-4), row("off", 200, 9e-4), row("off", 200, 5e-4), row("on", 200, 1e-4, 9.0),
            row("off", 4000, 3e-4), row("on", 4000, 2e-4, 12.0), row("off", 8000, 1e-4),
            row("", 200, 1.0), row("on", 200, 1.0, status="failed")]
    assert qualify.gain_from(rows) == Gain(12.0, pytest.approx(1e-4), "2.11")
    assert qualify.gain_from([row("off", 200, 1e-4)]) is None
    slower = qualify.gain_from([row("off", 200, 1e-4), row("on", 200, 2e-4, 5.0)])
    assert slower.saved_seconds_per_step < 0
