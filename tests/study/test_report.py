"""The report: its figures are those of the table, it needs the table alone, and it shows hostile text as text."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from support import ROOT, run, run_here
from tables import row, study, windows_of

from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.record.rank_summary import over_ranks
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import write_table
from mnist_dist.study.report.report import write_report

GRID = {Cell(50, 1): 1000.0, Cell(200, 1): 4000.0, Cell(50, 2): 600.0, Cell(100, 2): 1200.0, Cell(200, 2): 6000.0}
HOSTILE = ("<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "../../../etc/passwd", "a|b`c``d", "x" * 200,
           "line\nbreak", "![p](http://x/y.png)", "$\\frac{1}{0}$")


class Elements(HTMLParser):
    """Counts elements and collects what they point to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


def cells_of(markdown, heading):
    """The table below a heading, as lists of cells."""
    lines = markdown.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(folder, report.md, report.html) of a made-up study of 8 repeats that spread by 1 %."""
    folder = tmp_path_factory.mktemp("study")
    rows = study(GRID, 8, 0.01, seed=1)
    rows.append({"run": "b9-p2-repeat-1", "role": "repeat", "global_batch_size": 9, "processes": 2, "options": {},
                 "status": "failed", "reason": "MemoryError: <b>", "order": 99})
    rows.append({"run": "b1-p2", "role": "none", "global_batch_size": 1, "processes": 2, "options": {},
                 "status": "impossible", "reason": "a batch of 1 is smaller"})
    write_table(folder, rows)
    assert run_here(["report", str(folder)]) == 0
    return folder, (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_the_figures_are_those_of_the_table(report):
    folder, markdown, _ = report
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rates = {}
    for one in rows[:-2]:
        epoch = one["epochs"][0]
        cell = (one["global_batch_size"], one["processes"])
        rates.setdefault(cell, []).append(epoch["measured_samples"] / epoch["measured_seconds"])
    table = cells_of(markdown, "Throughput")
    assert [(int(line[0]), int(line[1])) for line in table] == [(50, 1), (200, 1), (50, 2), (100, 2), (200, 2)]
    for line in table:
        ordered = sorted(rates[int(line[0]), int(line[1])])
        assert line[3] == f"{np.median(ordered):,.0f} ({ordered[0]:,.0f} to {ordered[-1]:,.0f})"
        assert line[5:] == ["8", "95 %", "-"]
    (first, second) = cells_of(markdown, "Strong scaling")
    assert first[0] == "50" and first[5].startswith("0.597")
    assert second[5].startswith("1.5") and second[6].startswith("0.7")
    (weak,) = cells_of(markdown, "Weak scaling")
    assert weak[0] == "100" and weak[4] == table[0][3] and weak[5].startswith("1.2") and weak[6].startswith("0.599")


def test_the_first_lines_say_it_in_words(report):
    head = report[1].split("\n## ")[0].split("\n\n")
    assert re.match(r"\*\*Use\*\* `batch 200 on 2 processes`: 6,0\d\d \(5,8\d\d to 6,\d+, 95 %\) samples/s, the "
                    r"highest throughput\. 4 other cells are slower\. 1 process takes 1\.\d+ to 1\.\d+ times as long "
                    r"\(batch 200, the best there\)\. More than 2 processes were not run\.$", head[1]), head[1]
    assert head[2].startswith("**How sure:** 1 run failed; 1 cell cannot run")
    assert head[3].endswith("(pictures/throughput.png)")
    assert "5 cells" in head[4] and "40 runs in all, 8 repeats of each cell, on `abacus`." in head[4]
    assert "Not measured: start-up" in head[4] and "any number of processes but 1, 2" in head[4]
    assert "2 processes against 1, the same global batch: faster at batch `200`; slower at batch `50`." in report[1]


def test_failed_runs_and_how_it_was_measured_are_in_it(report):
    for text in report[1:]:
        assert "b9-p2-repeat-1" in text and "a batch of 1 is smaller" in text
        assert "abacus" in text and "2026-11-25" in text and "seed " in text and "mnist-dist study" in text
    assert "The order is the column `order` of `runs.csv`" in report[1] and "b200-p1-repeat-1" not in report[1]
    assert "`MemoryError: <b>`" in report[1] and "<code>MemoryError: &lt;b&gt;</code>" in report[2]


def test_the_html_needs_no_other_file(report):
    page = Elements(report[2])
    assert "script" not in page.tags and page.tags.count("svg") == 5 and not page.handlers
    assert all(link.startswith(("#", "data:,")) for link in page.links), page.links
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", report[2])
    ids = re.findall(r'\bid="([^"]+)"', report[2])
    assert len(ids) == len(set(ids)), "each name once"
    for place in re.findall(r"(?:url\(#|href=\"#)([^\")]+)", report[2]):
        assert place in ids
    assert report[2].count("title>batch 200 on 2 processes: ") == 4, "of four pictures"
    assert "title>1 process: one run, " in report[2]
    for name in ("throughput", "efficiency-strong", "efficiency-weak", "step-time", "model"):
        assert (report[0] / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "samples/s" in (report[0] / "pictures" / "throughput.svg").read_text()
        assert f"(pictures/{name}.png)" in report[1]


def test_hostile_text_is_shown_as_text(tmp_path):
    folder = tmp_path / "inside" / "study"
    folder.mkdir(parents=True)
    rows = []
    for text in HOSTILE:
        for processes in (1, 2):
            rows += [row(Cell(50, processes, (("lr", text), (text, "1"))), 100.0, number) for number in range(3)]
        rows[-1]["environment"] = {"num_processes": processes, "device_name": text, "torch": text}
        rows[-2]["study"] = {"command": text, "date": text, "seed": text}
        rows[-3] |= {"run": text, "status": "failed", "reason": text}
    write_table(folder, rows)
    for words in ([folder], [folder, folder]):
        assert run_here(["report", *map(str, words)]) == 0
    assert {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()} == {
        ("inside", "study")}
    assert {path.parent for path in tmp_path.rglob("*.html")} == {folder}
    for stem in ("report", "compared-with-study"):
        page = Elements((folder / f"{stem}.html").read_text())
        assert not {"script", "img"} & set(page.tags) and not page.handlers
        code = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
        markdown = (folder / f"{stem}.md").read_text()
        outside = re.sub(r"\\.", "", code.sub("", markdown))
        assert "<script" not in outside and "<img" not in outside and "http://x" not in outside
        for text in HOSTILE:
            assert " ".join(text.split()).replace("|", "\\|") in markdown, "shown as it is"


def test_marked_runs_have_their_reasons(tmp_path):
    cell, noise = Cell(10, 2), 1 + 0.01 * np.random.default_rng(3).standard_normal(40)
    steady = windows_of(3 * noise)
    own = {"step_ms": 9.0, "data_wait_ms": 0.1, "peak_memory_bytes": 10**9}
    ranks = over_ranks([{**own, "own_ms": ms, "host": f"node{ms:.0f}"} for ms in (2.0, 2.1, 7.0)])
    rows = [
        row(cell, 100.0, 1, windows=steady),
        row(cell, 100.0, 2, windows=windows_of(np.where(np.arange(40) < 30, 3.0, 4.5) * noise)),
        row(cell, 100.0, 3, windows=windows_of(np.linspace(3, 4, 40) * noise)),
        row(cell, 100.0, 4, windows=windows_of(np.where(np.arange(40) < 8, 6.0, 3.0) * noise)),
        row(cell, 100.0, 5, windows=steady), row(cell, 100.0, 6),
    ]
    rows[4]["epochs"][0]["ranks"] = ranks
    rows[5]["epochs"][0] |= {"measured_samples": 0, "measured_seconds": 0.0}
    (tmp_path / "pictures").mkdir()
    write_report(tmp_path, rows)
    marked = dict(cells_of((tmp_path / "report.md").read_text(), "Failed and marked"))
    assert set(marked) == {f"`b10-p2-repeat-{n}`" for n in (2, 3, 4, 5, 6)}
    assert re.search(r"jumps by \+5\d % after 1\d\d measured steps", marked["`b10-p2-repeat-2`"])
    assert re.search(r"drifts by \+3\d % over the run", marked["`b10-p2-repeat-3`"])
    assert re.search(r"warm-up needed [34]\d steps more than were left out", marked["`b10-p2-repeat-4`"])
    assert "rank 2 on node7 is a straggler: 7.00 ms" in marked["`b10-p2-repeat-5`"]
    assert "no step was measured" in marked["`b10-p2-repeat-6`"]


@pytest.mark.parametrize("factor, words", [(90, "90 times faster"), (1 / 90, "90 times slower"), (2, "2 times faster")])
@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_a_run_that_is_far_off_is_named(factor, words, repeats, tmp_path):
    rows = study({Cell(10, 1): 1000.0, Cell(10, 2): 2000.0}, repeats - 1, 0.001, seed=1)
    rows.append(row(Cell(10, 1), factor * 1000.0, repeats))
    rows.append(row(Cell(10, 2), 2000.0, repeats))
    marks = Analysis(rows).marks
    assert [(one["run"], text) for one, text in marks] == [
        (f"b10-p1-repeat-{repeats}", f"the run is {words} than the median of its cell")]
    assert not Analysis(study({Cell(10, 1): 1000.0}, 10, 0.3, seed=2)).marks, "all are far off"


def test_single_runs_and_nothing_at_all(tmp_path):
    for number, rows in enumerate(([row(Cell(50, 1), 10.0, 1), row(Cell(50, 2), 30.0, 1)], [])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_report(folder, rows)
        markdown = (folder / "report.md").read_text()
        if rows:
            assert cells_of(markdown, "Throughput")[0] == ["50", "1", "50.0", "10.0", "5,000", "1", "-", "4"]
            assert cells_of(markdown, "Strong scaling")[0][5:] == ["3.00", "1.50", "-"]
            assert "not shown to differ at batch `50`" in markdown
        else:
            assert "Nothing was measured" in markdown


def test_two_studies_are_compared_cell_by_cell(tmp_path, capsys):
    slower = {**GRID, Cell(200, 1): 0.97 * 4000.0, Cell(7, 1): 1.0}
    for name, rates, seed in (("a", GRID, 5), ("b", slower, 6), ("same", GRID, 7)):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name, study(rates, 20, 0.015, seed))
    assert run_here(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "compared-with-a.md" in capsys.readouterr().out
    markdown = (tmp_path / "b" / "compared-with-a.md").read_text()
    lines = {tuple(line[:2]): line for line in [[c.strip() for c in text.strip("|").split("|")]
                                               for text in markdown.splitlines() if text.startswith("| ")][1:]}
    del lines["---", "---"]
    assert "5 cells are in both studies. Shown: 1 slower. 20 repeats of 5 cells can show a change of 1." in markdown
    assert len(lines) == 5
    assert lines["200", "1"][6].endswith("% slower") and lines["200", "1"][4].startswith("0.97")
    assert {line[6] for cell, line in lines.items() if cell != ("200", "1")} == {""}
    assert {line[7] for line in lines.values()} == {"too few windows"}
    assert "Only in `b`: `batch 7 on 1 process`" in markdown
    assert Elements((tmp_path / "b" / "compared-with-a.html").read_text()).tags.count("table") == 1
    assert run_here(["report", str(tmp_path / "a"), str(tmp_path / "same")]) == 0
    markdown = (tmp_path / "same" / "compared-with-a.md").read_text()
    words = r"5 cells can show a change of 1\.\d %\. No change of more than 1\.\d % is shown\."
    assert re.search(words, markdown)


def shown(folder, before, after):
    """(the first paragraph, of each cell the words on its throughput and its undisturbed rate) of a comparison."""
    for name, rows in (("before", before), ("after", after)):
        (folder / name).mkdir()
        write_table(folder / name, rows)
    assert run_here(["report", str(folder / "before"), str(folder / "after")]) == 0
    markdown = (folder / "after" / "compared-with-before.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()
             if line.startswith("| ")]
    return markdown.split("\n\n")[1], {(line[0], line[1]): (line[6], line[8]) for line in lines[2:]}


@pytest.mark.parametrize("repeats", [3, 5, 10])
@pytest.mark.parametrize("cells", [1, 8, 50])
def test_one_slow_cell_among_many_is_shown(cells, repeats, tmp_path):
    rates = {Cell(10 * (number + 1), 1): 1000.0 for number in range(cells)}
    first, words = shown(tmp_path, study(rates, repeats, 0.02, 3),
                         study({**rates, Cell(10, 1): 100.0}, repeats, 0.02, 4))
    assert "Shown: 1 slower. " in first and f"{repeats} repeats of {cells} cell" in first
    assert words.pop(("10", "1"))[0].startswith(("9", "8")) and set(words.values()) <= {("", "")}


def test_two_repeats_show_nothing(tmp_path):
    rates = {Cell(10, 1): 1000.0, Cell(20, 1): 2000.0}
    first, words = shown(tmp_path, study(rates, 2, 0.001, 1), study({**rates, Cell(10, 1): 100.0}, 2, 0.001, 2))
    assert "Nothing is shown: a cell needs 3 repeats or more in each study." in first
    assert set(words.values()) == {("", "")}


@pytest.mark.long
def test_a_report_of_many_rows_imports_no_torch(tmp_path):
    random = np.random.default_rng(4)
    cells = [Cell(size, processes, (("lr", f"{lr}"),)) for size in (1, 2) for processes in (1, 2) for lr in range(20)]
    rows = [row(cell, 1000 * np.exp(0.02 * random.standard_normal()), number,
                windows=windows_of(3 + 0.1 * random.standard_normal(20))) for cell in cells for number in range(3)]
    write_table(tmp_path, rows)
    code = ("import sys; from mnist_dist.cli import main; status = main(['report', sys.argv[1]]); "
            "print(status, sorted({'torch', 'accelerate', 'wandb'} & set(sys.modules)))")
    done = run([sys.executable, "-c", code, tmp_path], cwd=ROOT, **child_environment())
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert "The first 16 of 40 lines are drawn" in (tmp_path / "report.md").read_text()


BAD = {
    "no study": (["report", "none"], "none has no runs.jsonl: name the folder of a study"),
    "three": (["report", "a", "b", "c"], "report takes one study or two, got 3 folders"),
    "damaged": (["report", "damaged"], "line 2, is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "runs.jsonl").write_text(json.dumps(row(Cell(1, 1), 1.0, 1)) + "\n{\"run\": 1\n")
    assert run_here(words) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors


def test_without_scipy_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for words in (["report", str(tmp_path)], ["study", "--output-dir", str(tmp_path / "s")]):
        assert run_here(words) == 2
        assert "pip install -e '.[study]'" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_varied_step_is_no_other_environment():
    def rows(options):
        return [row(Cell(200, 1, ((name, value),) if name else ()), 1e4, 1,
                    environment={"num_processes": 1, "device_name": "abacus", "step": step})
                for name, value, step in options]

    varied = Analysis(rows([("compile", "on", "compiled"), ("compile", "off", "plain")]))
    assert len(varied.environments) == 1
    other = Analysis(rows([("", "", "compiled"), ("lr", "0.1", "plain")]))
    assert len(other.environments) == 2
