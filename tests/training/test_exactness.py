"""The number of processes changes the speed and nothing else: float64 weights and figures at 1 to 4 processes."""

from __future__ import annotations

import json

import pytest
import torch
from forked import run_forked
from safetensors.torch import load_file
from support import mnist_dist, result_of
from torch.nn.functional import cross_entropy
from torch.utils.data import DistributedSampler

from mnist_dist.data import load, scale
from mnist_dist.training.model import MLP
from mnist_dist.training.steps.reproducible import draw_weights

BATCHES = (1, 96, 200, 1009, 5000)
CASES = {
    f"n{images}-b{batch}-a{passes}": {
        "images": images, "batch_size": batch, "gradient_accumulation_steps": passes, "dtype": "float64",
    }
    for images, batch in [*((1009, batch) for batch in BATCHES), (401, 7), (401, 96), (400, 200), (211, 30)]
    for passes in (1, 3)
    # one sample at a time has its own, shorter case
    if not (batch == 1 and images == 1009) and (passes == 1 or (images, batch) not in ((1009, 200), (401, 96)))
}
CASES |= {f"n97-b1-a{passes}": {"images": 97, "batch_size": 1, "gradient_accumulation_steps": passes,
                               "dtype": "float64"} for passes in (1, 3)}
# the step as compiled functions: sizes that do not divide, one sample at a time, and passes
COMPILED = {f"n{images}-b{batch}-a{passes}-compiled": {
    "images": images, "batch_size": batch, "gradient_accumulation_steps": passes, "dtype": "float64", "compile": "on"}
    for images, batch, passes in ((401, 96, 1), (211, 30, 3), (97, 1, 1))}
# several processes compile the same functions with passes and without: once is enough
ALONE = "n401-b96-a1-compiled"
NAMES = [*CASES, *(pytest.param(name, marks=pytest.mark.long) for name in COMPILED)]
EXACT = {f"exact-{dtype}": {"images": 401, "batch_size": 50, "reproducible": True, "dtype": dtype}
           for dtype in ("float32", "float64")}


def runs_on(name, size):
    """A batch smaller than the processes is refused: test_cli.py. Passes on three processes: the smaller sets alone."""
    case = {**CASES, **COMPILED}[name]
    is_long = case["images"] == 1009 and case["gradient_accumulation_steps"] == 3
    return case["batch_size"] >= size and (size == 1 or name != ALONE) and not (size == 3 and is_long)


@pytest.fixture(scope="module")
def outcomes(small_dir, tmp_path_factory):
    """What each case of the plain and the exact step came to, as `run_all` returns it."""
    return run_all({**CASES, **EXACT}, small_dir, tmp_path_factory)


@pytest.fixture(scope="module")
def compiled(small_dir, tmp_path_factory):
    """The same of the compiled step."""
    return run_all(COMPILED, small_dir, tmp_path_factory)


def run_all(wanted, small_dir, tmp_path_factory):
    """What each case came to, by number of processes: {size: (folder of weights, {case: figures})}."""
    found = {}
    for size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"processes{size}")
        cases = {name: options for name, options in wanted.items() if name in EXACT or runs_on(name, size)}
        done = run_forked([small_dir, folder, json.dumps(cases)], cwd=folder, size=size,
                          target="exactness_worker:main", environment={"ACCELERATE_USE_CPU": "true"})
        assert done.returncode == 0, done.stderr
        found[size] = folder, {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}
        assert {metrics["processes"] for metrics in found[size][1].values()} == {size}
    return found


def outcomes_of(name, request):
    return request.getfixturevalue("compiled" if name in COMPILED else "outcomes")


def weights(outcomes, size, name):
    return load_file(outcomes[size][0] / f"{name}.safetensors")


def largest_difference(some, others):
    assert some.keys() == others.keys()
    return max((some[name] - others[name]).abs().max().item() for name in some)


def trained_by_hand(folder, images, batch, epochs=2, draw=lambda model: None):
    """The same training in the fewest lines of plain PyTorch."""
    sets = load("mnist", str(folder))
    torch.manual_seed(0)
    model = MLP()
    draw(model)
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = DistributedSampler(range(images), num_replicas=1, rank=0, seed=0)
    for epoch in range(epochs):
        order.set_epoch(epoch)
        for part in torch.tensor(list(order)).split(batch):
            loss = cross_entropy(model.layers(scale(sets.train.images[part], torch.float64)), sets.train.labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_one_process_is_plain_pytorch(name, request, small_dir):
    case, outcomes = {**CASES, **COMPILED}[name], outcomes_of(name, request)
    model = trained_by_hand(small_dir, case["images"], case["batch_size"])
    assert largest_difference(model.state_dict(), weights(outcomes, 1, name)) < 1e-10
    sets = load("mnist", str(small_dir))
    with torch.no_grad():
        nll = cross_entropy(model.layers(scale(sets.test.images, torch.float64)), sets.test.labels, reduction="sum")
    assert outcomes[1][1][name]["epochs"][-1]["test_nll_sum"] == pytest.approx(float(nll), rel=1e-10)


@pytest.mark.parametrize(("name", "size"), [
    pytest.param(name, size, marks=[pytest.mark.long] * (name in COMPILED))
    for name in (*CASES, *COMPILED) for size in (2, 3) if runs_on(name, size)])
def test_processes_change_nothing(name, size, request):
    outcomes = outcomes_of(name, request)
    alone, together = outcomes[1][1][name], outcomes[size][1][name]
    assert together["steps"] == alone["steps"]
    for ours, theirs in zip(together["epochs"], alone["epochs"], strict=True):
        assert ours["test_count"] == theirs["test_count"] == 211
        assert ours["test_accuracy"] == theirs["test_accuracy"]
        assert ours["test_nll_sum"] == pytest.approx(theirs["test_nll_sum"], rel=1e-10)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-10)
    assert largest_difference(weights(outcomes, size, name), weights(outcomes, 1, name)) < 1e-10


def test_learning_happened(outcomes):
    """Else agreement would prove little."""
    for name, metrics in outcomes[1][1].items():
        if metrics["steps"] > 10:
            assert metrics["epochs"][-1]["test_nll"] < 2.2, name


def test_reproducible_has_the_same_bits(outcomes):
    for name in EXACT:
        for size in (2, 3):
            assert largest_difference(weights(outcomes, 1, name), weights(outcomes, size, name)) == 0, (name, size)
            assert outcomes[1][1][name]["epochs"] == outcomes[size][1][name]["epochs"]


def test_reproducible_is_the_mean_over_the_batch(outcomes, small_dir):
    model = trained_by_hand(small_dir, 401, 50, draw=lambda model: draw_weights(model, 0))
    assert largest_difference(model.state_dict(), weights(outcomes, 1, "exact-float64")) < 1e-10


@pytest.mark.parametrize("sizes", [
    pytest.param({"float64": (1, 3), "float32": (3,)}, marks=pytest.mark.long, id="some"),
    pytest.param({"float64": (1, 2, 3, 4), "float32": (1, 3)}, marks=pytest.mark.faults, id="all")])
def test_mnist_on_one_to_four_processes(sizes, mnist_dir, tmp_path):
    """The real thing from the command line, three epochs."""
    results, states = {}, {}
    for dtype in sizes:
        for size in sizes[dtype]:
            folder = tmp_path / f"{dtype}-{size}"
            done = mnist_dist("train", "--processes", size, "--data-dir", mnist_dir, "--dtype", dtype, "--epochs", 3,
                              "--wandb", "disabled", "--output-dir", folder, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            results[dtype, size], states[dtype, size] = result_of(folder), load_file(folder / "model.safetensors")
    reference = results["float64", 1]["epochs"]
    for (dtype, size), result in results.items():
        nll_difference = max(abs(ours["test_nll"] / theirs["test_nll"] - 1)
                             for ours, theirs in zip(result["epochs"], reference, strict=True))
        weight_difference = largest_difference(
            {name: value.double() for name, value in states[dtype, size].items()}, states["float64", 1])
        print(f"{dtype}, {size} processes: {result['epochs'][-1]['step']} steps, test NLL within {nll_difference:.1e} "
              f"relative, weights within {weight_difference:.1e}")
        assert result["environment"]["num_processes"] == size
        assert [epoch["step"] for epoch in result["epochs"]] == [300, 600, 900]
        assert [epoch["test_count"] for epoch in result["epochs"]] == [10_000] * 3
        assert nll_difference < (1e-10 if dtype == "float64" else 1e-3)
        assert weight_difference < (1e-10 if dtype == "float64" else 1e-2)
