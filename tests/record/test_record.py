"""The record of a run: every figure explained, written and read back, without torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields

import pytest
from support import ROOT, epoch_record, run, run_result

from mnist_dist.config import TrainConfig
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.record import EpochRecord, RunSummary, read_result
from mnist_dist.record.metrics import GROUP_OF, grouped, record_from, summarise
from mnist_dist.record.rank_summary import over_ranks
from mnist_dist.record.result import write_result
from mnist_dist.record.run_folder import append_metrics, open_folder, write_config, write_metrics
from mnist_dist.training.results import load_model


def test_rates_are_summed_and_divided_and_not_averaged():
    records = [
        epoch_record(step=10, test_nll=0.5, train_seconds=3.0, measured_seconds=2.0, measured_samples=200),
        epoch_record(step=20, test_nll=0.3, train_seconds=8.0, measured_seconds=8.0, measured_samples=400),
        epoch_record(step=30, test_nll=0.4, train_seconds=1.0, measured_seconds=0.0, measured_samples=0),
    ]
    summary = summarise(records, [0.6, 0.3], 1000, 100)
    assert summary["samples_per_second"] == pytest.approx((100 * 2 + 50 * 8) / 10)
    assert (summary["best_test_nll"], summary["final_test_nll"]) == (0.3, 0.4)
    assert summary["seconds_to_target"] == pytest.approx(11.0) and summary["steps_to_target"] == 20
    assert [one["step"] for one in summary["targets"]] == [10, 20] and summary["targets"][1]["samples"] == 2000


def test_what_was_not_reached_or_measured_is_none():
    summary = summarise([epoch_record(test_nll=0.5, measured_seconds=0.0, measured_samples=0)], [0.3], 10, 10)
    assert summary["targets"] == [{"target_nll": 0.3, "step": None, "samples": None, "train_seconds": None,
                                   "test_nll": None}]
    assert summary["seconds_to_target"] is None and summary["steps_to_target"] is None
    assert summary["samples_per_second"] is None
    assert summarise([], [], 10, 10)["best_test_nll"] is None


def test_a_target_is_reached_within_an_epoch():
    """15 samples, batches of 4: 4 steps per epoch."""
    within = [{"step": 5, "samples": 19, "train_seconds": 2.5, "test_nll": 0.35, "test_accuracy": 0.8}]
    records = [epoch_record(step=4, test_nll=0.5, train_seconds=2.0),
               epoch_record(step=7, test_nll=0.2, train_seconds=3.0, evaluations=within)]
    first, second, third = summarise(records, [0.4, 0.25, 0.1], 15, 4)["targets"]
    assert (first["step"], first["samples"], first["train_seconds"], first["test_nll"]) == (5, 19, 2.5, 0.35)
    assert (second["step"], second["samples"], second["train_seconds"]) == (7, 27, 5.0)
    assert third["step"] is None


def test_every_figure_has_a_group_a_unit_and_a_meaning():
    for kind in (EpochRecord, RunSummary):
        for option in fields(kind):
            assert option.metadata["group"] and option.metadata["meaning"] and "unit" in option.metadata, option.name
    assert set(GROUP_OF.values()) == {"train", "test", "throughput", "time", "memory", "ranks"}
    units = {"nats", "samples", "samples/s", "s", "ms", "steps", "images", "bytes", ""}
    assert {option.metadata["unit"] for kind in (EpochRecord, RunSummary) for option in fields(kind)} <= units


def test_wandb_has_the_groups_and_no_gaps():
    values = grouped(epoch_record(step_ms_p50=None, noise_scale=2.0, noise_scale_low=1.0, noise_scale_high=3.0))
    assert values["test/test_nll"] == 0.25 and values["throughput/measured_samples"] == 60_000
    assert "time/step_ms_p50" not in values and len(values) == len(fields(EpochRecord)) - 4
    assert not [name for name in values if "windows" in name or "ranks" in name], "of one rank nothing over ranks"


def test_wandb_has_the_figures_over_ranks():
    own = {"step_ms": 3.0, "data_wait_ms": 0.3, "peak_memory_bytes": 10}
    ranks = over_ranks([{**own, "own_ms": 1.0, "host": "attic"}, {**own, "own_ms": 2.0, "host": "<b>"}])
    values = grouped(epoch_record(ranks=ranks))
    assert values["ranks/own_ms_min"] == 1.0 and values["ranks/own_ms_median"] == 1.5
    assert (values["ranks/slowest_rank"], values["ranks/slowest_host"]) == (1, "<b>")


def test_what_is_written_is_read(tmp_path):
    result = run_result([epoch_record(), epoch_record(epoch=1, step_ms_p50=None)])
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == json.loads(json.dumps({**asdict(result),
                                                      "epochs": [epoch.values for epoch in result.epochs]}))
    assert sum('"test_nll_sum"' in line for line in text.splitlines()) == 2, "a line for each epoch"
    write_result(tmp_path, run_result([]))
    assert read_result(tmp_path).epochs == ()


def test_a_result_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no result\.json"):
        read_result(tmp_path)
    write_result(tmp_path, run_result([epoch_record()]))
    path = tmp_path / "result.json"
    values = json.loads(path.read_text())
    del values["epochs"][0]["measured_samples"]
    for content, message in ((json.dumps(values), "has no measured_samples: another version"),
                             ("{", "cannot be read"), ("[]", "cannot be read")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_result(tmp_path)


def test_every_line_of_metrics_has_the_same_shape(tmp_path):
    """A run that is continued writes the lines of its checkpoint again, with nothing added or dropped."""
    records = [epoch_record(samples_per_second=None), epoch_record(epoch=1)]
    write_metrics(tmp_path, [])
    for record in records:
        append_metrics(tmp_path, record)
    content = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in content.splitlines()]
    assert [set(line) for line in lines] == 2 * [{option.name for option in fields(EpochRecord)} - {"windows"}]
    write_metrics(tmp_path, [record_from(EpochRecord, line, tmp_path) for line in lines])
    assert (tmp_path / "metrics.jsonl").read_text() == content


def test_a_folder_of_an_earlier_run_is_refused(tmp_path):
    write_metrics(tmp_path, [])  # a run that was stopped before its first step has left this
    (tmp_path / "checkpoints").mkdir()
    open_folder(TrainConfig(output_dir=str(tmp_path)))[2].release()
    write_metrics(tmp_path, [epoch_record()])
    with pytest.raises(UserError, match="already holds a run"):
        open_folder(TrainConfig(output_dir=str(tmp_path)))
    folder, _, lock = open_folder(TrainConfig(output_dir=str(tmp_path), resume=True))
    assert folder == tmp_path
    lock.release()


@pytest.mark.parametrize("name", ["checkpoints", "wandb"])
def test_a_folder_that_leads_elsewhere_is_refused(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        open_folder(TrainConfig(output_dir=str(tmp_path / "run"), resume=True))


def test_no_link_is_followed_to_a_file(tmp_path):
    """What is replaced is the link, and nothing is appended through one."""
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "result.json"):
        (folder / name).symlink_to(outside)
    with pytest.raises(MnistDistError, match=r"metrics\.jsonl could not be written"):
        append_metrics(folder, epoch_record())
    write_config(folder, TrainConfig())
    write_metrics(folder, [epoch_record()])
    write_result(folder, run_result([epoch_record()]))
    assert outside.read_text() == "precious"
    assert all((folder / name).is_file() and not (folder / name).is_symlink() for name in
               ("config.yaml", "metrics.jsonl", "result.json"))
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(UserError, match="cannot be read"):
        load_model(folder)


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".result.json.1234").write_text("half")
    (tmp_path / ".mine").write_text("of the user")
    open_folder(TrainConfig(output_dir=str(tmp_path)))[2].release()
    assert [path.name for path in tmp_path.iterdir()] == [".mine"]


def test_reading_needs_no_torch():
    code = "import sys, mnist_dist.record, mnist_dist.runner; print(sorted({'torch', 'accelerate'} & set(sys.modules)))"
    done = run([sys.executable, "-c", code], cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
