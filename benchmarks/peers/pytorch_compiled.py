"""PyTorch with the whole step compiled as one function: gather from uint8, scale, forward, gradients, Adam in place.

A fourth argument is the number of steps per call of the compiled function; a call costs some microseconds. A fifth one
of 1 asks for mode="max-autotune", which on a GPU also records CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy

from benchmarks.peers.common import bytes_in_memory, network, pick_device, start, timed


def main(data_dir: str, batch_size: int, num_samples: int, steps_per_call: int = 1, autotune: int = 0
         ) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    device = pick_device()
    images, labels = (tensor.to(device) for tensor in bytes_in_memory(data_dir, num_samples))
    model = network().to(device)
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    means, squares = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
    count = torch.zeros((), device=device)
    if autotune:
        for tensor in (images, labels, count, *params.values(), *means.values(), *squares.values()):
            torch._dynamo.mark_static_address(tensor)  # or a graph could not change them in place

    def loss_of(params: dict[str, Tensor], rows: Tensor) -> Tensor:
        scaled = images[rows].float() / 127.5 - 1.0
        return cross_entropy(functional_call(model, params, (scaled,)), labels[rows])

    def step(rows: Tensor) -> Tensor:
        gradients, loss = grad_and_value(loss_of)(params, rows)
        count.add_(1)
        mean_scale, square_scale = 1.0 - 0.9**count, 1.0 - 0.999**count
        for name, gradient in gradients.items():
            means[name].lerp_(gradient, 0.1)
            squares[name].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            deviation = (squares[name] / square_scale).sqrt() + 1e-8
            params[name].sub_(1e-4 * (means[name] / mean_scale) / deviation)
        return loss

    @torch.compile(dynamic=False, fullgraph=True, mode="max-autotune" if autotune else None)
    def steps(rows_KB: Tensor) -> Tensor:
        return torch.stack([step(rows) for rows in rows_KB.unbind()])

    whole = num_samples // batch_size * batch_size

    @torch.no_grad()
    def epoch() -> None:
        order = torch.randperm(num_samples, device=device)
        for rows_KB in order[:whole].view(-1, batch_size).split(steps_per_call):
            steps(rows_KB)
        if whole < num_samples:  # the last batch is smaller: a shape of its own, compiled in the first epoch
            steps(order[whole:].unsqueeze(0))

    return timed(epoch, num_samples, f"torch {torch.__version__}", device.type)


if __name__ == "__main__":
    start(main)
