"""Sums without an order, so that their bits are the same on any number of ranks and on any processor.

Floating-point sums depend on their order, and each kernel has its own. Here both factors of a matrix product are first
rounded to whole numbers of few bits. Then every product and every sum of them is exact in float64 (pre-rounding: Ozaki
et al. 2012, doi 10.1007/s11075-011-9478-1; Demmel and Nguyen 2015, doi 10.1109/TC.2014.2345391). What is exact has no
order. All else is single additions, multiplications, divisions and square roots, each element by itself, which IEEE 754
defines to the last bit; exp and log are made of those too. Two operations of torch are not exact: a division by a
Python number, which is a product with the reciprocal on a GPU, and `sqrt` on the CPU. It knows nothing of ranks.

Shapes: B samples, T terms of a sum, K parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EXACT_BITS = 53  # whole numbers up to 2^53 are exact in float64
KEPT_BITS = {torch.float32: 22, torch.float64: 53}  # of a number, next to the largest of its sum; or more
SMALLEST = -700.0  # exp of less rounds to 0
LN2 = math.log(2.0)
# Taylor series of exp up to |r| = ln(2) / 2, and of artanh(s) / s in s^2 up to |s| = 0.172: to a float64's last bits
EXP_SERIES = [1 / math.factorial(n) for n in range(14, -1, -1)]
ARTANH_SERIES = [1 / (2 * n + 1) for n in range(11, -1, -1)]


class Whole(NamedTuple):
    """A matrix as whole numbers: the sum over i of parts[i] * 2^-(shift + i * bits), rounded there."""

    parts: Tensor  # float64 [K, rows, columns], whole numbers of `bits` bits and a sign
    shift: Tensor  # int64, 1 along the dimension that is summed
    bits: int

    @property
    def mT(self) -> Whole:
        """Transposed."""
        return Whole(self.parts.mT, self.shift.mT, self.bits)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly: `torch.ldexp` takes a power, and rounds. Kept to what float64 can hold."""
    return (exponent.to(torch.int64).clamp(-1022, 1023) + 1023 << 52).view(torch.float64)


def largest(x: Tensor, dim: int) -> Tensor:
    """The largest magnitude along `dim`, kept as 1; 0 of no elements."""
    return x.abs().amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(1, x.shape[1])


def whole(x: Tensor, peak: Tensor, bits: int, kept: int) -> Whole:
    """`x` in parts of `bits` bits, as many as keep `kept` bits; `peak` has the largest magnitude of each sum."""
    shift = bits - torch.frexp(peak).exponent.to(torch.int64)
    rest = x.to(torch.float64) * power_of_two(shift)
    parts = rest.round().unsqueeze(0)
    for _ in range(-(-kept // bits) - 1):
        rest = (rest - parts[-1]).mul_(2.0**bits)
        parts = torch.cat([parts, rest.round().unsqueeze(0)])
    return Whole(parts, shift, bits)


def bits_for(terms: int, other: int | None = None) -> int:
    """Bits of a factor in a sum of `terms` products, if the other factor has `other` bits (default: the same)."""
    free = EXACT_BITS - max(terms - 1, 0).bit_length()
    return free // 2 if other is None else free - other


def _pairs(a: Whole, b: Whole) -> list[tuple[int, int]]:
    """The parts to multiply, the smallest products first; what is below the last part's bits is left out."""
    lengths = len(a.parts), len(b.parts)
    pairs = [(i, j) for i in range(lengths[0]) for j in range(lengths[1]) if i + j < max(lengths)]
    return sorted(pairs, key=sum, reverse=True)


def products(a: Whole, b: Whole) -> Tensor:
    """The exact products [pairs, rows, columns] of the parts of [rows, T] and [T, columns], still whole numbers."""
    products = [a.parts[i] @ b.parts[j] for i, j in _pairs(a, b)]
    return torch.stack(products) if len(products) > 1 else products[0].unsqueeze(0)


def value(products: Tensor, a: Whole, b: Whole) -> Tensor:
    """The matrix product, in float64, from what `products` gave, summed over ranks or not."""
    total: Tensor | None = None
    for product, (i, j) in zip(products, _pairs(a, b), strict=True):
        term = product * power_of_two(-(a.shift + b.shift + (i * a.bits + j * b.bits)))
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def sqrt_(x: Tensor) -> Tensor:
    """The square root, in place, rounded as IEEE 754 wants. On the CPU torch calls MKL, whose last bit is often wrong
    and differs between makes of processor. numpy and a GPU take the processor's instruction.
    """
    if x.device.type != "cpu":
        return x.sqrt_()
    np.sqrt(x.numpy(), out=x.numpy())
    return x


def exp(x: Tensor) -> Tensor:
    """e^x of float64 numbers up to 0."""
    x = x.clamp(min=SMALLEST)
    twos = (x * (1 / LN2)).round()
    rest = x - twos * LN2
    series = torch.full_like(rest, EXP_SERIES[0])
    for coefficient in EXP_SERIES[1:]:
        series.mul_(rest).add_(coefficient)
    return series * power_of_two(twos)


def log(x: Tensor) -> Tensor:
    """The natural logarithm of float64 numbers above 0."""
    mantissa, twos = torch.frexp(x)
    is_small = mantissa < math.sqrt(0.5)
    mantissa, twos = torch.where(is_small, 2 * mantissa, mantissa), twos - is_small.to(twos.dtype)
    ratio = (mantissa - 1) / (mantissa + 1)
    square = ratio * ratio
    series = torch.full_like(ratio, ARTANH_SERIES[0])
    for coefficient in ARTANH_SERIES[1:]:
        series.mul_(square).add_(coefficient)
    return (series * ratio).mul_(2.0) + twos.to(torch.float64) * LN2
