"""Checkpoints: whole or not there, named when damaged; a run that continues is the run it would have been."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file
from support import assert_one_line_error, mnist_dist, result_of

from mnist_dist.errors import MnistDistError
from mnist_dist.record import checkpoint
from mnist_dist.record.checkpoint import CheckpointWriter, load_newest

TENSORS = {"model.weight": torch.arange(12.0).reshape(3, 4), "losses": torch.rand(5, dtype=torch.float64)}


def save(root, step, state, keep=2):
    """Write one checkpoint, and wait for it."""
    with CheckpointWriter(root, keep) as writer:
        writer.write(step, TENSORS, state)


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
    for step in (5, 100, 20):
        save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000100"]
    assert load_newest(tmp_path, warn_not).state == {"step": 100}


def test_none_where_there_is_none(tmp_path):
    assert load_newest(tmp_path / "missing", warn_not) is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_a_damaged_one_is_named_and_passed_over(name, damage, tmp_path):
    for step in (1, 2):
        save(tmp_path, step, {"step": step})
    path = tmp_path / "step-000000002" / name
    content = path.read_bytes()
    middle = len(content) // 2
    changed = {"empty": b"", "cut": content[:-1],
               "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    warnings = []
    assert load_newest(tmp_path, warnings.append).state == {"step": 1}
    assert len(warnings) == 1 and "step-000000002" in warnings[0]


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
    assert len(writer.pauses) == len(writer.delays) == writer.figures()["checkpoints"] == 5
    for step in range(5):
        found = load_file(tmp_path / f"step-{step:09d}" / "tensors.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected[step].items())


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
    assert "was written with --mixed-precision no, this run has bf16" in lines[0]


def test_a_completed_run_is_not_trained_again(small_dir, left_alone):
    before = result_of(left_alone)
    trained(left_alone.parent, small_dir, "whole", "--epochs", 3, "--resume")
    assert result_of(left_alone)["epochs"] == before["epochs"]


def test_nothing_to_resume_starts_afresh(small_dir, tmp_path):
    folder = trained(tmp_path, small_dir, "new", "--epochs", 1, "--resume", "--checkpoint-every", "never")
    assert len(result_of(folder)["epochs"]) == 1 and not (folder / "checkpoints").exists()
