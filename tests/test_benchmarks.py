"""The benchmarks: their arithmetic on figures handed in, rows that cannot run, and the cheap peers on a few images.

Nothing here looks at how long anything took.
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import ROOT, write_idx_folder

from mnist_dist.training.model import flop_per_sample

sys.path.insert(0, str(ROOT))  # benchmarks is run from a checkout and is not installed
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a peer that is called here takes a GPU if there is one


def module(name: str) -> ModuleType:
    """`benchmarks.NAME`."""
    return importlib.import_module(f"benchmarks.{name}")


def measurement(row: str, batch_size: int, repeat: int, seconds: float | None = None, **more: Any) -> dict[str, Any]:
    """A measurement of 60,000 images; without seconds, one that failed."""
    line = {"status": "failed", "note": "ValueError: no"} if seconds is None else {
        "status": "ok", "samples": 60_000, "seconds": seconds, "warmup_seconds": 10.0 / (repeat + 1),
        "version": "none 0", "device": "cpu"}
    processes = module("rows").BY_NAME[row].processes
    return {"row": row, "processes": processes, "batch_size": batch_size, "repeat": repeat, "wall_seconds": 1.0,
            **line, **more}


@pytest.fixture
def record() -> dict[str, Any]:
    """Three repeats of ours and of some peers, of which one is missing and one failed."""
    limit = {"matmul_seconds": 0.05, "adam_seconds": 0.05}
    measurements = [
        *(measurement("mnist_dist", 200, repeat, seconds) for repeat, seconds in enumerate((0.2, 0.1, 0.4))),
        *(measurement("pytorch", 200, repeat, seconds) for repeat, seconds in enumerate((0.4, 0.5, 0.6))),
        *(measurement("limit", 200, repeat, 0.1, **limit) for repeat in range(3)),
        measurement("tutorial", 200, 0, 0.8), measurement("tutorial", 200, 1),
        measurement("sklearn", 200, 0, status="missing", note="not installed: sklearn"),
        measurement("mnist_dist", 1, 0, 1.0, samples=6000),
        *(measurement(row, 200, repeat, 0.3) for row in ("mnist_dist_2", "ddp") for repeat in range(2)),
    ]
    machine = {"processor": "Some(R) Processor", "cores": 2, "gpus": [], "commit": None,
               "versions": {"python": "3", "jax": None}}
    return {"command": "python -m benchmarks", "date": "2000-01-01", "machine": machine, "measurements": measurements,
            "settings": {"compile": "on", "repeats": 3}}


def test_seconds_are_per_epoch_of_60000_images(record: dict[str, Any]) -> None:
    report = module("report")
    assert report.values(record, "mnist_dist", 1) == {0: 10.0}
    assert report.spread(list(report.values(record, "mnist_dist", 200).values())) == (0.2, 0.1, 0.4)


def test_the_report_names_the_processor_and_its_libraries(record: dict[str, Any]) -> None:
    assert "GFLOP/s" not in module("report").markdown(record), "a file of an earlier version"
    record["machine"] |= {"family": ["AuthenticAMD", 26], "vector_instructions": ["avx2", "avx512f"],
                          "gflops": {"MKL": 121.4, "oneDNN": 1390.0}}
    assert ("The processor: AuthenticAMD, family 26, avx2 avx512f. Its float32 products of 1,000 x 784 by 784 x 256, "
            "GFLOP/s: MKL 121, oneDNN 1,390.") in module("report").markdown(record).splitlines()


def test_each_library_multiplies_the_same() -> None:
    products = module("products")
    five = products.step_products(7, torch.device("cpu"))
    assert sum(2 * one.multiplications for one in five) == 7 * flop_per_sample((784, 256, 10))
    for one, library in itertools.product(five, products.libraries()):
        one.result_MN.zero_()
        returned = one.by(library)()
        torch.testing.assert_close(returned if library == "oneDNN" else one.result_MN, one.left_MK @ one.right_NK.t())


def test_the_entry_of_a_processor_is_where_a_step_is_faster_from() -> None:
    def step(kind: str, multiplications: int, mkl: float, onednn: float) -> dict[str, Any]:
        return {"kind": kind, "multiplications": multiplications,
                "seconds": {"MKL": (9, mkl, 9), "oneDNN": (9, onednn, 9)}}

    steps = [step("plain", 1, 2, 1), step("plain", 2, 1, 1), step("plain", 5, 3, 2), step("plain", 9, 5, 4),
             step("compiled", 1, 2, 1), step("compiled", 9, 2, 2)]
    assert module("products").least(steps) == {"plain": 5}


def test_ratios_are_paired_by_repeat(record: dict[str, Any]) -> None:
    report = module("report")
    # 0.4 / 0.2, 0.5 / 0.1, 0.6 / 0.4: not the ratio of the medians, 2.5
    assert report.ratios(record, "pytorch", "mnist_dist", 200) == pytest.approx((2.0, 1.5, 5.0))
    assert report.ratios(record, "tutorial", "mnist_dist", 200) == pytest.approx((4.0, 4.0, 4.0))  # of one repeat
    assert report.ratios(record, "sklearn", "mnist_dist", 200) is None


def test_the_report_says_what_is_missing_and_what_failed(record: dict[str, Any]) -> None:
    lines = module("report").markdown(record).splitlines()
    assert "| **mnist-dist train** | 10.0 (10.0 to 10.0) | 0.200 (0.100 to 0.400) |" in lines
    assert any(line.startswith("| scikit-learn") and line.endswith("| not installed | not installed |")
               for line in lines)
    assert '- sklearn: not installed: sklearn; pip install -e ".[benchmarks]"' in lines
    assert "- tutorial at batch 200 failed in repeat 2: ValueError: no" in lines
    assert "| hand-written PyTorch, tensors in memory | - | 2.00 (1.50 to 5.00) |" in lines
    assert any(line.startswith("| 200 | 0.0500") and line.endswith("| 2.00 (1.00 to 4.00) |") for line in lines)
    # warm-up: the first process apart from the later ones
    assert "| hand-written PyTorch, tensors in memory | 10.0 | 4.17 (3.33 to 5.00) |" in lines
    assert "| hand-written DistributedDataParallel | 0.300 (0.300 to 0.300) |" in lines


def test_a_row_on_another_device_says_so(record: dict[str, Any]) -> None:
    for one in record["measurements"]:
        if one["row"] in ("mnist_dist", "pytorch"):
            one["device"] = "cuda"
    title = module("report").title
    assert title(record, "tutorial") == "the 2019 tutorial's loop"  # mnist_dist_2 is on the CPU here
    record["measurements"] = [one for one in record["measurements"] if one["row"] != "mnist_dist_2"]
    assert title(record, "tutorial") == "the 2019 tutorial's loop (on the cpu)"
    assert title(record, "pytorch") == "hand-written PyTorch, tensors in memory"


def test_report_is_drawn_again_from_its_json_without_torch(record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(json.dumps(record))
    code = ("import sys; sys.modules['torch'] = None; from benchmarks.__main__ import main; "
            "sys.exit(main(['--report', 'some.json']))")
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], cwd=tmp_path,
                   check=True, capture_output=True)
    assert (tmp_path / "some.md").read_text().startswith("# Training speed on Some(R) Processor, 2 cores")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


def test_labels_are_moved_apart_and_no_further() -> None:
    spread_apart = module("picture").spread_apart
    assert spread_apart([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9]
    moved = spread_apart([0.1, 0.5, 0.5, 0.51, 0.9], 0.06)
    assert all(above - below > 0.06 - 1e-9 for below, above in itertools.pairwise(moved))
    assert statistics.mean(moved[1:4]) == pytest.approx((0.5 + 0.5 + 0.51) / 3)
    assert (moved[0], moved[-1]) == (0.1, 0.9)


def test_every_cell_is_measured_in_every_repeat_in_an_order_that_changes() -> None:
    rows = module("rows")
    order = rows.schedule(rows.ROWS, rows.BATCH_SIZES, 5)
    cells = [(row.name, size) for row in rows.ROWS for size in rows.BATCH_SIZES[row.processes]]
    per_repeat = [[(row.name, size) for at, row, size in order if at == repeat] for repeat in range(5)]
    assert all(sorted(found) == sorted(cells) for found in per_repeat)
    assert len({tuple(found) for found in per_repeat}) == 5
    assert order == rows.schedule(rows.ROWS, rows.BATCH_SIZES, 5)
    sizes = [size for at, row, size in order if at == 0 and row.processes == 1]
    assert sizes == sorted(sizes)  # rows of a batch size take turns


def test_what_is_missing_or_failed_is_not_tried_again_and_the_others_go_on() -> None:
    rows = module("rows")
    chosen = [rows.BY_NAME[name] for name in ("sklearn", "tutorial", "pytorch")]
    status = {"sklearn": "missing", "tutorial": "failed", "pytorch": "ok"}
    kept: list[dict[str, Any]] = []
    module("measure").run_all(
        rows.schedule(chosen, {1: (1, 200)}, 3),
        lambda row, size: {"status": status[row.name], "note": "", "wall_seconds": 1.0}, kept.append, lambda text: None,
    )
    counts = {row.name: sum(one["row"] == row.name for one in kept) for row in chosen}
    assert counts == {"sklearn": 1, "tutorial": 2, "pytorch": 6}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A few images, given as a flat folder of packed files, as torchvision wants them."""
    flat = write_idx_folder(tmp_path_factory.mktemp("flat"), 300, 20, zipped=True)
    return module("measure").torchvision_root(str(flat), tmp_path_factory.mktemp("root"))


def assert_line(line: dict[str, Any], samples: int, device: str) -> None:
    """The line has what the harness reads."""
    assert (line["samples"], line["device"]) == (samples, device)
    assert line["seconds"] > 0 and line["warmup_seconds"] > 0
    assert len(line["version"].split()) == 2


@pytest.mark.long
def test_a_peer_in_a_process_of_its_own(data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, measure = module("rows"), module("measure")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    outcome = measure.measure(rows.BY_NAME["plain_accelerate"], data_dir, 32, 200, "off", tmp_path)
    assert outcome["status"] == "ok", outcome
    assert_line(outcome, 200, "cpu")


def test_a_library_that_is_missing_becomes_a_row_that_says_so(data_dir: str, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    rows, measure = module("rows"), module("measure")
    (tmp_path / "jax.py").write_text("raise ModuleNotFoundError(\"No module named 'jax'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = measure.measure(rows.BY_NAME["jax_scan"], data_dir, 32, 200, "off", tmp_path)
    assert (outcome["status"], outcome["note"]) == ("missing", "not installed: jax")


@pytest.mark.parametrize(("name", "library"), [
    ("peers.tutorial", None), ("peers.pytorch", None), ("limit", None), ("peers.sklearn", "sklearn"),
    pytest.param("peers.jax_scan", "jax", marks=pytest.mark.long),
])
def test_a_cheap_row(name: str, library: str | None, data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library:
        pytest.importorskip(library)
    monkeypatch.setattr(module("products"), "TURNS", 1)
    monkeypatch.setattr(module("products"), "PAUSE_SECONDS", 0.0)
    line = module(name).main(data_dir, 64, 200)  # the last batch is smaller
    assert_line(line, 200, "cpu" if library == "sklearn" else DEVICE)


@pytest.mark.cuda
@pytest.mark.parametrize(("name", "numbers"), [("peers.pytorch_graph", ()), ("peers.pytorch_compiled", (1, 1)),
                                               ("limit", ())])
def test_a_row_on_a_gpu(name: str, numbers: tuple[int, ...], data_dir: str) -> None:
    line = module(name).main(data_dir, 64, 200, *numbers)
    assert_line(line, 200, "cuda")


def test_rows_that_need_a_gpu_are_left_out_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main, measured = module("__main__"), []
    monkeypatch.setattr(module("measure"), "torchvision_root", lambda data_dir, folder: str(folder))
    monkeypatch.setattr(module("measure"), "run_all", lambda order, *others: measured.extend(order))
    for gpus in ([], ["H100"]):
        monkeypatch.setattr(module("machine"), "describe", lambda gpus=gpus: {"gpus": gpus, "processor": "x"})
        main.run(main.parser().parse_args(["--output", str(tmp_path / "x")]), [], tmp_path)
        names = {row.name for _, row, _ in measured}
        assert ("pytorch_graph" in names) == ("pytorch_autotune" in names) == bool(gpus) and "pytorch" in names


def test_lightning(data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    assert_line(module("peers.lightning").main(data_dir, 64, 200), 200, DEVICE)
    assert not list(tmp_path.iterdir())


def test_no_rate_over_images_that_are_not_there(data_dir: str) -> None:
    for name in ("peers.tutorial", "peers.pytorch"):
        with pytest.raises(ValueError, match="asked to train on 301 images, and there are 300"):
            module(name).main(data_dir, 64, 301)


def test_compiled_steps_are_adams(data_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written-out step, not compiled here, leaves the weights that PyTorch's own Adam leaves."""
    import torch
    from torch import nn

    common = module("peers.common")
    models: list[nn.Sequential] = []

    def network() -> nn.Sequential:
        torch.manual_seed(1)  # also makes the permutations that follow the same
        models.append(original())
        return models[-1]

    original = common.network
    monkeypatch.setattr(torch, "compile", lambda **options: lambda function: function)
    for name, more in (("pytorch", ()), ("pytorch_compiled", (1,)), ("pytorch_compiled", (4,))):
        monkeypatch.setattr(module(f"peers.{name}"), "network", network)
        module(f"peers.{name}").main(data_dir, 32, 300, *more)
    wanted, *others = models
    for other in others:
        for a, b in zip(wanted.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)
