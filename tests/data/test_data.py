"""Images from disk and from mirrors: whole and right, or one line that names the file or the mirror."""

from __future__ import annotations

import gzip
import struct
import threading
import time
import tracemalloc
from urllib.parse import quote

import numpy as np
import pytest
import torch
from data_mirror import SECRET, serve
from support import assert_one_line_error, idx_bytes, mnist_dist, mnist_dist_launched, result_of, write_idx_folder
from torchvision import datasets, transforms

from mnist_dist import data
from mnist_dist.data import Images, load, obtain, scale
from mnist_dist.data.idx import read_idx
from mnist_dist.errors import UserError

NAMES = list(data.STEMS.values())
MNIST = "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b"  # the digest
ROW_7 = [-1] * 8 + [-0.7647, -0.7176, -0.2627, 0.2078, 0.3333] + [0.9843] * 5 + [
    0.7647, 0.3490, 0.9843, 0.8980, 0.5294, -0.4980] + [-1] * 4


def never(line):
    raise AssertionError(line)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_both_layouts_zipped_or_not(zipped, below, tmp_path):
    write_idx_folder(tmp_path / below, 103, 17, zipped=zipped)
    assert obtain("auto", str(tmp_path), None, never) == "mnist"
    sets = load("mnist", str(tmp_path))
    assert sets.summary == {"name": "mnist", "train": 103, "test": 17}
    assert sets.train.images.shape == (103, 1, 28, 28) and sets.train.images.dtype == torch.uint8
    images, labels = sets.train.__getitems__([5, 0, 102])
    assert torch.equal(images, sets.train.images[[5, 0, 102]]) and torch.equal(labels, sets.train.labels[[5, 0, 102]])


def test_mnist_is_mnist(mnist_dir):
    sets = load("mnist", str(mnist_dir))
    assert sets.summary == {"name": "mnist", "train": 60_000, "test": 10_000}
    assert scale(sets.train.images[:1])[0, 0, 6].tolist() == pytest.approx(ROW_7, abs=5e-5)
    assert sets.train.labels[0] == 5


def test_images_that_do_not_fit_are_refused(monkeypatch):
    """Half of a GPU's free memory is for them; the line has both sizes."""
    images = Images(torch.zeros(100, 1, 28, 28, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.images.nbytes - 1, 1 << 40))
    with pytest.raises(UserError, match=r"100 images take 0 MiB, and the GPU has 0 MiB free"):
        images.to(torch.device("cuda"))


def test_scale_is_torchvisions_transform():
    image = torch.arange(784, dtype=torch.int32).remainder(256).to(torch.uint8).reshape(28, 28)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    expected = transform(image.numpy()[:, :, None])
    assert torch.allclose(scale(image[None, None])[0], expected, rtol=0, atol=1e-6)
    assert scale(image[None, None], torch.float64).dtype == torch.float64


IMAGES, LABELS = np.zeros((5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
DAMAGE = {
    "truncated": (0, idx_bytes(IMAGES)[:-3], "truncated"),
    "longer": (0, idx_bytes(IMAGES) + b"x", "damaged"),
    "no header": (1, b"\x00\x00", "needs a header"),
    "wrong magic": (0, b"\x00\x00\x08\x01" + idx_bytes(IMAGES)[4:], "begins with 0x00000801"),
    "wrong size": (0, idx_bytes(np.zeros((5, 27, 28), np.uint8)), "5 x 27 x 28"),
    "empty": (0, idx_bytes(IMAGES[:0]), "0 x 28 x 28"),
    "wrong count": (1, idx_bytes(np.arange(4, dtype=np.uint8).repeat(4)), "16 labels for the 5 images"),
    "label out of range": (1, idx_bytes(np.array([0, 1, 10, 3] * 4, np.uint8)), "label 10 at position 2"),
    "damaged archive": (0, None, "cannot be read"),
    "missing": (1, None, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_damage_is_named_and_auto_does_not_fall_back(kind, dataset, tmp_path):
    which, content, message = DAMAGE[kind]
    num_labels = 16 if kind == "label out of range" else 5
    arrays = np.zeros((num_labels, 28, 28), np.uint8), np.zeros(num_labels, np.uint8)
    for name, array in zip(NAMES, arrays * 2, strict=True):
        (tmp_path / name).write_bytes(idx_bytes(array))
    damaged = tmp_path / NAMES[which]
    if content is not None:
        damaged.write_bytes(content)
    else:
        damaged.unlink()
        if kind == "damaged archive":
            (tmp_path / f"{NAMES[which]}.gz").write_bytes(gzip.compress(idx_bytes(IMAGES))[:-5])
    with pytest.raises(UserError, match=NAMES[which]) as caught:
        load(obtain(dataset, str(tmp_path), None, never), str(tmp_path))
    assert message in str(caught.value) and "put " in str(caught.value)


@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_a_header_that_asks_for_more_than_the_file_holds_takes_no_memory(name, tmp_path):
    content = struct.pack(">4I", 0x803, 10_000_000, 28, 28) + bytes(784)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"has 800 bytes and says 7840000016 in its header"):
        read_idx(tmp_path / name, "images")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_read_idx_gives_what_was_written(tmp_path):
    labels = np.arange(50, dtype=np.uint8) % 10
    (tmp_path / "labels").write_bytes(idx_bytes(labels))
    assert np.array_equal(read_idx(tmp_path / "labels", "labels"), labels)


def test_a_download_is_torchvisions_layout(mirror, no_other_mirror, tmp_path):
    assert obtain("mnist", str(tmp_path), mirror.url, never) == "mnist"
    assert mirror.asked == {f"{name}.gz": 1 for name in NAMES}
    assert len(datasets.MNIST(tmp_path, download=False)) == 60_000
    assert load("mnist", str(tmp_path)).summary["test"] == 10_000
    obtain("mnist", str(tmp_path), mirror.url, never)
    assert mirror.asked.total() == 4, "what is there is not fetched again"


def test_torchvisions_own_mirrors_are_tried_after_ours(mirror, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror.url])
    assert obtain("mnist", str(tmp_path), "http://127.0.0.1:9", never) == "mnist"
    assert mirror.asked == {f"{name}.gz": 1 for name in NAMES}


@pytest.mark.parametrize("fault", ["other content", "404", *(
    pytest.param(fault, marks=pytest.mark.long)
    for fault in ("truncated", "closes", "drips", "hangs", "drips a head", "no end"))])
def test_a_bad_mirror_leaves_nothing(fault, mirror, no_other_mirror, monkeypatch, tmp_path):
    monkeypatch.setattr("mnist_dist.data.download.STALL_SECONDS", 0.5)
    monkeypatch.setattr("mnist_dist.data.download.POLL_SECONDS", 0.1)
    mirror.fault = fault
    with pytest.raises(UserError, match=mirror.url) as caught:
        obtain("mnist", str(tmp_path), mirror.url, never)
    assert "train-images" in str(caught.value) and "--data-dir" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"does not exist, and train-images.* could not be downloaded .*; needed are"):
        obtain("mnist", str(tmp_path / "new" / "data"), mirror.url, never)
    assert list(tmp_path.iterdir()) == [], "the folder is made once all files are there"
    warnings = []
    assert obtain("auto", str(tmp_path), mirror.url, warnings.append) == "synthetic"
    assert len(warnings) == 1 and "NOT MNIST" in warnings[0]
    mirror.fault = None
    assert obtain("mnist", str(tmp_path / "new" / "data"), mirror.url, never) == "mnist"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "new" / "data").iterdir()] == ["MNIST"]


def test_a_password_goes_to_its_host_alone(mirror, mnist_dir, no_other_mirror, tmp_path):
    other = serve(mnist_dir)
    elsewhere = next(other)
    mirror.fault = elsewhere.url
    assert obtain("mnist", str(tmp_path), mirror.url.replace("://", "://someone:secret@"), never) == "mnist"
    assert set(mirror.passwords) == {"Basic c29tZW9uZTpzZWNyZXQ="} and set(elsewhere.passwords) == {None}
    next(other, None)


def test_threads_at_the_same_time_fetch_once(mirror, no_other_mirror, tmp_path):
    threads = [threading.Thread(target=obtain, args=("mnist", str(tmp_path), mirror.url, never)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mirror.asked == {f"{name}.gz": 1 for name in NAMES}
    assert load("mnist", str(tmp_path)).summary["train"] == 60_000


def test_other_files_in_the_way_are_kept(mirror, no_other_mirror, tmp_path):
    precious = tmp_path / "MNIST" / "raw" / "thesis.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("years of work")
    with pytest.raises(UserError, match="cannot be stored"):
        obtain("mnist", str(tmp_path), mirror.url, never)
    assert precious.read_text() == "years of work"


# W&B records the words of a process's command line
@pytest.mark.parametrize("command", [pytest.param(mnist_dist, marks=pytest.mark.long),
                                     pytest.param(mnist_dist_launched, marks=pytest.mark.faults)])
def test_two_processes_on_an_empty_folder(command, mirror, tmp_path):
    """The mirror wants a password, which is written nowhere."""
    mirror.fault = "password"
    with_password = mirror.url.replace("://", f"://someone:{quote(SECRET, safe='')}@")
    words = ["train", "--processes", 2, "--dataset", "mnist", "--mirror", with_password, "--max-steps", 2,
             "--wandb", "offline", "--output-dir", "run"]
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert mirror.asked == {f"{name}.gz": 1 for name in NAMES}
    assert result_of(tmp_path / "run")["config"]["mirror"] == mirror.url
    (tmp_path / "elsewhere").mkdir()
    mirror.fault = "404"
    refused = mnist_dist(*words, cwd=tmp_path / "elsewhere")
    assert_one_line_error(refused, mirror.url, "404")
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    for content in (*written, *(text.encode() for run in (done, refused) for text in (run.stdout, run.stderr))):
        assert b"someone" not in content and b"s3cr" not in content
    assert result_of(tmp_path / "run")["dataset"] == {
        "name": "mnist", "train": 60_000, "test": 10_000, "digest": MNIST}


@pytest.mark.long
def test_a_failing_mirror_on_the_command_line(mirror, tmp_path):
    mirror.fault = "404"
    begin = time.monotonic()
    done = mnist_dist("train", "--dataset", "mnist", "--output-dir", "run", cwd=tmp_path, MNIST_DIST_MIRROR=mirror.url)
    print(f"{time.monotonic() - begin:.1f} s")
    assert_one_line_error(done, mirror.url, "404")
    assert not (tmp_path / "run").exists()
    done = mnist_dist("train", "--max-steps", 2, "--wandb", "disabled", "--output-dir", "run", "--processes", 2,
                      cwd=tmp_path, MNIST_DIST_MIRROR=mirror.url)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NOT MNIST") == 1
    dataset = result_of(tmp_path / "run")["dataset"]
    assert (dataset["name"], dataset["train"], dataset["test"]) == ("synthetic", 60_000, 10_000)


def test_images_are_a_dataset():
    images = Images(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.tensor([4, 5, 6]))
    assert len(images) == 3 and images[1][1] == 5
