"""What compiling saves on a GPU: kept in the user's cache, and when it pays."""

from __future__ import annotations

import pytest

from mnist_dist.record.gains import Gain, gains_file, keep_gain, read_gain


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_it_is_kept_for_each_kind_of_gpu(cache):
    first, second = Gain(12.0, 1e-4, "2.11"), Gain(5.0, 2e-4, "2.11")
    assert read_gain("A") is None
    keep_gain("A", first)
    assert keep_gain("B", second) == cache / "mnist_dist" / "gpus.json" == gains_file()
    assert (read_gain("A"), read_gain("B"), read_gain("C")) == (first, second, None)


def test_it_pays_if_the_steps_save_more_than_compiling_takes():
    gain = Gain(12.0, 1e-4, "2.11")
    assert gain.pays(130_000) and not gain.pays(110_000)
    assert not Gain(5.0, -1e-4, "2.11").pays(10**12)


@pytest.mark.parametrize("content", ["", "[]", "{\"A\": 3}", "{\"A\": {\"torch\": \"2\"}}"])
def test_a_damaged_file_is_as_none_and_is_replaced(content):
    gains_file().parent.mkdir()
    gains_file().write_text(content)
    assert read_gain("A") is None
    keep_gain("A", Gain(1.0, 1e-3, "2"))
    assert read_gain("A") == Gain(1.0, 1e-3, "2")
