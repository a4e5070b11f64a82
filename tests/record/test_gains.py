"""What compiling saves on a GPU: from a study's rows, kept in the user's cache, and when it pays."""

from __future__ import annotations

import pytest

from mnist_dist.record.gains import Gain, gain_from, gains_file, keep_gain, read_gain


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def row(step, batch, seconds_per_step, compile_seconds=0.0, status="completed"):
    return {"status": status, "global_batch_size": batch, "processes": 1,
            "environment": {"step": step, "torch": "2.11"},
            "summary": {"samples_per_second": batch / seconds_per_step, "compile_seconds": compile_seconds}}


def test_the_least_that_is_saved_counts():
    rows = [row("plain", 200, 4e-4), row("plain", 200, 9e-4), row("plain", 200, 5e-4), row("compiled", 200, 1e-4, 9.0),
            row("plain", 4000, 3e-4), row("compiled", 4000, 2e-4, 12.0), row("plain", 8000, 1e-4),
            row("sharded", 200, 1.0), row("compiled", 200, 1.0, status="failed")]
    gain = gain_from(rows)
    assert gain == Gain(12.0, pytest.approx(1e-4), "2.11")
    assert gain.pays(130_000) and not gain.pays(110_000)
    assert gain_from([row("plain", 200, 1e-4)]) is None
    slower = gain_from([row("plain", 200, 1e-4), row("compiled", 200, 2e-4, 5.0)])
    assert not slower.pays(10**12)


def test_it_is_kept_for_each_kind_of_gpu(cache):
    first, second = Gain(12.0, 1e-4, "2.11"), Gain(5.0, 2e-4, "2.11")
    assert read_gain("A") is None
    keep_gain("A", first)
    assert keep_gain("B", second) == cache / "mnist_dist" / "gpus.json" == gains_file()
    assert (read_gain("A"), read_gain("B"), read_gain("C")) == (first, second, None)


@pytest.mark.parametrize("content", ["", "[]", "{\"A\": 3}", "{\"A\": {\"torch\": \"2\"}}"])
def test_a_damaged_file_is_as_none_and_is_replaced(content):
    gains_file().parent.mkdir()
    gains_file().write_text(content)
    assert read_gain("A") is None
    keep_gain("A", Gain(1.0, 1e-3, "2"))
    assert read_gain("A") == Gain(1.0, 1e-3, "2")
