"""Checkpoints: whole or not there, named when damaged; a run that continues is the run it would have been."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat

import pytest
import torch
from safetensors.torch import load_file
from support import assert_one_line_error, mnist_dist, result_of

from mnist_dist.disk.files import remove_tree
from mnist_dist.errors import MnistDistError
from mnist_dist.record import checkpoint
from mnist_dist.record.checkpoint import CheckpointWriter, load_newest

TENSORS = {"model.weight": torch.arange(12.0).reshape(3, 4), "losses": torch.rand(5, dtype=torch.float64)}


def save(root, step, state, keep=2, tensors=TENSORS):
    """Write one checkpoint, and wait for it."""
    with CheckpointWriter(root, keep) as writer:
        writer.write(step, tensors, state)


def warn_not(line):
    raise AssertionError(line)


def test_what_is_saved_is_loaded(tmp_path):
    state = {"epoch": 3, "records": [{"test_nll": 0.1234567890123456789}]}
    save(tmp_path / "checkpoints", 42, state)
    folder = tmp_path / "checkpoints" / "step-000000042"
    kept = load_newest(tmp_path / "checkpoints", warn_not)
    assert kept.folder == folder and kept.state == state
    assert all(torch.equal(kept.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert stat.S_IMODE((folder / "tensors.safetensors").stat().st_mode) == 0o666 & ~umask()


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_the_newest_are_kept(tmp_path):
    for step in (5, 20, 100):
        save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000100"]
    assert load_newest(tmp_path, warn_not).state == {"step": 100}


def test_a_later_one_does_not_count(tmp_path):
    """It is damaged, and the run has continued from the one before: what it writes then is not dropped."""
    for step in (5, 9):
        save(tmp_path, step, {"step": step})
    (tmp_path / "step-000000009" / "state.json").unlink()
    (tmp_path / "step-foreign").mkdir()
    save(tmp_path, 6, {"step": 6}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000006", "step-000000009", "step-foreign"]
    warnings = []
    assert load_newest(tmp_path, warnings.append).state == {"step": 6}
    assert len(warnings) == 1 and "step-000000009" in warnings[0]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".step-000000003.1234").mkdir()
    (tmp_path / ".step-000000003.1234" / "tensors.safetensors").write_bytes(b"half")
    save(tmp_path, 5, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005"]


def test_none_where_there_is_none(tmp_path):
    assert load_newest(tmp_path / "missing", warn_not) is None


NAMES = ("tensors.safetensors", "state.json", "manifest.json")


def cut(folder, chance):
    path = folder / chance.choice(NAMES)
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip(folder, chance):
    """One bit, which a file of tensors or numbers does not show."""
    path = folder / chance.choice(NAMES)
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    content[place] ^= 1 << chance.randrange(8)
    if json_or_none(content) == json_or_none(path.read_bytes()) is not None:
        content[-1] = 0  # another spelling of the same manifest is no damage
    path.write_bytes(content)


def json_or_none(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def lengthen(folder, chance):
    with open(folder / chance.choice(NAMES), "ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 100)) + b"x")


def remove(folder, chance):
    (folder / chance.choice(NAMES)).unlink()


def from_the_one_before(folder, chance):
    """A file of another checkpoint."""
    name = chance.choice(NAMES)
    (folder / name).write_bytes((folder.parent / "step-000000001" / name).read_bytes())


def all_from_the_one_before(folder, chance):
    for name in NAMES:
        (folder / name).write_bytes((folder.parent / "step-000000001" / name).read_bytes())


def exchange(folder, chance):
    """Two files under each other's names."""
    one, other = (folder / name for name in chance.sample(NAMES, 2))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def manifest_of_other_paths(folder, chance):
    outside = folder.parent / "outside"
    outside.write_bytes(b"not ours")
    digest = hashlib.sha256(b"not ours").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(
        {"step": 2, chance.choice(["../outside", str(outside)]): digest, "state.json": digest}))


def foreign_manifest(folder, chance):
    (folder / "manifest.json").write_text(chance.choice(
        ["[]", "0", "null", '"state.json"', "{}", "[" * 100_000, '{"step": 2}', '{"step": "2"}', "\x00", "NaN"]))


def foreign_content(folder, chance):
    """With the right checksum: nothing but its content is wrong."""
    name = chance.choice(NAMES[:2])
    content = chance.choice([b"", b"[]", b"7", b"[" * 100_000, chance.randbytes(1000), (2**62).to_bytes(8, "little"),
                             b"\x02\x00\x00\x00\x00\x00\x00\x00[]", b"\xff" * 64])
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest[name] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def not_a_file(folder, chance):
    path = folder / chance.choice(NAMES)
    content = path.read_bytes()
    path.unlink()
    kind = chance.choice(["folder", "pipe", "link", "loop"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":  # to the right content, but outside
        (folder.parent / "outside").write_bytes(content)
        path.symlink_to(folder.parent / "outside")
    else:
        path.symlink_to(path)


def too_large(folder, chance):
    """It would not fit the memory."""
    os.truncate(folder / chance.choice(NAMES), 10**13)


def not_a_folder(folder, chance):
    moved = folder.parent / "moved"
    folder.rename(moved)
    kind = chance.choice(["file", "empty", "link"])
    if kind == "file":
        folder.write_bytes(b"")
    elif kind == "empty":
        folder.mkdir()
    else:
        folder.symlink_to(moved)


def another_name(folder, chance):
    """A name that says another step, or none."""
    folder.rename(folder.with_name(chance.choice(["step-000000003", "step-abc", "step-", "step-9", "step-²"])))


DAMAGES = (cut, flip, lengthen, remove, from_the_one_before, all_from_the_one_before, exchange, not_a_file,
           manifest_of_other_paths, foreign_manifest, foreign_content, too_large, not_a_folder, another_name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_ones_are_named_and_passed_over(damage, tmp_path):
    """Of each kind 15, so 210 in all."""
    for seed in range(15):
        root = tmp_path / f"{seed}"
        for step in (1, 2):
            save(root, step, {"step": step}, tensors={name: tensor + step for name, tensor in TENSORS.items()})
        damage(root / "step-000000002", random.Random(seed))
        warnings = []
        found = load_newest(root, warnings.append)
        assert found.state == {"step": 1}, seed
        assert all(torch.equal(found.tensors[name], tensor + 1) for name, tensor in TENSORS.items())
        # one without a number comes last, so it is not even looked at
        assert len(warnings) == 1 or damage is another_name, (seed, warnings)
        assert all(str(root / "step-") in line and "\n" not in line for line in warnings)


def test_a_failing_disk_costs_the_new_one_only(tmp_path, monkeypatch):
    save(tmp_path, 1, {"step": 1})
    written = []

    def fail_on_the_second(path, content):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "write_synced", fail_on_the_second)
    with pytest.raises(MnistDistError, match=r"step 2 .*No space left.*--resume"):
        save(tmp_path, 2, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert load_newest(tmp_path, warn_not).state == {"step": 1}


def test_what_is_written_is_as_of_the_request(tmp_path):
    """The training changes its tensors while they are written; a scalar and one of 3 dimensions too."""
    tensors = {"step": torch.tensor(3.0), "weight": torch.rand(300, 1000),
               "deep": torch.arange(24, dtype=torch.int64).reshape(2, 3, 4)}
    with CheckpointWriter(tmp_path, keep=9) as writer:
        expected = []
        for step in range(5):
            expected.append({name: tensor.clone() for name, tensor in tensors.items()})
            writer.write(step, tensors, {"step": step})
            for tensor in tensors.values():
                tensor.add_(1)
    assert len(writer.pauses) == len(writer.delays) == writer.metrics()["checkpoints"] == 5
    for step in range(5):
        found = load_file(tmp_path / f"step-{step:09d}" / "tensors.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected[step].items())


def test_what_is_not_finite_is_not_written(tmp_path):
    save(tmp_path, 1, {})
    for step, value in ((2, float("nan")), (3, float("inf"))):
        save(tmp_path, step, {}, tensors={**TENSORS, "losses": torch.tensor([1.0, value], dtype=torch.float64)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_an_error_is_raised_by_the_next_request_and_once(tmp_path):
    """The error of a run that ends otherwise is told, not that of its last checkpoint."""
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with CheckpointWriter(tmp_path / "checkpoints", keep=2) as writer:
        writer.write(1, TENSORS, {})
        with pytest.raises(MnistDistError, match="step 1 "):
            writer.write(2, TENSORS, {})
        writer.wait()
    with pytest.raises(MnistDistError, match="step 3 "), writer:
        writer.write(3, TENSORS, {})
    with pytest.raises(KeyError, match="other"), writer:
        writer.write(4, TENSORS, {})
        raise KeyError("other")


@pytest.fixture(scope="module")
def left_alone(small_dir, tmp_path_factory):
    """Three epochs of 11 steps, on one process, not interrupted."""
    folder = tmp_path_factory.mktemp("left-alone")
    return trained(folder, small_dir, "whole", "--epochs", 3)


def trained(folder, data_dir, name, *words):
    done = mnist_dist("train", "--data-dir", data_dir, "--batch-size", 97, "--lr", "1e-3", "--dtype", "float64",
                      "--wandb", "disabled", "--output-dir", name, *words, cwd=folder, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 1)])
def test_a_run_cut_in_the_middle_of_an_epoch_goes_on(sizes, small_dir, tmp_path, left_alone):
    before, after = sizes
    trained(tmp_path, small_dir, "cut", "--processes", before, "--max-steps", 17, "--checkpoint-every", "5steps")
    trained(tmp_path, small_dir, "cut", "--processes", after, "--epochs", 3, "--resume")
    cut, whole = result_of(tmp_path / "cut"), result_of(left_alone)
    assert [epoch["step"] for epoch in cut["epochs"]] == [11, 22, 33]
    for ours, theirs in zip(cut["epochs"], whole["epochs"], strict=True):
        for name in ("train_loss", "test_nll_sum"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-12), name
        assert ours["samples_per_second"] is None or ours["samples_per_second"] > 0
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "cut", left_alone))
    tolerance = 0 if sizes == (1, 1) else 1e-12
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) <= tolerance
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert lines == cut["epochs"]


def test_another_run_is_not_continued(small_dir, left_alone):
    config = (left_alone / "config.yaml").read_bytes()
    for words, field in (
        (["--lr", "0.5"], "--lr"), (["--seed", 1], "--seed"), (["--batch-size", 50], "batch size"),
        (["--local-sgd-steps", 2], "--local-sgd-steps"), (["--gradient-compression", "bf16"], "--gradient-compression"),
        (["--dtype", "float32"], "--dtype"),
    ):
        done = mnist_dist("train", "--data-dir", small_dir, "--batch-size", 97, "--lr", "1e-3", "--dtype", "float64",
                          "--wandb", "disabled", "--output-dir", left_alone, "--resume", *words, cwd=left_alone.parent)
        assert_one_line_error(done, field, "--output-dir")
    assert result_of(left_alone)["status"] == "completed", "and it is left as it was"
    assert (left_alone / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("launcher", [False, True])
def test_another_mixed_precision_is_not_continued(launcher, small_dir, tmp_path):
    words = ["train", "--data-dir", small_dir, "--max-steps", 3, "--wandb", "disabled", "--output-dir", "run"]
    assert mnist_dist(*words, cwd=tmp_path).returncode == 0
    if launcher:
        done = mnist_dist(*words, "--resume", cwd=tmp_path, ACCELERATE_MIXED_PRECISION="bf16")
    else:
        done = mnist_dist(*words, "--resume", "--mixed-precision", "bf16", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1
    assert "was written with --mixed-precision no (now bf16)" in lines[0]


def test_nothing_to_resume_starts_afresh(small_dir, tmp_path):
    folder = trained(tmp_path, small_dir, "new", "--epochs", 1, "--resume", "--checkpoint-every", "never")
    assert len(result_of(folder)["epochs"]) == 1 and not (folder / "checkpoints").exists()


def test_what_cannot_be_removed_is_in_nobodys_way(tmp_path, monkeypatch):
    """A folder that another user's process has left: every later checkpoint is written all the same."""
    root = tmp_path / "checkpoints"
    (root / ".step-x").mkdir(parents=True)
    (root / ".step-000000001.99").write_text("a file")

    def refuse(path):
        if path.name.startswith(".step-x"):
            raise PermissionError(13, "Permission denied", str(path))
        remove_tree(path)

    monkeypatch.setattr("mnist_dist.record.checkpoint.remove_tree", refuse)
    with CheckpointWriter(root, 2) as writer:
        writer.write(1, {"weight": torch.ones(2)}, {})
    assert sorted(path.name for path in root.iterdir()) == [".step-x", "step-000000001"]
