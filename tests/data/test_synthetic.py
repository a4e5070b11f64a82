"""The embedded digits: the same bits everywhere, cached whole or not at all, and digits that can be told apart."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from mnist_dist.data import synthetic
from mnist_dist.data.synthetic import DEFAULT_SHA256, digest, load_digits, make_digits


@pytest.mark.parametrize("threads", [1, 3])
def test_the_whole_set_has_its_pinned_bits(threads):
    digits = make_digits(threads=threads)
    assert digest(digits) == DEFAULT_SHA256
    assert digits.train_images.shape == (60_000, 28, 28) and digits.test_images.shape == (10_000, 28, 28)
    for images, labels in (digits[:2], digits[2:]):
        assert images.dtype == labels.dtype == np.uint8
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.09 and shares.max() < 0.11
        ink = images.reshape(len(images), -1).mean(axis=1) / 255
        assert ink.min() > 0.01, "no image is empty"
        assert 0.08 < ink.mean() < 0.2, "about MNIST's 0.13"


def test_fewer_are_the_first_of_more_and_seeds_differ():
    few, more = make_digits(700, 30), make_digits(1300, 501)
    assert np.array_equal(few.train_images, more.train_images[:700])
    assert np.array_equal(few.test_labels, more.test_labels[:30])
    assert not np.array_equal(few.train_images, make_digits(700, 30, seed=1).train_images)
    assert not np.array_equal(more.train_images[:500], more.test_images[:500])


def test_classes_differ():
    digits = make_digits(4000, 1000)
    train, test = (images.reshape(-1, 784).astype(float) for images in (digits.train_images, digits.test_images))
    means = np.stack([train[digits.train_labels == digit].mean(axis=0) for digit in range(10)])
    nearest = ((test[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    accuracy = (nearest == digits.test_labels).mean()
    assert 0.6 < accuracy < 0.95, "as with MNIST's 0.82: not chance, and not so plain that nothing is to be learnt"


def test_the_cache_is_read_back(tmp_path, monkeypatch):
    made = load_digits(tmp_path, 600, 100)
    monkeypatch.setattr(synthetic, "make_digits", lambda *_: pytest.fail("made again"))
    assert digest(load_digits(tmp_path, 600, 100)) == digest(made)
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "empty"])
def test_a_damaged_cache_is_made_again(damage, tmp_path):
    made = load_digits(tmp_path, 600, 100)
    (cache,) = tmp_path.glob("*.bin")
    content = cache.read_bytes()
    flipped = bytearray(content)
    flipped[1000] ^= 1
    cache.write_bytes({"cut": content[:-1], "longer": content + b"x", "flipped": bytes(flipped), "empty": b""}[damage])
    assert digest(load_digits(tmp_path, 600, 100)) == digest(made)
    assert cache.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert digest(load_digits(tmp_path / "file" / "below", 600, 100)) == digest(make_digits(600, 100))


def load_and_digest(folder: str) -> str:
    return digest(load_digits(Path(folder), 600, 100))


@pytest.mark.long
def test_processes_at_the_same_time(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert set(pool.map(load_and_digest, [str(tmp_path)] * 3)) == {digest(make_digits(600, 100))}
    assert len(list(tmp_path.glob("*.bin"))) == 1
