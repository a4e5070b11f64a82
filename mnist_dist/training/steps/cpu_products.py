"""Matrix products by oneDNN, for the processors on which PyTorch's MKL takes a slow path.

MKL asks for the maker of the processor, and uses AVX-512 on Intel's alone: on an AMD EPYC of the Zen 5 generation a
float32 product takes twice as long as oneDNN's (docs/performance.md). Which library multiplies follows from the
processor and the sizes of the product, never from a clock: the bits of a run depend on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from mnist_dist.record.environment import processor_family

# By the maker and the family of the processor, the least multiplications of a product from which a step with oneDNN is
# faster than with MKL: `python -m benchmarks.products` prints the entry of the machine on which it runs.
ONEDNN_FROM: dict[tuple[str, int] | None, dict[str, int]] = {
    # Zen 5: from 64 and from 24 samples on; benchmarks/results/products-zen5.json
    ("AuthenticAMD", 26): {"plain": 12_845_056, "compiled": 4_816_896},
}


def onednn_from(kind: str, family: tuple[str, int] | None = None) -> int | None:
    """The least multiplications of a product that oneDNN computes in this kind of step, on a processor of this family
    (default: this machine's). None if MKL computes all.
    """
    return ONEDNN_FROM.get(family or processor_family(), {}).get(kind) if has_onednn() else None


def has_onednn() -> bool:
    """Whether this PyTorch has the operator that `product` calls."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(left_MK: Tensor, right_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """left x right^T + bias [M, N], by oneDNN. Transposed views are read as they are."""
    return torch.ops.mkldnn._linear_pointwise.default(left_MK, right_NK, bias_N, "none", [], "")


class _Linear(Function):
    """A linear layer and its gradients, by oneDNN."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(x_BI, weight_OI)
        return product(x_BI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, gradient_BO: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x_BI, weight_OI = ctx.saved_tensors
        of_x = product(gradient_BO, weight_OI.t()) if ctx.needs_input_grad[0] else None
        return of_x, product(gradient_BO.t(), x_BI.t()), gradient_BO.sum(0)


def linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor, *, least: int) -> Tensor:
    """As PyTorch's function of this name, [B, O]; by oneDNN if the product has at least `least` multiplications. Each
    of the three products of a layer has the same number of them.
    """
    # of a function that is compiled, the pass over its graph replaces the products (steps/graph_pass.py)
    is_large = len(x_BI) * weight_OI.numel() >= least and not torch.compiler.is_compiling()
    return _Linear.apply(x_BI, weight_OI, bias_O) if is_large else torch.nn.functional.linear(x_BI, weight_OI, bias_O)
