"""A run that is resumed: a finished one never changes, an unfinished one goes on with its options and its data."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path

import pytest
import yaml
from support import assert_one_line_error, epoch_record, mnist_dist, records_of, result_of, write_idx_folder

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.record.checkpoint import Checkpoint
from mnist_dist.training.resume import Earlier, has_ended


def hashes(folder):
    """The SHA-256 of each file below the folder, by its path; not of logs, which W&B's service writes after the run."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


def train(folder, *words, **environment):
    return mnist_dist("train", *words, "--wandb", "disabled", "--output-dir", "run", cwd=folder, **environment)


def within(step, nll):
    return {"step": step, "test_nll": nll}


@pytest.mark.parametrize(("options", "records", "ended"), [
    ({}, [], False),
    ({"epochs": 2}, [(10, 0.5)], False),
    ({"epochs": 2}, [(10, 0.5), (20, 0.4)], True),
    ({"epochs": 2}, [(10, 0.5), (19, 0.4)], False),
    ({"epochs": 1}, [(10, 0.5), (20, 0.4)], True),
    ({"max_steps": 15}, [(10, 0.5)], False),
    ({"max_steps": 15}, [(10, 0.5), (15, 0.4)], True),
    ({"max_steps": 16}, [(10, 0.5), (15, 0.4)], False),
    ({"max_steps": 10}, [(10, 0.5)], True),
    ({"target_nll": "0.4"}, [(10, 0.5)], False),
    ({"target_nll": "0.5,0.4"}, [(10, 0.5)], False),
    ({"target_nll": "0.5"}, [(10, 0.5)], True),
    ({"target_nll": "0.4"}, [(10, 0.5), (13, 0.4)], True),
    ({"target_nll": "0.4"}, [(10, 0.6, within(7, 0.39))], True),
])
def test_the_end_of_a_run(options, records, ended):
    """Of epochs of 10 steps."""
    made = [epoch_record(step=step, test_nll=nll, evaluations=rest) for step, nll, *rest in records]
    assert has_ended(TrainConfig(**options), made, 10) is ended


def test_all_changes_are_named_at_once(tmp_path):
    earlier = Earlier(None, object(), tmp_path, {"--lr": 1.0, "--seed": 0, "data set": {"name": "mnist"}})
    earlier.refuse_changes({"--lr": 1.0, "--seed": 0, "data set": {"name": "mnist"}})
    with pytest.raises(UserError, match=r"--lr 1\.0 \(now 2\.0\), --seed 0 \(now 7\): continue"):
        earlier.refuse_changes({"--lr": 2.0, "--seed": 7, "data set": {"name": "mnist"}})
    with pytest.raises(UserError, match="has no --new: another version"):
        earlier.refuse_changes({"--lr": 1.0, "--new": 7})
    Earlier(None, None, tmp_path, {"--lr": 1.0}).refuse_changes({"--lr": 1.0, "--new": 7})
    Earlier().refuse_changes({"--lr": 1.0})


ENDS = {  # of a run of 11 steps per epoch
    "steps": ["--epochs", 3, "--max-steps", 17],
    "target": ["--epochs", 9, "--target-nll", 2.2, "--evaluate-every", "200samples"],
    "epochs": ["--epochs", 2],
}


@pytest.mark.parametrize(("end", "every"), [
    ("steps", "2steps"), *(pytest.param(end, every, marks=pytest.mark.long if end == "target" else pytest.mark.faults)
                           for end, every in itertools.product(ENDS, ["2steps", "never"])
                           if (end, every) != ("steps", "2steps"))])
def test_a_finished_run_never_changes(end, every, small_dir, tmp_path):
    """Resumed, it ends with 0 and each of its files has its bits; also without result.json it is the same run."""
    words = ["--data-dir", small_dir, "--batch-size", 97, "--lr", "1e-3", "--checkpoint-every", every, *ENDS[end]]
    assert train(tmp_path, *words).returncode == 0
    result, before = result_of(tmp_path / "run"), hashes(tmp_path / "run")
    if end != "epochs":
        assert result["epochs"][-1]["step"] % 11, "it ends within an epoch"
    for options in ([], words, words[-2:]):
        again = train(tmp_path, "--resume", *options)
        assert again.returncode == 0 and "nothing is left to do" in again.stdout, again.stderr
        assert hashes(tmp_path / "run") == before
    refused = train(tmp_path, "--resume", "--epochs", 12, "--target-nll", "none", "--seed", 1)
    assert_one_line_error(refused, "--seed 0 (now 1)")
    if every == "never":
        more = train(tmp_path, "--resume", "--epochs", 12, "--target-nll", "none")
        assert_one_line_error(more, "no checkpoint to continue it from", "--output-dir")
    assert hashes(tmp_path / "run") == before
    if every != "never":
        (tmp_path / "run" / "result.json").unlink()
        assert train(tmp_path, "--resume").returncode == 0
        same = ("metrics.jsonl", "model.safetensors", "config.yaml")
        assert {name: hashes(tmp_path / "run")[name] for name in same} == {name: before[name] for name in same}
        assert result_of(tmp_path / "run")["epochs"] == result["epochs"]


@pytest.mark.long
def test_wandb_gets_a_finished_run_that_it_lacks(small_dir, tmp_path):
    """Its process was killed between result.json and W&B's end."""
    done = mnist_dist("train", "--data-dir", small_dir, "--epochs", 2, "--wandb", "offline", "--output-dir", "run",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before = hashes(tmp_path / "run")
    assert train_offline(tmp_path).returncode == 0 and hashes(tmp_path / "run") == before
    kept = records_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "wandb")
    (tmp_path / "run" / "wandb").mkdir()
    (tmp_path / "run" / "wandb" / "unsent").touch()
    again = train_offline(tmp_path)
    assert again.returncode == 0 and "wandb sync" in again.stdout, again.stderr
    found = records_of(tmp_path / "run")
    assert [record["item"].get("test/test_nll") for record in found["history"]] == [
        record["item"].get("test/test_nll") for record in kept["history"]]
    assert found["run"][0]["run_id"] == kept["run"][0]["run_id"]
    after = hashes(tmp_path / "run")
    assert {name: after[name] for name in before if not name.startswith("wandb")} == {
        name: digest for name, digest in before.items() if not name.startswith("wandb")}
    assert "wandb/unsent" not in after


def train_offline(folder):
    return mnist_dist("train", "--resume", "--output-dir", "run", cwd=folder)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_run_goes_on_with_its_options(size, small_dir, tmp_path):
    """What its config.yaml says is the default; what is given wins; what may not change is refused, all of it named."""
    words = ["--data-dir", small_dir, "--batch-size", 97, "--lr", "1e-3", "--dtype", "float64"]
    assert train(tmp_path, *words, "--epochs", 3).returncode == 0
    shutil.move(tmp_path / "run", tmp_path / "whole")
    assert train(tmp_path, *words, "--processes", size, "--epochs", 1).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    before = hashes(tmp_path / "run")
    refused = train(tmp_path, "--resume", "--epochs", 3, "--lr", 0.5, "--no-shuffle", "--batch-size", 50)
    assert_one_line_error(refused, "--lr 0.001 (now 0.5)", "--shuffle True (now False)", "batch size 97 (now 50)")
    assert hashes(tmp_path / "run") == before
    more = mnist_dist("train", "--resume", "--epochs", 3, "--processes", size, "--output-dir", tmp_path / "run",
                      cwd=tmp_path / "elsewhere")
    assert more.returncode == 0, more.stderr
    cut, whole = result_of(tmp_path / "run"), result_of(tmp_path / "whole")
    assert [epoch["step"] for epoch in cut["epochs"]] == [11, 22, 33]
    for ours, theirs in zip(cut["epochs"], whole["epochs"], strict=True):
        assert ours["test_nll_sum"] == pytest.approx(theirs["test_nll_sum"], rel=1e-12)
    assert cut["config"]["wandb"] == "disabled" and list((tmp_path / "elsewhere").iterdir()) == []


def test_keys_of_another_version(small_dir, tmp_path):
    assert train(tmp_path, "--data-dir", small_dir, "--epochs", 1, "--seed", 3).returncode == 0
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    words = ["--resume", "--epochs", 2]
    for version, message in ((values["mnist_dist"], "unknown keys dropped"), ("99.1.0", "99.1.0")):
        path.write_text(yaml.safe_dump({**values, "dropped": 1, "mnist_dist": version}))
        assert_one_line_error(train(tmp_path, *words), message, "dropped")
    path.write_text(yaml.safe_dump({**values, "dropped": 1, "mnist_dist": "0.1.9"}))
    more = train(tmp_path, *words)
    assert more.returncode == 0 and more.stderr.count("\n") == 1 and "ignored dropped" in more.stderr, more.stderr
    assert result_of(tmp_path / "run")["config"]["seed"] == 3
    path.write_text("dropped: 1\nmnist_dist: 0.1.9\n")
    assert_one_line_error(mnist_dist("train", "--config", path, cwd=tmp_path), "unknown keys dropped")


def test_other_data_are_refused(small_dir, tmp_path):
    """They have the same counts; of a run that is finished, and of one that is not."""
    other = write_idx_folder(tmp_path / "other", 1009, 211)
    with open(other / "train-labels-idx1-ubyte", "r+b") as file:
        file.seek(500)
        old = file.read(1)
        file.seek(500)
        file.write(bytes([(old[0] + 1) % 10]))
    assert train(tmp_path, "--data-dir", small_dir, "--epochs", 1).returncode == 0
    digest = result_of(tmp_path / "run")["dataset"]["digest"]
    for left in ("result.json", "checkpoints"):
        for words in ([], ["--epochs", 2]):
            refused = train(tmp_path, "--resume", "--data-dir", other, *words)
            assert_one_line_error(refused, "data set", digest, "now")
        if left == "result.json":
            shutil.move(tmp_path / "run" / left, tmp_path / left)
    shutil.move(tmp_path / "result.json", tmp_path / "run" / "result.json")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert_one_line_error(train(tmp_path, "--resume", "--data-dir", other), "data set", digest)


@pytest.mark.parametrize("below", ["checkpoints", "checkpoints/step-000000006", "metrics.jsonl"])
def test_a_folder_inside_of_a_run_is_refused(below, tmp_path):
    """At once: nothing is downloaded, or made instead."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_text("")
    for words in (["--resume"], []):
        done = mnist_dist("train", "--output-dir", run / below, *words, cwd=tmp_path)
        assert_one_line_error(done, f"is inside of the run {run}", f"--output-dir {run}")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert list(tmp_path.iterdir()) == [run]


def test_a_change_is_named_in_few_words():
    earlier = Earlier(Checkpoint(Path("run"), {}, {}), None, Path("run"), {"--lr": "x" * 5000, "--seed": "\x1b[31m"})
    with pytest.raises(UserError, match="was written with --lr xxx") as caught:
        earlier.refuse_changes({"--lr": 1e-4, "--seed": 0})
    assert len(str(caught.value)) <= 400 and str(caught.value).isprintable()
