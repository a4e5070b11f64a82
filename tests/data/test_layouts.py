"""The layouts in which people keep MNIST; a data set is what it is called; what is named is what is used."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zipfile

import numpy as np
import pytest
from support import assert_one_line_error, mnist_dist, result_of, write_idx_folder
from torchvision import datasets

from mnist_dist.cli import parse
from mnist_dist.commands.shared import training_config
from mnist_dist.data import check_name, layouts, load, obtain
from mnist_dist.data.idx import STEMS
from mnist_dist.errors import UserError

NO_MIRROR = "http://127.0.0.1:9/"


def dotted(source, folder):
    for path in source.iterdir():
        shutil.copy(path, folder / path.name.replace("-idx", ".idx"))


def folder_per_file(source, folder):
    for path in source.iterdir():
        (folder / path.name).mkdir()
        shutil.copy(path, folder / path.name / path.name)


def dotted_below(source, folder):
    """As one well-known archive unpacks: both spellings at once, for some files."""
    for number, path in enumerate(sorted(source.iterdir())):
        name = path.name.replace("-idx", ".idx") if number % 2 else path.name
        (folder / name).mkdir()
        (folder / name / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))


def npz(source, folder):
    sets = load("mnist", str(source))
    train, test = sets.train, sets.test
    np.savez_compressed(folder / "mnist.npz", x_train=train.images[:, 0].numpy(), y_train=train.labels.numpy(),
                        x_test=test.images[:, 0].numpy(), y_test=test.labels.numpy().astype(np.uint8))


def below(name):
    return lambda source, folder: shutil.copytree(source, folder / name)


LAYOUTS = {"dotted": dotted, "folder per file": folder_per_file, "both": dotted_below, "npz": npz, "raw": below("raw"),
           "MNIST/raw": below("MNIST/raw")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_data(layout, small_dir, tmp_path):
    LAYOUTS[layout](small_dir, tmp_path)
    assert obtain("mnist", str(tmp_path), NO_MIRROR, pytest.fail) == "mnist"
    assert load("mnist", str(tmp_path)).digest() == load("mnist", str(small_dir)).digest()


IMAGES, LABELS = np.zeros((5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
GOOD = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}


@pytest.mark.parametrize(("changes", "message"), [
    ({"y_test": None}, "has no y_test"),
    ({"x_train": IMAGES.astype(np.float32)}, "x_train of float32 5 x 28 x 28"),
    ({"x_train": IMAGES[:, :27]}, "x_train of uint8 5 x 27 x 28"),
    ({"x_train": np.uint8(3)}, "x_train of uint8"),
    ({"y_test": LABELS.astype(np.int64) - 1}, "y_test from -1 to 3"),
    ({"y_test": LABELS[:4]}, "4 labels for the 5 images"),
    ({"y_train": LABELS + np.uint8(6)}, "label 10"),
    ({"x_test": IMAGES[:0], "y_test": LABELS[:0]}, "x_test of uint8 0 x 28 x 28"),
    ({"x_train": np.array([os.getcwd, None], dtype=object)}, "cannot be read"),
])
def test_a_wrong_npz_is_named(changes, message, tmp_path):
    arrays = {name: array for name, array in {**GOOD, **changes}.items() if array is not None}
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(UserError, match=r"mnist\.npz") as caught:
        load("mnist", str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_npz_is_named(tmp_path):
    np.savez_compressed(tmp_path / "mnist.npz", **GOOD)
    whole = (tmp_path / "mnist.npz").read_bytes()
    for content in (b"", whole[:-30], whole[:200], b"PK" + bytes(100)):
        (tmp_path / "mnist.npz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            load("mnist", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as archive:
        archive.writestr("x_train.npy", b"x")
        archive.infolist()[0].file_size = 2**40
    with pytest.raises(UserError, match=r"mnist\.npz"):
        load("mnist", str(tmp_path))


def test_the_original_is_known(mnist_dir):
    """Its digest does not depend on layout or packing."""
    assert load("mnist", str(mnist_dir)).digest() == layouts.DIGESTS["mnist"]


def test_the_archives_are_torchvisions():
    assert {f"{stem}.gz": md5 for stem, md5 in layouts.ARCHIVES["kmnist"].items()} == dict(datasets.KMNIST.resources)
    assert {*layouts.DIGESTS, *layouts.ARCHIVES} == {"mnist", "fashion-mnist", "kmnist"}


def test_a_set_is_known_by_its_archives(small_dir, tmp_path, monkeypatch):
    for path in small_dir.iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    sums = {stem: hashlib.md5((tmp_path / f"{stem}.gz").read_bytes()).hexdigest() for stem in STEMS.values()}
    monkeypatch.setitem(layouts.ARCHIVES, "kmnist", sums)
    digest = load("mnist", str(tmp_path)).digest()
    check_name("kmnist", str(tmp_path), digest, pytest.fail)
    with pytest.raises(UserError, match=r"are kmnist, not mnist: give --dataset kmnist"):
        check_name("mnist", str(tmp_path), digest, pytest.fail)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"other")
    check_name("kmnist", str(tmp_path), digest, pytest.fail)
    notes = []
    check_name("mnist", str(tmp_path), digest, notes.append)
    assert len(notes) == 1 and digest[:12] in notes[0]


@pytest.mark.parametrize(("command", "dataset"), [("train", "fashion-mnist"), ("show", "kmnist"),
                                                ("predict", "fashion-mnist")])
def test_mnist_under_another_name_is_refused(command, dataset, mnist_dir, tmp_path):
    words = {"train": ["--output-dir", "run"], "show": ["--output-dir", "show"], "predict": ["run"]}[command]
    if command == "predict":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(f"dataset: {dataset}\ndata_dir: {mnist_dir}\n")
        import torch
        from safetensors.torch import save

        from mnist_dist.training.model import MLP

        torch.manual_seed(0)
        (tmp_path / "run" / "model.safetensors").write_bytes(save(MLP().state_dict()))
        words = ["run"]
    else:
        words += ["--dataset", dataset, "--data-dir", mnist_dir]
    done = mnist_dist(command, *words, cwd=tmp_path)
    assert_one_line_error(done, f"are mnist, not {dataset}", "--dataset mnist")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_unknown_data_are_said_to_be_so(small_dir, tmp_path):
    words = ["train", "--data-dir", small_dir, "--max-steps", 1, "--wandb", "disabled", "--output-dir", "run"]
    done = mnist_dist(*words, "--processes", 2, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    digest = result_of(tmp_path / "run")["dataset"]["digest"]
    assert done.stdout.count("are not the original mnist") == 1 and digest[:12] in done.stdout


@pytest.mark.parametrize(("words", "there"), [
    (["--data-dir", "D"], "nothing"), (["--data-dir", "D"], "empty"), (["--data-dir", "D"], "pictures"),
    (["--dataset", "mnist"], "nothing"), (["--dataset", "mnist", "--data-dir", "D"], "pictures"),
])
def test_nothing_stands_in_for_what_is_named(words, there, mirror, no_other_mirror, tmp_path):
    """A download is tried, and if it fails, that is the error: what the folder holds, what is needed, why it failed."""
    mirror.fault = "404"
    folder = tmp_path / ("D" if "D" in words else "data")
    if there != "nothing":
        folder.mkdir()
    for number in range(9 if there == "pictures" else 0):
        (folder / f"{number}.png").write_bytes(b"a picture")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = mnist_dist("train", *words, "--mirror", mirror.url, "--output-dir", "run", cwd=tmp_path)
    holds = {"nothing": "does not exist", "empty": "is empty", "pictures": "0.png, 1.png, 2.png, 3.png and 5 more"}
    assert_one_line_error(done, f"--data-dir {folder.name} ", holds[there], "needed are", mirror.url, "404")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before and mirror.asked.total() == 1


def test_a_folder_that_is_named_is_downloaded_into(mirror, no_other_mirror, tmp_path):
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "notes.txt").write_text("mine")
    config = training_config(parse(["train", "--data-dir", str(tmp_path / "D")]))
    assert config.dataset == "mnist"
    assert obtain(config.dataset, config.data_dir, mirror.url, pytest.fail) == "mnist"
    assert load("mnist", config.data_dir).digest() == layouts.DIGESTS["mnist"]
    assert sorted(path.name for path in (tmp_path / "D").iterdir()) == ["MNIST", "notes.txt"]


def test_only_the_default_falls_back():
    for words, dataset in (([], "auto"), (["--data-dir", "data"], "mnist"), (["--dataset", "kmnist"], "kmnist"),
                           (["--dataset", "synthetic", "--data-dir", "d"], "synthetic")):
        assert training_config(parse(["train", *words])).dataset == dataset


def test_predict_uses_the_data_of_the_run(tmp_path):
    """From another working directory too; in that directory is another data set."""
    write_idx_folder(tmp_path / "here" / "D", 300, 41)
    done = mnist_dist("train", "--data-dir", "D", "--epochs", 1, "--wandb", "disabled", "--output-dir", "run",
                      cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr
    (tmp_path / "there").mkdir()
    run = tmp_path / "here" / "run"
    done = mnist_dist("predict", run, cwd=tmp_path / "there")
    assert done.returncode == 0 and not done.stderr and (run / "predict.png").exists(), done.stderr
    assert list((tmp_path / "there").iterdir()) == []
    shutil.move(tmp_path / "here" / "D", tmp_path / "elsewhere")
    gone = mnist_dist("predict", run, "--mirror", NO_MIRROR, cwd=tmp_path / "there")
    assert_one_line_error(gone, str(tmp_path / "here" / "D"), "does not exist")
    named = mnist_dist("predict", run, "--data-dir", tmp_path / "elsewhere", cwd=tmp_path / "there")
    assert named.returncode == 0 and list((tmp_path / "there").iterdir()) == []
