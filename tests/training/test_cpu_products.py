"""Products by oneDNN: right, chosen by a rule that no clock has a part in, and kept by a run that is continued."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from forked import run_forked
from safetensors.torch import load_file
from support import result_of
from torch.nn import functional

from mnist_dist.config import TrainConfig
from mnist_dist.record.environment import processor_family
from mnist_dist.training.steps import cpu_products
from mnist_dist.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not cpu_products.has_onednn(), reason="this PyTorch has no oneDNN")
LINEAR = "layers.1.weight"


@pytest.fixture
def always(monkeypatch):
    """Every product is oneDNN's."""
    monkeypatch.setattr(cpu_products, "ONEDNN_FROM", {processor_family(): {"plain": 1, "compiled": 2}})


@pytest.mark.parametrize("transposed", [(False, False), (True, True), (False, True), (True, False)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (200, 256, 784), (7, 10, 3), (97, 31, 784), (256, 784, 97)])
def test_a_product_with_transposed_views(sizes, transposed):
    m, n, k = sizes
    torch.manual_seed(0)
    left_MK, right_NK = (torch.randn(k, rows).t() if swap else torch.randn(rows, k)
                         for rows, swap in zip((m, n), transposed, strict=True))
    bias_N = torch.randn(n)
    wanted = left_MK.double() @ right_NK.double().t()
    torch.testing.assert_close(cpu_products.product(left_MK, right_NK), wanted.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cpu_products.product(left_MK, right_NK, bias_N), (wanted + bias_N).float(), rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("sizes", [(97, 784, 256), (31, 256, 10), (1, 784, 256)])
@pytest.mark.parametrize("input_has_gradient", [True, False])
def test_a_layer_and_its_gradients(sizes, input_has_gradient):
    batch, inputs, outputs = sizes
    torch.manual_seed(0)
    x, weight, bias = torch.randn(batch, inputs), torch.randn(outputs, inputs) / 100, torch.randn(outputs)
    gradients = []
    for function in (lambda *of: cpu_products.linear(*of, least=1), functional.linear):
        of = [x.clone().requires_grad_(input_has_gradient), *(each.clone().requires_grad_() for each in (weight, bias))]
        function(*of).square().sum().backward()
        gradients.append([each.grad for each in of if each.requires_grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_small_products_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(cpu_products, "product", None)
    x, weight, bias = torch.randn(9, 784), torch.randn(10, 784), torch.randn(10)
    least = 9 * 784 * 10
    assert torch.equal(cpu_products.linear(x, weight, bias, least=least + 1), functional.linear(x, weight, bias))
    with pytest.raises(TypeError):
        cpu_products.linear(x, weight, bias, least=least)


def test_the_rule_is_a_table_of_processors(monkeypatch):
    for kind, least in cpu_products.ONEDNN_FROM["AuthenticAMD", 26].items():
        assert cpu_products.onednn_from(kind, ("AuthenticAMD", 26)) == least > 0
    for family in (("GenuineIntel", 6), ("Another", 1)):
        assert cpu_products.onednn_from("plain", family) is None
    monkeypatch.setattr(cpu_products, "processor_family", lambda: None)
    assert cpu_products.onednn_from("plain") is None, "the system does not tell"
    monkeypatch.setattr(cpu_products, "has_onednn", lambda: False)
    assert cpu_products.onednn_from("plain", ("AuthenticAMD", 26)) is None


def chosen(before=None, *, device="cpu", precision="no", others_can=True, kind="plain", **options):
    config = TrainConfig(**options)
    team = SimpleNamespace(device=torch.device(device), accelerator=SimpleNamespace(mixed_precision=precision),
                           run_on=lambda where, task: task(), share=lambda mine: [mine, others_can])
    trainer = SimpleNamespace(team=team, config=config, dtype=getattr(torch, config.dtype), kind=kind)
    return Trainer._products(trainer, before)


def test_who_takes_it(always):
    assert chosen() == 1 and chosen(kind="compiled") == 2
    assert chosen(dtype="float64") is chosen(reproducible=True) is chosen(precision="bf16") is None
    assert chosen(device="cuda") is None
    assert chosen(others_can=False) is None, "all ranks, or none"


@pytest.mark.parametrize(("before", "wanted"), [({"onednn_from": 7}, 7), ({"onednn_from": None}, None), ({}, None),
                                                ({"onednn_from": "x"}, None)])
def test_a_continued_run_keeps_what_it_had(before, wanted, always):
    """A checkpoint of an earlier version has no entry: then no product was oneDNN's."""
    assert chosen(before) == wanted


def trained(folder, data_dir, name, *words, least=1, size=1):
    done = run_forked([least, "train", "--data-dir", data_dir, "--batch-size", 97, "--lr", "1e-3", "--wandb",
                       "disabled", "--output-dir", name, *words], cwd=folder, size=size, target="onednn_worker:main")
    assert done.returncode == 0, done.stderr
    return load_file(folder / name / "model.safetensors")[LINEAR], result_of(folder / name)


@pytest.mark.parametrize("compile", ["off", pytest.param("on", marks=pytest.mark.faults)])
def test_the_same_bits_twice_and_cut_and_continued(compile, small_dir, tmp_path):
    words = ["--compile", compile]
    whole, result = trained(tmp_path, small_dir, "whole", "--epochs", 2, *words)
    assert result["environment"]["onednn_from"] == 1
    assert torch.equal(whole, trained(tmp_path, small_dir, "again", "--epochs", 2, *words)[0])
    trained(tmp_path, small_dir, "cut", "--max-steps", 17, "--checkpoint-every", "5steps", *words)
    # on another processor
    assert torch.equal(whole, trained(tmp_path, small_dir, "cut", "--epochs", 2, "--resume", *words, least="never")[0])
    other, result = trained(tmp_path, small_dir, "other", "--epochs", 2, *words, least="never")
    assert result["environment"]["onednn_from"] is None
    assert torch.allclose(whole, other, atol=2e-3)  # float32: rounding, amplified by Adam


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_processes_change_nothing_but_rounding(size, small_dir, tmp_path):
    (_, alone), (_, together) = (trained(tmp_path, small_dir, f"{count}", "--epochs", 2, size=count)
                                 for count in (1, size))
    assert alone["environment"]["onednn_from"] == together["environment"]["onednn_from"] == 1
    for ours, theirs in zip(together["epochs"], alone["epochs"], strict=True):
        assert ours["test_nll_sum"] == pytest.approx(theirs["test_nll_sum"], rel=1e-4)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


def test_the_noise_scale_is_measured_as_before(small_dir, tmp_path):
    words = ["--batch-size", 10, "--lr", 1e-4, "--noise-scale", "--epochs", 2]
    (_, ours), (_, theirs) = (trained(tmp_path, small_dir, f"{least}", *words, least=least) for least in (1, "never"))
    for name in ("noise_scale", "noise_scale_low", "noise_scale_high"):
        assert ours["epochs"][0][name] == pytest.approx(theirs["epochs"][0][name], rel=0.01) and ours["epochs"][0][name]
