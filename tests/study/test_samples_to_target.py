"""What a report says of steps and samples to a target: medians, runs that did not get there, critical batch sizes."""

from __future__ import annotations

import re

import pytest
from support import run_here
from tables import row

from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import write_table

BATCHES = (50, 200, 800, 3200, 12_800)


def rows_of(cells, repeats=3, target=0.3, critical=1500, limit=600_000):
    """Each cell takes 30,000 (1 + B / critical) samples, repeats a few more; above the limit it does not get there."""
    rows = []
    for cell in cells:
        for number in range(1, repeats + 1):
            rate = dict(cell.options).get("lr", "0.001")
            samples = 30_000 * (1 + cell.global_batch_size / critical) * (1 + 0.01 * number)
            samples *= {"0.0001": 3, "0.001": 1, "0.01": 2}[rate]
            steps = round(samples / cell.global_batch_size)
            there = samples <= limit
            found = {"target_nll": target, "step": steps if there else None, "samples": samples if there else None,
                     "train_seconds": 1.0 if there else None, "test_nll": target if there else None}
            one = row(cell, 1000.0, number)
            one["summary"]["targets"] = [found]
            one["epochs"][0]["step"] = limit // cell.global_batch_size
            rows.append(one)
    return rows


def section(folder, rows):
    write_table(folder, rows)
    assert run_here(["report", str(folder)]) == 0
    return (folder / "report.md").read_text().split("## Batch size and learning\n")[1].split("\n## ")[0]


def test_samples_and_steps_to_a_target(tmp_path):
    text = section(tmp_path, rows_of([Cell(batch, processes) for batch in BATCHES for processes in (1, 2)]))
    assert "### Test NLL 0.3" in text
    assert "| 200 | 6 of 6 | 173 (172 to 175) | 34,680 (34,340 to 35,020) | 95 % | - |" in text, "processes are pooled"
    assert "The knee of this fixed learning rate (no critical batch size" in text
    assert "The runs do not say between which evaluations they reached it" in text


def test_runs_that_do_not_get_there_are_more_than_they_had(tmp_path):
    text = section(tmp_path, rows_of([Cell(batch, 1) for batch in BATCHES], limit=200_000))
    assert "| 12,800 | 0 of 3 | \\> 15 | \\> 192,000 |" in text
    rows = [{**one, "dataset": {"train": 190_000}} for one in rows_of([Cell(12_800, 1)], limit=200_000)]
    assert "| 12,800 | 0 of 3 | \\> 15 | \\> 190,000 |" in section(tmp_path, rows), "the last batch was smaller"
    assert "is > 3,200 samples" not in text and "is 1,5" in text, "four batch sizes are left"


def test_a_target_that_none_reached_has_no_answer(tmp_path):
    section(tmp_path, rows_of([Cell(batch, 1) for batch in BATCHES], limit=1000))
    assert "Test NLL 0.3 is not known: at no batch size" in (tmp_path / "report.md").read_text().split("\n## ")[0]


def test_batch_sizes_of_several_processes_alone_are_among_the_others(tmp_path):
    text = section(tmp_path, rows_of([Cell(200, 1), Cell(800, 1), Cell(100, 2), Cell(400, 2)]))
    lines = [line.split(" | ")[0] for line in text.splitlines() if "3 of 3" in line]
    assert lines == ["| 100", "| 200", "| 400", "| 800"]


def test_runs_of_one_seed_count_once(tmp_path):
    rows = rows_of([Cell(200, processes) for processes in (1, 2, 4)])
    rows = [{**one, "config": {"seed": one["repeat"]}} for one in rows]
    assert "| 200 | 3 of 3 |" in section(tmp_path, rows)


def test_the_noise_scale_up_to_the_target_is_compared_with_the_fit(tmp_path):
    """Two epochs of 100 steps, and a third after the target; the target is reached within the second."""
    rows = rows_of([Cell(batch, 1, (("lr_rule", "sqrt"),)) for batch in BATCHES], repeats=4)
    for one in rows:
        step, scale = one["summary"]["targets"][0]["step"], 1000.0 + one["repeat"]
        ends = (round(step / 2), 2 * round(step / 2) + 1, 10 * step)
        one["epochs"] = [{**one["epochs"][0], "step": end, "noise_scale": own}
                         for end, own in zip(ends, (scale / 2, 3 * scale / 2, 9e9), strict=True)]
    rows[0]["epochs"][0]["noise_scale"] = None
    text = section(tmp_path, rows)
    values = [line.split(" | ")[-1].split()[0] for line in text.splitlines() if line.startswith("| 12,800 | ")]
    assert 1000 < float(values[0].replace(",", "")) < 1200, "the mean of both epochs"
    assert "| 1,0" in next(line for line in text.splitlines() if line.startswith("| 50 ")), "three runs know it"
    assert "The noise scale is 1," in text and re.search(r"0\.[67]\d+ \(0\.\d+ to 0\.\d+\) times the critical", text)
    assert "(90 % interval), which differs from it" in text
    assert (tmp_path / "pictures/critical.png").exists() and (tmp_path / "pictures/samples.svg").exists()
    html = (tmp_path / "report.html").read_text()
    assert all(f"NLL 0.3, {way}, lr rule sqrt: " in html for way in (
        "noise scale", "2 times the least samples", "1.2 times the least samples"))


def test_a_knee_is_not_compared_with_the_noise_scale(tmp_path):
    rows = rows_of([Cell(batch, 1) for batch in BATCHES])
    for one in rows:
        one["epochs"][0]["noise_scale"] = 1000.0
    text = section(tmp_path, rows)
    assert "The knee of this fixed learning rate" in text and "noise scale is" not in text
    assert (tmp_path / "pictures/samples.png").exists() and not (tmp_path / "pictures/critical.png").exists()


def test_the_best_rate_is_named_and_its_edge(tmp_path):
    cells = [Cell(batch, 1, (("lr", rate),)) for batch in BATCHES for rate in ("0.0001", "0.001", "0.01")]
    text = section(tmp_path, rows_of(cells))
    assert "The critical batch size is" in text and "knee" not in text
    assert "`50: 0.001, 200: 0.001, 800: 0.001, 3,200: 0.001, 12,800: 0.001`" in text
    text = section(tmp_path, rows_of([cell for cell in cells if dict(cell.options)["lr"] != "0.01"]))
    assert "50: 0.001 (at the edge)" in text


@pytest.mark.parametrize("rule", ["sqrt", "linear"])
def test_a_scaled_rate_has_a_critical_batch_size(rule, tmp_path):
    text = section(tmp_path, rows_of([Cell(batch, 1, (("lr_rule", rule),)) for batch in BATCHES]))
    value = float(text.split(f"The critical batch size for `lr rule {rule}` is ")[1].split()[0].replace(",", ""))
    assert value == pytest.approx(1500, rel=0.02)


def test_without_targets_it_says_how_to_measure(tmp_path):
    text = section(tmp_path, [row(Cell(50, 1), 10.0, 1)])
    assert text.strip().startswith("Not measured: the runs have no target. `--target-nll 0.3,0.2 --evaluate-every")
