"""The rate of a program that is not changed: formats of known programs, numbers, warm-up, and what is wrong."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import run_here

from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import Cell
from mnist_dist.study.plan.table import rate_of, read_table
from mnist_dist.study.run.printed_rate import (
    Printed,
    number_of,
    pattern_of,
    rates_in,
    read_unit,
    result_from,
    warmup_of,
)

CELL = Cell(64, 2)

# Lines as these programs print them (torchtitan in colours), with the pattern and the rates in them.
FORMATS = {
    "torchtitan": (
        "[rank0]:[titan] 2025-01-01 10:00:00,000 - root - INFO - \x1b[31mstep:  1  \x1b[32mloss: 12.2721  "
        "\x1b[33mmemory: 10.55GiB(11.11%)  \x1b[34mtps: 512  \x1b[36mtflops: 4.95  \x1b[35mmfu: 1.59%\x1b[39m\n"
        "[rank0]:[titan] 2025-01-01 10:00:09,000 - root - INFO - \x1b[31mstep: 10  \x1b[32mloss: 11.3  "
        "\x1b[33mmemory: 10.55GiB(11.11%)  \x1b[34mtps: 4,512  \x1b[36mtflops: 43.57  \x1b[35mmfu: 40.1%\x1b[39m\n",
        r"tps: ([0-9,.]+)", [512, 4512]),
    "nanochat": (
        "step 00010/21400 (0.05%) | loss: 9.2 | lrm: 1.00 | dt: 1037ms | tok/sec: 505,323 | mfu: 48.5 | total: 0.2m\n"
        "step 00011/21400 (0.05%) | loss: 9.1 | lrm: 1.00 | dt: 1038ms | tok/sec: 504,836 | mfu: 48.4 | total: 0.2m\n",
        r"tok/sec: ([\d,.]+)", [505323, 504836]),
    "timm": (
        "Train: 0 [  50/1251 (  4%)]  Loss: 6.93 (6.94)  Time: 0.35s,  730.1/s  (0.36s,  699.5/s)  LR: 1.0e-06\n"
        "Train: 0 [ 100/1251 (  8%)]  Loss: 6.92 (6.93)  Time: 0.36s, 1,711.1/s  (0.36s,  705.3/s)  LR: 1.0e-06\n",
        r"Time: [\d.]+s, +([\d,.]+)/s", [730.1, 1711.1]),
    "transformers": (
        "  0%|          | 0/120 [00:00<?, ?it/s]\r100%|##########| 120/120 [00:12<00:00, 10.0it/s]\n"
        "{'train_runtime': 12.5, 'train_samples_per_second': 400.2, 'train_steps_per_second': 10.0, 'epoch': 3.0}\n",
        r"'train_samples_per_second': ([\d.]+)", [400.2]),
    "a progress bar": ("step 1 10.5 im/s\rstep 2 11.5 im/s\r\nstep 3 12.5 im/s", r"^step \d ([\d.]+) im/s$",
                       [10.5, 11.5, 12.5]),
    "a title of a terminal": ("\x1b]0;training 99 t/s\x07 12k t/s", r"([\d.]+k?) t/s", [12_000]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_known_programs(name):
    text, pattern, rates = FORMATS[name]
    assert rates_in(text, pattern) == rates


@pytest.mark.parametrize("text, number", [
    ("4,512", 4512), ("505,323.5", 505323.5), ("1 234 567", 1234567), ("1_000", 1000), ("1'000.25", 1000.25),
    ("12.3k", 12300), ("1.5M", 1.5e6), ("2G", 2e9), ("1.2e4", 12000), (" 7 ", 7), ("7.", 7), ("0", 0),
])
def test_numbers(text, number):
    assert number_of(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", ".", ",", "4,51", "1,2,3", "1,234,56", "12 34", "-5", "nan", "inf", "1e999",
                                  "1.2.3", "٣", "5 apples", "1,23.4"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="is no number"):
        number_of(text)


@given(st.integers(0, 10**15), st.sampled_from((",", "_", "'", " ", "")))
def test_thousands_are_read_back(number, mark):
    assert number_of(f"{number:,}".replace(",", mark)) == number


def epoch_of(rates, **options):
    text = "\n".join(f"rate {rate:,}" for rate in rates)
    result = result_from(text, Printed(r"rate ([\d,.]+)", **options), CELL)
    (epoch,) = result["epochs"]
    return result, epoch


def test_a_result_has_the_mean_over_equal_work():
    rates = [100.0, 200.0, 100.0, 200.0]
    result, epoch = epoch_of(rates)
    assert epoch["windows"] == [[1, 64, 64 / rate] for rate in rates]
    assert epoch["measured_samples"] / epoch["measured_seconds"] == pytest.approx(4 / sum(1 / rate for rate in rates))
    assert result["environment"] == {"num_processes": 2} and result["summary"]["printed_rates"] == 4
    _, epoch = epoch_of(rates, at="end")
    assert epoch["windows"] == [[1, 64, 64 / 200]]
    for of, times in (("all", 1), ("process", 2)):
        result, _ = epoch_of([100.0], of=of, unit="tokens", units_per_sample=2048.0)
        assert rate_of({**result, "status": "completed"}) == pytest.approx(100 * times), "in tokens per second"


@pytest.mark.parametrize("slow, rest", [(1, 3), (1, 40), (2, 40), (3, 20), (8, 30), (20, 60)])
def test_the_warm_up_is_left_out(slow, rest):
    random = np.random.default_rng(slow)
    seconds = np.exp(0.02 * random.standard_normal(slow + rest)) * np.where(np.arange(slow + rest) < slow, 4, 1)
    assert warmup_of(list(seconds)) == slow
    result, _ = epoch_of(list(np.round(1e6 / seconds, 1)))
    assert result["summary"]["warmup_rates"] == slow


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_something_is_always_left(seconds):
    assert 0 <= warmup_of(seconds) < len(seconds)


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize("count", [1, 2, 5, 8, 50])
def test_a_steady_run_loses_no_window(spread, count):
    random = np.random.default_rng(3)
    assert warmup_of(list(np.exp(spread * random.standard_normal(count)))) == 0


def test_no_rate_is_one_line():
    for text, pattern, message in (("nothing", r"rate (\d+)", "matches no rate in what the run printed"),
                                   ("rate 0", r"rate (\d+)", "matches no rate"),
                                   ("rate 1,5", r"rate ([\d,]+)", "'1,5' is no number")):
        with pytest.raises(UserError, match=message):
            rates_in(text, pattern)


def test_units_and_patterns():
    assert read_unit("images") == ("images", 1.0) and read_unit("tokens=2048") == ("tokens", 2048.0)
    for text in ("", "1", "tokens=", "tokens=0", "tokens=-1", "to/kens", "x" * 31, "tokens=inf"):
        with pytest.raises(ValueError, match="a unit"):
            read_unit(text)
    for text in ("", "rate", "(a)(b)", "(", "(?:a)"):
        with pytest.raises(ValueError, match="one group around the number"):
            pattern_of(text)


TRAIN = """
import sys, time
batch, processes = int(sys.argv[1]), int(sys.argv[2])
for step in range(12):
    rate = 5 if step == 0 else 1_000 * batch + step % 3
    print(f"\\x1b[33mstep {step}\\x1b[0m | tok/sec: {rate:,}", file=sys.stderr if step % 2 else sys.stdout)
"""


def test_a_study_of_a_program_that_is_not_changed(tmp_path, capsys):
    program, folder = tmp_path / "train.py", tmp_path / "s"
    program.write_text(TRAIN)
    words = ["study", "--command", f"{sys.executable} {program} {{batch_size}} {{processes}}", "--rate-from",
             r"tok/sec: ([\d,]+)", "--rate-of", "process", "--unit", "tokens=128", "--batch-sizes", "4,8",
             "--processes", "1,2", "--repeats", "3", "--wandb", "disabled", "--output-dir", str(folder)]
    assert run_here(words) == 0
    assert "tokens/s" in capsys.readouterr().out
    rows = read_table(folder)
    assert {row["status"] for row in rows} == {"completed"} and len(rows) == 14
    for row in rows:
        assert rate_of(row) == pytest.approx(1_000 * row["global_batch_size"] * row["processes"], rel=1e-3)
        assert row["summary"]["printed_rates"] == 12 and row["environment"]["host"]
    report = (folder / "report.md").read_text()
    assert "tokens/s" in report and "samples/s" not in report
    step = 1000 * 8 * 128 / (1_000 * 8)
    assert f"| {step:.0f} " in report, "milliseconds of a step of 8 samples with 128 tokens each"
    words[words.index("tokens=128")] = "tokens=64"
    assert run_here(words) == 2 and "--rate-from" in capsys.readouterr().err
    assert run_here(["report", str(folder)]) == 0


@pytest.mark.parametrize("words, message", [
    (["--rate-from", "(x"], "--rate-from must be a regular expression with one group"),
    (["--rate-from", "x"], "--rate-from must be a regular expression with one group"),
    (["--rate-from", "(x)", "--unit", "9"], "--unit must be a unit, as images"),
    (["--rate-at", "end"], "--rate-at end is for --rate-from"), (["--unit", "tokens"], "--unit tokens is for"),
])
def test_bad_input_is_one_line(words, message, assert_refused):
    assert_refused(["--command", "sh -c 'echo {batch_size}'", *words], message)


def test_our_own_training_prints_no_rate(assert_refused):
    assert_refused(["--rate-from", "(x)"], "is for a --command or a --script")


def test_a_run_that_prints_no_rate_is_a_failed_row(tmp_path):
    folder = tmp_path / "s"
    words = ["study", "--command", "echo {batch_size}", "--rate-from", r"rate (\d+)", "--repeats", "1", "--wandb",
             "disabled", "--output-dir", str(folder)]
    assert run_here(words) == 1
    assert all("matches no rate in what the run printed: see output.txt" in row["reason"] for row in read_table(folder))
