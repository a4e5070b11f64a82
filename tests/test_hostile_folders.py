"""Folders of runs, studies and data that others have prepared: links, pipes and devices at every name that is written
or read, and files that never end. Nothing outside changes, and each command ends by itself: done, or with one line.
"""

from __future__ import annotations

import gzip
import os
import shutil
import struct
import sys
import time
import zipfile

import pytest
from disk.test_files import OBSTACLES, outside_of, place, snapshot
from support import ROOT, mnist_dist, mnist_dist_launched, result_of

from mnist_dist.data.idx import STEMS
from mnist_dist.record.run_folder import OF_A_RUN
from mnist_dist.study.plan.table import CSV, JSONL
from mnist_dist.study.run.folder import LOG, RUNS, STUDY

LINKS = [kind for kind in OBSTACLES if kind != "folder"]
OF_A_STUDY = (STUDY, LOG, RUNS, JSONL, CSV, "pictures", "report.md", "report.html", ".lock")
WORDS = ["--epochs", 1, "--max-steps", 8, "--batch-size", 50, "--wandb", "disabled", "--checkpoint-every", "4steps"]
STAND_IN = ROOT / "tests" / "helpers" / "stand_in.py"
SECONDS = 60.0  # a command that takes longer hangs


def check(done, begin, outside, before):
    """The command is done, or has ended with one line; nothing outside has changed."""
    seconds = time.monotonic() - begin
    assert seconds < SECONDS
    errors = done.stderr.strip().splitlines()
    if done.returncode:
        assert done.returncode in (1, 2) and sum(line.startswith("mnist-dist: error: ") for line in errors) == 1, errors
    assert all(line.startswith("mnist-dist: ") and len(line) <= 450 and line.isprintable() for line in errors), errors
    assert snapshot(outside) == before
    return seconds


@pytest.fixture
def outside(tmp_path):
    return outside_of(tmp_path)


@pytest.fixture(scope="module")
def run_before(small_dir, tmp_path_factory):
    """A run that can be continued."""
    folder = tmp_path_factory.mktemp("before")
    done = mnist_dist("train", "--data-dir", small_dir, *WORDS, "--output-dir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def cases(names):
    """Each name with one kind of obstacle, and each kind at some name, is `long`; the others take minutes."""
    for number, name in enumerate(names):
        for place_of, kind in enumerate(LINKS):
            is_one = place_of == number % len(LINKS)
            yield pytest.param(name, kind, marks=pytest.mark.long if is_one else pytest.mark.faults)


def of_kinds(kinds):
    """The first of these is `long`."""
    return [pytest.param(kind, marks=pytest.mark.faults if number else pytest.mark.long)
            for number, kind in enumerate(kinds)]


@pytest.mark.parametrize(("name", "kind"), list(cases([*OF_A_RUN, ".lock"])))
def test_a_run(name, kind, outside, run_before, small_dir, tmp_path):
    before = snapshot(outside)
    (tmp_path / "new").mkdir()
    shutil.copytree(run_before, tmp_path / "old")
    for folder, words in (("new", []), ("old", ["--resume", "--max-steps", 12])):
        path = tmp_path / folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        place(kind, path, outside)
        begin = time.monotonic()
        done = mnist_dist("train", "--data-dir", small_dir, *WORDS, *words, "--output-dir", folder, cwd=tmp_path)
        check(done, begin, outside, before)
        if not done.returncode:
            assert result_of(tmp_path / folder)["status"] == "completed"


@pytest.mark.parametrize("kind", of_kinds(LINKS))
def test_within_a_checkpoint(kind, outside, run_before, small_dir, tmp_path):
    """A damaged checkpoint is named, and the one before it is taken."""
    before = snapshot(outside)
    shutil.copytree(run_before, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for name in sorted(path.name for path in newest.iterdir()):
        (newest / name).unlink()
        place(kind, newest / name, outside)
    place(kind, newest.parent / ".step-000000009.1", outside)
    begin = time.monotonic()
    done = mnist_dist("train", "--data-dir", small_dir, *WORDS, "--resume", "--max-steps", 12, "--output-dir", "run",
                      cwd=tmp_path)
    check(done, begin, outside, before)
    assert done.returncode == 0 and "is damaged" in done.stderr
    assert not (newest.parent / ".step-000000009.1").is_symlink()


@pytest.mark.parametrize(("name", "kind"), list(cases(OF_A_STUDY)))
def test_a_study(name, kind, outside, tmp_path):
    before = snapshot(outside)
    words = ["study", "--script", STAND_IN, "--batch-sizes", "10", "--repeats", 1, "--wandb", "disabled",
             "--output-dir", "study"]
    assert mnist_dist(*words, cwd=tmp_path).returncode == 0
    path = tmp_path / "study" / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    place(kind, path, outside)
    for command in (["report", "study"], words):
        begin = time.monotonic()
        check(mnist_dist(*command, cwd=tmp_path), begin, outside, before)


@pytest.mark.parametrize("kind", of_kinds(LINKS))
def test_pictures(kind, outside, small_dir, tmp_path):
    """At each name that show and predict write, and in the place of a picture to look at."""
    before = snapshot(outside)
    (tmp_path / "look").mkdir()
    for name in ("digit.png", "digits.png", "picture.png"):
        place(kind, tmp_path / "look" / name, outside)
    begin = time.monotonic()
    check(mnist_dist("show", "--data-dir", small_dir, "--output-dir", "look", cwd=tmp_path), begin, outside, before)


def gz_that_goes_on(path, count):
    """A header that says `count` labels, these, and 10 GB of zeros; packed, 10 MB."""
    part = gzip.compress(bytes(100_000_000), 9)
    path.write_bytes(gzip.compress(struct.pack(">II", 0x801, count) + bytes(count)) + 100 * part)


BAD_DATA = {
    **{f"{kind} as {stem}": (lambda folder, kind=kind, stem=stem: (
        (folder / stem).unlink(), place(kind, folder / stem, folder / "none")))
       for kind in ("pipe", "device", "loop", "link to nothing") for stem in list(STEMS.values())[:1]},
    "a gz that goes on": lambda folder: ((folder / STEMS["test", "labels"]).unlink(),
                                         gz_that_goes_on(folder / f"{STEMS['test', 'labels']}.gz", 211)),
    "an npz of a pipe": lambda folder: (shutil.rmtree(folder), folder.mkdir(), os.mkfifo(folder / "mnist.npz")),
    "an npz that goes on": lambda folder: (shutil.rmtree(folder), folder.mkdir(), npz_that_goes_on(folder)),
}


def npz_that_goes_on(folder):
    with zipfile.ZipFile(folder / "mnist.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            with archive.open(f"{name}.npy", "w") as file:
                head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (60000, 28, 28), }"
                file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n")
                for _ in range(3 if name == "x_train" else 1):
                    file.write(bytes(100_000_000))


@pytest.mark.long
@pytest.mark.parametrize("kind", BAD_DATA)
def test_data(kind, small_dir, tmp_path):
    shutil.copytree(small_dir, tmp_path / "data")
    BAD_DATA[kind](tmp_path / "data")
    outside = outside_of(tmp_path)
    before = snapshot(outside)
    begin = time.monotonic()
    done = mnist_dist("train", "--data-dir", "data", *WORDS, "--output-dir", "run", "--mirror", "http://127.0.0.1:9/",
                      cwd=tmp_path)
    check(done, begin, outside, before)
    assert done.returncode == 2 and not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_pipe_in_the_place_of_each_file_that_is_read(run_before, tmp_path):
    """wandb's settings, a config, a picture, a model, a config of a run."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "wandb").mkdir()
    os.mkfifo(tmp_path / "wandb" / "settings")
    shutil.copytree(run_before, tmp_path / "run")
    for words in (["train", "--config", "pipe"], ["predict", "run", "pipe"], ["report", "."]):
        begin = time.monotonic()
        done = mnist_dist_launched(*words, cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        print(f"{words}: {time.monotonic() - begin:.1f} s", file=sys.stderr)
    for name in ("model.safetensors", "config.yaml"):
        (tmp_path / "run" / name).unlink()
        os.mkfifo(tmp_path / "run" / name)
        done = mnist_dist_launched("predict", "run", cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
