"""The run's folder and Weights & Biases, read back; and a W&B that cannot be reached costs seconds, not the run."""

from __future__ import annotations

import http.server
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from dataclasses import fields

import psutil
import pytest
from support import ROOT, epoch_record, mnist_dist, records_of, result_of, run, run_summary
from wandb_server import WandbServer

from mnist_dist.cli import parse
from mnist_dist.commands.shared import training_config
from mnist_dist.config import TrainConfig
from mnist_dist.processes.launch_environment import child_environment
from mnist_dist.record import wandb_run
from mnist_dist.record.metrics import GROUP_OF, RunSummary
from mnist_dist.record.wandb_mode import ANSWER_SECONDS
from mnist_dist.worker import THREAD_NAME

ROWS = wandb_run.Rows(60_000, 200)
KEY = "0123456789012345678901234567890123456789"


@pytest.fixture(scope="module")
def tracked(small_dir, tmp_path_factory):
    """A run of two processes, three epochs, tracked offline: (its folder, its output)."""
    folder = tmp_path_factory.mktemp("tracked")
    done = mnist_dist("train", "--processes", 2, "--data-dir", small_dir, "--epochs", 3, "--batch-size", 48, "--wandb",
                      "offline", "--wandb-group", "a group", "--tags", "one, two", "--run-name", "a name",
                      "--wandb-notes", "two words", "--output-dir", "run", cwd=folder, ACCELERATE_USE_CPU="true",
                      WANDB_ENTITY="a-team")
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_the_folder_is_whole(tracked):
    folder, done = tracked
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "result.json", "model.safetensors", "predictions.png", "curves.png",
            "checkpoints", "wandb", "steps.jsonl", "windows.jsonl"} == names
    result = result_of(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == result["epochs"] and len(lines) == 3
    assert result["status"] == "completed" and result["config"]["run_name"] == "a name"
    assert result["dataset"] | {"digest": ""} == {"name": "mnist", "train": 1009, "test": 211, "digest": ""}
    assert result["environment"]["num_processes"] == 2 and result["environment"]["num_machines"] == 1
    assert done.stdout.count("writing to") == 1, "one process speaks"


def test_the_figures_of_an_epoch_fit_together(tracked):
    result = result_of(tracked[0])
    windows = [json.loads(line) for line in (tracked[0] / "windows.jsonl").read_text().splitlines()]
    for epoch, of_epoch in zip(result["epochs"], windows, strict=True):
        assert set(epoch) == set(GROUP_OF) - {"windows"} and epoch["epoch"] == of_epoch["epoch"]
        assert epoch["epoch_seconds"] == pytest.approx(epoch["train_seconds"] + epoch["eval_seconds"])
        assert epoch["samples_per_second_per_process"] == pytest.approx(epoch["samples_per_second"] / 2)
        assert epoch["test_nll"] == pytest.approx(epoch["test_nll_sum"] / 211)
        assert 0 <= epoch["data_wait_fraction"] < 1 and epoch["step_ms_p50"] <= epoch["step_ms_p95"]
        assert epoch["peak_memory_bytes"] == epoch["ranks"]["peak_memory_bytes"]["max"] > 1e6
        assert epoch["measured_samples"] == sum(samples for _, samples, _ in of_epoch["windows"])
        assert epoch["ranks"]["count"] == 2 and epoch["ranks"]["slowest_host"] == platform.node()
        for name in ("step_ms", "own_ms", "data_wait_ms", "peak_memory_bytes"):
            over = epoch["ranks"][name]
            assert over["min"] <= over["median"] <= over["max"], name
        assert epoch["ranks"]["own_ms"]["max"] < epoch["ranks"]["step_ms"]["max"], "the exchange takes time"
    first, *later = result["epochs"]
    assert first["warmup_seconds"] > 0 and all(epoch["warmup_seconds"] == 0 for epoch in later)
    for epoch in later:
        assert epoch["samples_per_second"] == pytest.approx(1009 / epoch["train_seconds"], rel=1e-6)
    summary = result["summary"]
    assert (summary["global_batch_size"], summary["per_device_batch_size"]) == (48, 24)
    assert summary["best_test_nll"] == min(epoch["test_nll"] for epoch in result["epochs"])
    assert summary["best_test_accuracy"] == max(epoch["test_accuracy"] for epoch in result["epochs"])
    assert summary["final_test_nll"] == result["epochs"][-1]["test_nll"]
    assert summary["seconds_to_target"] is None


@pytest.mark.long
def test_the_newest_offline_folder_of_a_run_has_all_of_it(small_dir, tmp_path):
    """A process that is killed may not have written its last epochs to W&B's folder."""
    for epochs in (2, 4):
        done = mnist_dist("train", "--data-dir", small_dir, "--epochs", epochs, "--wandb", "offline", "--resume",
                          "--output-dir", "run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    history = [record["item"] for record in records_of(tmp_path / "run", "latest-run")["history"]]
    found = [(item["train/epoch"], item["test/test_nll"]) for item in history if "train/epoch" in item]
    assert found == [(epoch["epoch"], epoch["test_nll"]) for epoch in result_of(tmp_path / "run")["epochs"]]
    assert len(found) == 4


def test_wandb_has_config_metrics_summary_pictures_and_model(tracked):
    folder, _ = tracked
    records, result = records_of(folder), result_of(folder)
    config = {key: value for update in records["config"] for key, value in update["update"].items()}
    for key, value in result["config"].items():
        assert config[key] == value, key
    assert config["environment"]["num_processes"] == 2 and config["global_batch_size"] == 48
    history = [record["item"] for record in records["history"]]
    for epoch in result["epochs"]:
        (row,) = [row for row in history if row.get("train/epoch") == epoch["epoch"]]
        ranks, _ = (epoch.pop(name) for name in ("ranks", "evaluations"))
        assert (row["step"], row["samples"], row["epoch"]) == (epoch["step"], 1009 * (1 + epoch["epoch"]),
                                                               1 + epoch["epoch"])
        for name, value in epoch.items():
            # None stands for what was not measured, here the noise scale: it is not there
            assert row.get(f"{GROUP_OF[name]}/{name}") == (value if value is None else pytest.approx(value)), name
        assert row["ranks/own_ms_max"] == pytest.approx(ranks["own_ms"]["max"])
        assert row["ranks/slowest_rank"] == ranks["slowest_rank"] and row["ranks/slowest_host"] == platform.node()
    points = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    sent = [row for row in history if "steps/train_loss" in row]
    assert [(row["samples"], row["steps/train_loss"]) for row in sent] == [
        (point["samples"], pytest.approx(point["train_loss"])) for point in points] and len(points) == 3 * 22
    axes = {metric["glob_name"]: metric["step_metric"] for metric in records["metric"]}
    assert axes == {f"{group}/*": "samples" for group in ("train", "test", "throughput", "time", "memory", "ranks",
                                                          "steps")}
    assert records["stats"], "a short run has the machine's figures too"
    summary = {key: value for update in records["summary"] for key, value in update["update"].items()}
    assert summary["batch_size"] == 48 and summary["best_test_accuracy"] == result["summary"]["best_test_accuracy"]
    assert summary["samples_per_second"] == pytest.approx(result["summary"]["samples_per_second"])
    files = [entry["path"] for record in records["files"] for entry in record["files"]]
    for kind in ("predictions", "curves"):
        assert any(re.search(rf"media/images/{kind}_.*\.png", path) for path in files), files
    assert any("confusion_matrix" in path for path in files), files
    (model,) = (artifact for artifact in records["artifact"] if artifact["type"] == "model")
    metadata, last = json.loads(model["metadata"]), result["epochs"][-1]
    assert metadata["test_nll"] == last["test_nll"] and metadata["test_accuracy"] == last["test_accuracy"]
    assert metadata["sizes"] == [784, 256, 10] and metadata["digest"] == result["dataset"]["digest"]
    (began,) = records["run"]
    assert (began["project"], began["display_name"], began["run_group"]) == ("mnist_dist", "a name", "a group")
    assert began["tags"] == ["one", "two"] and (began["notes"], began["entity"]) == ("two words", "a-team")


def test_a_run_without_a_name_is_called_after_what_it_is():
    assert wandb_run.run_name(200, 2, 1e-4, 0) == "b200-p2-lr1e-4-seed0"
    assert [wandb_run.run_name(1, 1, rate, 7) for rate in (0.00025, 1.0, 12.5)] == [
        f"b1-p1-lr{rate}-seed7" for rate in ("2.5e-4", "1e0", "1.25e1")]


def test_an_offline_run_says_how_to_sync(tracked):
    assert re.search(r"wandb sync \S*offline-run-\S+", tracked[1].stdout)


class Stalling(http.server.BaseHTTPRequestHandler):
    """Takes a request and never answers."""

    def do_POST(self):
        self.server.asked.set()
        self.server.over.wait(60)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def stalling_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.asked, server.over = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_a_server_that_does_not_answer(stalling_server, small_dir, tmp_path):
    begin = time.monotonic()
    done = mnist_dist("train", "--data-dir", small_dir, "--max-steps", 2, "--output-dir", "run", cwd=tmp_path,
                      WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{stalling_server.server_port}")
    print(f"{time.monotonic() - begin:.1f} s in all")
    assert done.returncode == 0, done.stderr
    assert stalling_server.asked.is_set()
    assert "does not answer" in done.stderr and "continuing offline" in done.stderr
    assert "wandb sync" in done.stdout and KEY not in done.stdout + done.stderr
    assert records_of(tmp_path / "run")["history"]
    assert ANSWER_SECONDS + wandb_run.INIT_SECONDS < 15


@pytest.mark.long
def test_no_network_no_key_and_disabled(small_dir, tmp_path):
    refused = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    for name, environment, said in (("refused", refused, "does not answer"), ("no-key", {}, "no API key")):
        done = mnist_dist("train", "--data-dir", small_dir, "--max-steps", 2, "--wandb", "online", "--output-dir", name,
                          cwd=tmp_path, **environment)
        assert done.returncode == 0 and said in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert records_of(tmp_path / name)["history"]
    done = mnist_dist("train", "--data-dir", small_dir, "--max-steps", 2, "--wandb", "disabled", "--output-dir", "off",
                      cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "off" / "wandb").exists()


def test_a_wandb_that_fails_to_start_stops_nothing(monkeypatch, tmp_path):
    import wandb

    attempts, warnings = [], []

    def fail(**options):
        attempts.append(options["mode"])
        raise RuntimeError("out of\norder")

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(wandb_run, "wandb_mode", lambda *_: "online")
    made = wandb_run.Mirror(tmp_path, warnings.append)
    made.start(TrainConfig(), "id", {})
    assert attempts == ["online", "offline", "offline"] and made.mode == "disabled"
    assert len(warnings) == 2 and all("out of order" in warning for warning in warnings)
    made.log([ROWS.of_epoch(epoch_record())])
    made.finish()
    assert len(warnings) == 2 and made.sync_hint() is None


def test_a_damaged_wandb_stops_nothing(monkeypatch, tmp_path):
    def fail(*_):
        raise AttributeError("half\ninstalled")

    warnings = []
    monkeypatch.setattr(wandb_run, "wandb_mode", fail)
    made = wandb_run.Mirror(tmp_path, warnings.append)
    made.start(TrainConfig(), "id", {})
    made.log([ROWS.of_epoch(epoch_record())])
    made.finish()
    assert warnings == ["W&B could not start (half installed); continuing without W&B"]


HANGS = {  # the function in which wandb hangs: what the run prints
    "init": "W&B did not start within 0.3 s; continuing without W&B",
    "log": "W&B took more than 0.3 s for an epoch",
    "results": "W&B did not take all of the run (no answer within 0.5 s)",
    "log_artifact": "W&B did not take all of the run (no answer within 0.5 s)",
    "finish": "W&B did not take all of the run (no answer within 0.5 s)",
}


def mirrored(folder):
    """What a run calls, from start to end: (the mirror, its warnings, the seconds that it took)."""
    warnings, begin = [], time.monotonic()
    made = wandb_run.Mirror(folder, warnings.append)
    made.start(TrainConfig(), "id", {})
    for epoch in range(3):
        made.log([ROWS.of_epoch(epoch_record(epoch=epoch))])
    made.log_results(run_summary(), [1], [1], {})
    made.finish()
    return made, warnings, time.monotonic() - begin


@pytest.fixture
def stand_in(monkeypatch):
    """wandb is the stand-in, and the limits are short."""
    import hanging_wandb

    monkeypatch.setitem(sys.modules, "wandb", hanging_wandb)
    monkeypatch.setattr(hanging_wandb.time, "sleep", lambda seconds: threading.Event().wait(20))
    monkeypatch.setattr(hanging_wandb.atexit, "register", lambda *_: None)
    for name, seconds in (("START", 0.3), ("LOG", 0.3), ("END", 0.5)):
        monkeypatch.setattr(wandb_run, f"{name}_SECONDS", seconds)
    hanging_wandb.CALLS.clear()
    return hanging_wandb.CALLS


@pytest.mark.parametrize("where", HANGS)
def test_a_wandb_that_hangs_holds_nothing(where, stand_in, monkeypatch, tmp_path):
    monkeypatch.setenv("HANGS_IN", where)
    made, warnings, seconds = mirrored(tmp_path)
    assert HANGS[where] in warnings[0] and len(warnings) == (2 if where == "log" else 1), warnings
    assert seconds < 15
    until = time.monotonic() + 10
    while not stand_in and time.monotonic() < until:  # on a busy machine the thread comes to `init` after its limit
        threading.Event().wait(0.01)  # the stand-in has taken `time.sleep`
    assert stand_in[-1] == where, "and nothing is called after it"
    assert (made.sync_hint() is None) == (where == "init")
    assert any(thread.name == THREAD_NAME for thread in threading.enumerate()), "the thread that exit must not wait for"


def test_a_wandb_that_answers_gets_everything(stand_in, tmp_path):
    made, warnings, _ = mirrored(tmp_path)
    assert stand_in == ["init", "log", "log", "log", "results", "log_artifact", "finish"] and not warnings
    assert made.sync_hint() == "wandb sync somewhere"


@pytest.mark.parametrize(("where", "size"), [
    pytest.param(where, size, marks=pytest.mark.long if (where, size) in (("init", 2),)
                 else pytest.mark.faults) for where in ("init", "log", "log_artifact", "finish") for size in (1, 2)])
def test_a_run_ends_although_wandb_hangs(where, size, small_dir, tmp_path):
    """With the limits that users get, also at exit, and with a --timeout shorter than these limits."""
    (tmp_path / "wandb.py").write_bytes((ROOT / "tests" / "helpers" / "hanging_wandb.py").read_bytes())
    done = run([sys.executable, "-m", "mnist_dist", "train", "--processes", size, "--data-dir", small_dir, "--epochs",
                2, "--timeout", 8, "--output-dir", "run"], cwd=tmp_path, HANGS_IN=where,
               PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    after = time.time() - (tmp_path / "run" / "result.json").stat().st_mtime
    print(f"{where} on {size}: the run ends {after:.1f} s after its last result")
    assert done.returncode == 0 and "W&B" in done.stderr, done.stderr
    assert result_of(tmp_path / "run")["status"] == "completed" and after < 15


def tracked_by(server, small_dir, tmp_path, *words):
    """A run of two epochs that real wandb sends to this server: (what it printed, seconds)."""
    begin = time.monotonic()
    done = mnist_dist("train", "--data-dir", small_dir, "--epochs", 2, "--wandb", "online", "--output-dir", "run",
                      *words, cwd=tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert KEY not in done.stdout + done.stderr
    assert result_of(tmp_path / "run")["status"] == "completed"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    return done, time.monotonic() - begin


def ours(said):
    """The lines that are not wandb's own, which says where it has found the key."""
    return [line for line in said.splitlines() if not line.startswith("wandb: ")]


@pytest.mark.long
def test_a_server_gets_everything(small_dir, tmp_path):
    with WandbServer() as server:
        done, _ = tracked_by(server, small_dir, tmp_path)
    assert not ours(done.stderr) and "wandb sync" not in done.stdout
    epochs = result_of(tmp_path / "run")["epochs"]
    assert [line["test/test_nll"] for line in server.history if "test/test_nll" in line] == [
        epoch["test_nll"] for epoch in epochs]
    assert {"config.yaml", "wandb-summary.json"} <= server.files


@pytest.mark.parametrize("ends", [pytest.param("stalls", marks=pytest.mark.long),
                                  pytest.param("dies", marks=pytest.mark.faults)])
def test_a_server_that_fails_in_the_middle_costs_seconds(ends, small_dir, tmp_path):
    with WandbServer(ends) as server:
        done, seconds = tracked_by(server, small_dir, tmp_path)
        assert server.failed.is_set()
    print(f"a server that {ends}: {seconds:.1f} s in all")
    (line,) = ours(done.stderr)
    assert re.search(r"warning: W&B did not take all of the run .no answer within 10 s.; it is in run", line)
    assert "with --resume sends it the run again" in done.stdout
    with WandbServer() as server:
        tracked_by(server, small_dir, tmp_path, "--resume")
    assert [line["test/test_nll"] for line in server.history if "test/test_nll" in line] == [
        epoch["test_nll"] for epoch in result_of(tmp_path / "run")["epochs"]]


@pytest.mark.long
def test_a_wandb_service_that_is_killed_stops_nothing(small_dir, tmp_path):
    """Its process, which the operating system may kill if memory is short."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    words = [sys.executable, "-m", "mnist_dist", "train", "--data-dir", small_dir, "--epochs", "100", "--wandb",
             "offline", "--output-dir", "run"]
    with subprocess.Popen(words, cwd=tmp_path, env={**child_environment(), "PYTHONPATH": str(ROOT)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as training:
        while not (metrics.exists() and metrics.stat().st_size):
            assert training.poll() is None
            time.sleep(0.02)
        (service,) = [child for child in psutil.Process(training.pid).children() if "wandb" in child.name()]
        service.kill()
        _, said = training.communicate(timeout=200)
    assert training.returncode == 0 and result_of(tmp_path / "run")["status"] == "completed"
    assert "Traceback" not in said
    (line,) = ours(said)
    assert "W&B did not take all of the run" in line and line.count("Connection lost") == 1


def test_the_sweeps_command_is_one_of_ours():
    import yaml

    sweep = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists() and sweep["method"] == "grid"
    assert sweep["metric"]["name"] in {option.name for option in fields(RunSummary)}
    for size in sweep["parameters"]["batch-size"]["values"]:  # the agent writes each parameter as --name=value
        words = [f"--{name}={size if 'values' in given else given['value']}" for name, given in
                 sweep["parameters"].items()]
        config = training_config(parse(["train", *words]))
        assert (config.batch_size, config.epochs, config.checkpoint_every) == (size, 2, "never")


def test_a_run_of_a_sweep_keeps_the_id_that_its_agent_gave(monkeypatch, tmp_path):
    import wandb

    ids = []

    def init(**options):
        ids.append(options["id"])
        raise RuntimeError("enough")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_run, "wandb_mode", lambda *_: "offline")
    for sweep in (None, "abc"):
        if sweep:
            monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        made = wandb_run.Mirror(tmp_path, lambda line: None)
        made.start(TrainConfig(), "ours", {})
        made.finish()
    assert ids == ["ours", "ours", None, None], "once more without wandb's variables"
