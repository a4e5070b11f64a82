"""What a report says of steps and samples to a target: medians, runs that did not get there, critical batch sizes."""

from __future__ import annotations

import pytest
from support import run_here
from tables import row

from mnist_dist.study.grid import Cell
from mnist_dist.study.table import write_table

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
    return (folder / "report.md").read_text().split("## What a larger batch buys in learning\n")[1].split("\n## ")[0]


def test_samples_and_steps_to_a_target(tmp_path):
    text = section(tmp_path, rows_of([Cell(batch, processes) for batch in BATCHES for processes in (1, 2)]))
    assert "### Test NLL 0.3" in text
    assert "| 200 | 6 of 6 | 173 (172 to 175) | 34,680 (34,340 to 35,020) | - |" in text, "processes are pooled"
    assert "the knee of this fixed learning rate (no critical batch size" in text
    assert "is 1,500 (1,5" not in text.split("knee")[0]


def test_runs_that_do_not_get_there_are_more_than_they_had(tmp_path):
    text = section(tmp_path, rows_of([Cell(batch, 1) for batch in BATCHES], limit=200_000))
    assert "| 12,800 | 0 of 3 | \\> 15 | \\> 192,000 |" in text
    rows = [{**one, "dataset": {"train": 190_000}} for one in rows_of([Cell(12_800, 1)], limit=200_000)]
    assert "| 12,800 | 0 of 3 | \\> 15 | \\> 190,000 |" in section(tmp_path, rows), "the last batch was smaller"
    assert "By the fit" in text, "four batch sizes are left"


def test_the_soonest_and_the_cheapest_are_named(tmp_path):
    """A step on two processes takes 0.7 times as long: sooner, but not cheaper. From 800 on more is not faster."""
    rows = rows_of([Cell(batch, processes) for batch in BATCHES for processes in (1, 2)], repeats=5)
    for one in rows:
        step = max(one["global_batch_size"], 400) / 1e5 * (0.7 if one["processes"] == 2 else 1.0)
        epoch = one["epochs"][0]
        epoch["measured_seconds"] = epoch["measured_samples"] / one["global_batch_size"] * step
    text = section(tmp_path, rows)
    head = (tmp_path / "report.md").read_text().split("\n## ")[0]
    # 800: 30,000 x (1 + 800 / 1500) x 1.03 / 800 = 59 steps of 8 ms, or of 5.6
    assert "Test NLL 0.3: soonest with `batch 800 on 2 processes`, 0.330 (" in head
    assert "s of training; 0 of 9 others are not shown to be slower." in head
    assert "Cheapest with `batch 800 on 1 process`, 0.472" in head
    assert "| 800 | 2 | 0.330 (" in text and "| 0.661 (" in text


def test_a_target_that_none_reached_has_no_answer(tmp_path):
    section(tmp_path, rows_of([Cell(batch, 1) for batch in BATCHES], limit=1000))
    assert "Test NLL 0.3: not known" in (tmp_path / "report.md").read_text().split("\n## ")[0]


def test_the_noise_scale_of_the_runs_is_beside_it(tmp_path):
    rows = rows_of([Cell(batch, 1) for batch in BATCHES])
    for one in rows:
        one["epochs"].append({**one["epochs"][0], "noise_scale": 1000.0 + one["repeat"]})
    rows[0]["epochs"][-1]["noise_scale"] = None
    text = section(tmp_path, rows)
    assert "| 1,002 (1,001 to 1,003) |" in text and "| 1,002 (1,002 to 1,003) |" in text


def test_the_best_rate_is_named_and_its_edge(tmp_path):
    cells = [Cell(batch, 1, (("lr", rate),)) for batch in BATCHES for rate in ("0.0001", "0.001", "0.01")]
    text = section(tmp_path, rows_of(cells))
    assert "the critical batch size is" in text and "knee" not in text
    assert "`50: 0.001, 200: 0.001, 800: 0.001, 3,200: 0.001, 12,800: 0.001`" in text
    text = section(tmp_path, rows_of([cell for cell in cells if dict(cell.options)["lr"] != "0.01"]))
    assert "50: 0.001 (at the edge)" in text


@pytest.mark.parametrize("rule", ["sqrt", "linear"])
def test_a_scaled_rate_has_a_critical_batch_size(rule, tmp_path):
    text = section(tmp_path, rows_of([Cell(batch, 1, (("lr_rule", rule),)) for batch in BATCHES]))
    assert f"the critical batch size for `lr rule {rule}` is" in text
    value = float(text.split(f"`lr rule {rule}` is ")[1].split()[0].replace(",", ""))
    assert value == pytest.approx(1500, rel=0.02)


def test_without_targets_it_says_how_to_measure(tmp_path):
    text = section(tmp_path, [row(Cell(50, 1), 10.0, 1)])
    assert text.strip().startswith("Not measured: the runs have no target. `--target-nll 0.3,0.2 --evaluate-every")
