"""Sums over the test images: added in float64, gathered, and divided once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def batch_sums(log_probs_BC: Tensor, labels_B: Tensor) -> Tensor:
    """[NLL sum in nats, number correct, number of samples] of a batch, float64 [3], on the batch's device."""
    nll_B = -log_probs_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
    correct_B = log_probs_BC.argmax(dim=1) == labels_B
    count = torch.full((), len(labels_B), dtype=torch.float64, device=log_probs_BC.device)
    return torch.stack([nll_B.sum(dtype=torch.float64), correct_B.sum(dtype=torch.float64), count])


def metrics_of_test(sums_3: Sequence[float]) -> dict[str, Any]:
    """The metrics of the test from the sums over every test image once: this is the only division."""
    nll_sum, correct, count = sums_3
    return {
        "test_nll": nll_sum / count,
        "test_nll_sum": nll_sum,
        "test_accuracy": correct / count,
        "test_count": int(count),
    }


def add_in_order(rows_PX: Tensor) -> Tensor:
    """The sum [X] of a row from each of P ranks, added one after the other: on every rank the same."""
    total_X = rows_PX[0].clone()
    for row_X in rows_PX[1:]:
        total_X += row_X
    return total_X
