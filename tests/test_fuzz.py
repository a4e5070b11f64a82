"""Whatever is in a file or on the command line, it is read, or one line says what is wrong with it."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from support import epoch_record, idx_bytes, run_result

from mnist_dist.cli import parse
from mnist_dist.commands.report import run as run_report
from mnist_dist.commands.shared import training_config
from mnist_dist.config import TrainConfig
from mnist_dist.data.idx import read_idx
from mnist_dist.data.picture import prepare, read_picture
from mnist_dist.errors import MnistDistError, UserError
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.record.checkpoint import FORMAT, CheckpointWriter, load_newest
from mnist_dist.record.config_file import config_text, merged, read_config
from mnist_dist.record.result import read_result
from mnist_dist.study.plan.grid import Cell, PlannedRun
from mnist_dist.study.plan.table import read_contract, read_table
from mnist_dist.study.report import charts
from mnist_dist.study.run.folder import Study, open_study
from mnist_dist.text import one_line
from mnist_dist.training.model import MLP
from mnist_dist.training.progress import Progress
from mnist_dist.training.results import load_model
from mnist_dist.training.resume import look_at

MOST_MEMORY = 200_000_000  # bytes of one case: the largest header that is believed is 7,840 MB

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(
        ["../..", "/etc/passwd", "-1", "\x1b[31mred", "\x00", "x" * 5000, 10**4000,
         "1e999", "nan", "<script>", "\u202e", "2026-02-30", 10**400, -0.0, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


@st.composite
def changed_bytes(draw, content):
    """Bytes that were cut, changed, lengthened, or are others."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["cut", "change", "insert", "other"]))
        some = draw(st.binary(min_size=1, max_size=12))
        if kind == "cut":
            del content[place:]
        elif kind == "change":
            content[place : place + len(some)] = some
        elif kind == "insert":
            content[place:place] = some
        else:
            content = bytearray(some)
    return bytes(content)


@st.composite
def changed(draw, values):
    """JSON's values, of which some are others, missing, or too many."""
    values = json.loads(json.dumps(values))
    for _ in range(draw(st.integers(1, 3))):
        holder, key, at = None, None, values
        while isinstance(at, (dict, list)) and at and (holder is None or draw(st.booleans())):
            keys = sorted(at) if isinstance(at, dict) else range(len(at))
            holder, key = at, draw(st.sampled_from(keys))
            at = holder[key]
        if holder is None:
            return draw(JUNK)
        if draw(st.integers(0, 3)):
            holder[key] = draw(JUNK)
        else:
            del holder[key]
    return values


def idx(draw, folder):
    what = draw(st.sampled_from(["images", "labels"]))
    shape = (3, 28, 28) if what == "images" else (3,)
    content = draw(changed_bytes(idx_bytes(np.zeros(shape, np.uint8))))
    zipped = draw(st.booleans())
    path = folder / ("file.gz" if zipped else "file")
    path.write_bytes(draw(changed_bytes(gzip.compress(content))) if zipped and draw(st.booleans()) else
                     gzip.compress(content) if zipped else content)
    return lambda: read_idx(path, what)


def config(draw, folder):
    values = yaml.safe_load(config_text(TrainConfig()))
    text = yaml.safe_dump(draw(changed(values)), allow_unicode=True).encode()
    (folder / "config.yaml").write_bytes(text if draw(st.booleans()) else draw(changed_bytes(text)))
    return lambda: merged(read_config(folder / "config.yaml"), {})


def result(draw, folder):
    values = asdict(run_result([epoch_record(), epoch_record(epoch=1)]))
    write_json(draw, folder / "result.json", values)

    def read():
        for reader in (read_result, read_contract):
            try:
                reader(folder)
            except UserError as error:
                is_a_line(error)
    return read


def table(draw, folder):
    row = {"run": "a", "role": "repeat", "repeat": 1, "order": 1, "processes": 1, "global_batch_size": 200,
           "status": "completed", **asdict(run_result([epoch_record()]))}
    lines = [json.dumps(draw(changed(row))) for _ in range(2)]
    content = ("\n".join([*lines, json.dumps(row)]) + "\n").encode()
    (folder / "runs.jsonl").write_bytes(content if draw(st.booleans()) else draw(changed_bytes(content)))
    return lambda: read_table(folder)


def report(draw, folder):
    """The page too, without its pictures."""
    table(draw, folder)

    def write():
        assert run_report(argparse.Namespace(folders=[folder], hold_out=None, fail_if_slower=None, junit=None), [],
                          Launch()) == 0
        assert (folder / "report.md").stat().st_size and (folder / "report.html").stat().st_size
    return write


def study(draw, folder):
    cells = (Cell(200, 1), Cell(100, 2, (("lr", "0.1"),)))
    Study(folder, runs=[PlannedRun(cell, "repeat", number) for cell in cells for number in (1, 2)],
          impossible={Cell(1, 2): "too small"},
          grids=[{"command": "x", "seed": 0, "first_run": 1, "date": "2026-01-01", "grid": {}}]).save()
    write_json(draw, folder / "study.json", json.loads((folder / "study.json").read_text()))

    def read():
        found = open_study(folder)
        for run in found.runs:
            assert found.run_folder(run).resolve().parent == (folder / "runs").resolve()
    return read


def checkpoint(draw, folder):
    progress = Progress("0123abcd", 10)
    progress.records.append(epoch_record(step=10))
    progress.next_epoch()
    fixed = {"--lr": 1e-4}
    state = {**progress.state(), "format": FORMAT, "fixed": fixed, "kind": "plain"}
    with CheckpointWriter(folder / "checkpoints", 2) as writer:
        writer.write(10, {"weight": torch.zeros(2, 3)}, state)
    inside = folder / "checkpoints" / "step-000000010"
    path = inside / draw(st.sampled_from(["tensors.safetensors", "state.json", "manifest.json"]))
    if draw(st.booleans()):  # by one who makes the checksums fit
        path = inside / "state.json"
        path.write_text(json.dumps(draw(changed(state))))
        manifest = json.loads((inside / "manifest.json").read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        (inside / "manifest.json").write_text(json.dumps({**manifest, "state.json": digest}))
    else:
        path.write_bytes(draw(changed_bytes(path.read_bytes())))

    def read():
        warnings = []
        kept = load_newest(folder / "checkpoints", warnings.append)
        assert len(warnings) == (kept is None), "it is loaded, or named as damaged"
        if kept:
            Progress("ffffffff", 10).restore(kept)
            look_at(folder, warnings.append).refuse_changes(fixed)
    return read


def model(draw, folder):
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e5m2]
    tensors = {name: tensor.to(draw(st.sampled_from(kinds)) if draw(st.booleans()) else tensor.dtype)
               for name, tensor in MODEL.items()}
    (folder / "model.safetensors").write_bytes(draw(changed_bytes(save(tensors))) if draw(st.booleans()) else
                                               save(tensors))
    return lambda: load_model(folder)


def image(draw, folder):
    kind = draw(st.sampled_from(["PNG", "JPEG", "GIF", "EPS", "BMP", "TIFF"]))
    mode = draw(st.sampled_from(["L", "RGB"] if kind in ("EPS", "JPEG") else ["L", "RGB", "P"]))
    content = io.BytesIO()
    Image.new(mode, draw(st.sampled_from([(28, 28), (1, 1), (300, 2), (40, 60)]))).save(content, kind)
    path = folder / f"picture.{kind.lower()}"
    path.write_bytes(draw(changed_bytes(content.getvalue())) if draw(st.booleans()) else content.getvalue())

    def read():
        grey, _ = read_picture(path)
        assert prepare(grey).image_1HW.shape == (1, 28, 28) and path.read_bytes()[:4] in (b"\x89PNG", *(
            b"\xff\xd8\xff" + bytes([last]) for last in range(256)))
    return read


def command_line(draw, folder):
    flags = ["--batch-size", "--epochs", "--lr", "--seed", "--dtype", "--compile", "--checkpoint-every", "--target-nll",
             "--per-device-batch-size", "--no-shuffle", "--reproducible", "--evaluate-every", "--config", "--tags",
             "--max-steps", "--timeout", "--wandb", "--mirror", "--data-dir", "--resume",
             "--lr-rule"]
    values = st.sampled_from(["200", "0", "-3", "1e-3", "float64", "off", "3steps", "0.3,0.2", "a b", "", "nan", "∞",
                              "1" * 400, "--", "https://x:y@z/"]) | st.text(max_size=12)
    pairs = draw(st.lists(st.tuples(st.sampled_from(flags), values), max_size=4))
    words = [word for pair in pairs for word in pair] if draw(st.booleans()) else draw(
        st.lists(st.sampled_from(flags) | values, max_size=8))

    def read():
        try:
            return training_config(parse(["train", *words]))
        except SystemExit as end:  # --help
            assert end.code == 0
    return read


MODEL = MLP().state_dict()
KINDS = {reader.__name__: reader for reader in (idx, config, result, table, report, study, checkpoint, model,
                                                image, command_line)}


def write_json(draw, path, values):
    content = json.dumps(draw(changed(values))).encode()
    path.write_bytes(content if draw(st.booleans()) else draw(changed_bytes(content)))


def is_a_line(error):
    """As it is, it is short enough; the length of the folder of the test does not count."""
    text = re.sub(r"\S*/pytest-\S*/", "", str(error))
    assert text.strip() and len(text) <= 400, text
    assert one_line(str(error)).isprintable()


@pytest.mark.parametrize("number", [30, pytest.param(100, marks=pytest.mark.long),
                                    pytest.param(10_000, marks=pytest.mark.faults)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_or_told(kind, number, tmp_path, monkeypatch):
    """Of reports, which take longer, a tenth."""
    number = number // 10 if kind == "report" else number
    monkeypatch.setattr(charts, "draw", lambda folder, name, *rest, **options: charts.Picture(name, "", "<svg/>"))
    told = [0]

    @settings(max_examples=number, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def one(data):
        folder = tmp_path / "case"
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.mkdir(exist_ok=True)
        read = KINDS[kind](data.draw, folder)
        tracemalloc.start()
        try:
            read()
        except MnistDistError as error:
            is_a_line(error)
            told[0] += 1
        finally:
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert most < MOST_MEMORY

    one()
    print(f"{kind}: {number} cases, {told[0]} of them told")
