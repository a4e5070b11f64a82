"""JAX: an epoch is one compiled function, a `lax.scan` over its batches, uint8 images resident on the device.

`pip install jax` runs on the CPU; on an NVIDIA GPU it needs `pip install "jax[cuda12]"`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.peers.common import bytes_in_memory, pick_device, start, timed


def init(key: Array) -> tuple:
    """Weights and biases as torch.nn.Linear draws them, Adam's two moments, and the number of steps."""
    params = []
    for fan_in, fan_out in ((784, 256), (256, 10)):
        key, *keys = jax.random.split(key, 3)
        bound = fan_in**-0.5
        params.append(jax.random.uniform(keys[0], (fan_in, fan_out), minval=-bound, maxval=bound))
        params.append(jax.random.uniform(keys[1], (fan_out,), minval=-bound, maxval=bound))
    return params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.float32(0)


def loss_of(params: list[Array], images: Array, labels: Array) -> Array:
    """Mean cross-entropy of a batch of uint8 images."""
    w1, b1, w2, b2 = params
    hidden = jax.nn.leaky_relu((images.astype(jnp.float32) / 127.5 - 1.0) @ w1 + b1, 0.1)
    log_probs = jax.nn.log_softmax(hidden @ w2 + b2)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1).mean()


def adam(params: list[Array], gradients: list[Array], means: list[Array], squares: list[Array], count: Array) -> tuple:
    """One step of Adam."""
    count = count + 1
    means = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, means, gradients)
    squares = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, squares, gradients)
    mean_scale, square_scale = 1 - 0.9**count, 1 - 0.999**count
    params = jax.tree.map(lambda p, m, s: p - 1e-4 * (m / mean_scale) / (jnp.sqrt(s / square_scale) + 1e-8),
                          params, means, squares)
    return params, means, squares, count


@partial(jax.jit, static_argnames="batch_size", donate_argnums=0)
def train_epoch(state: tuple, key: Array, images: Array, labels: Array, batch_size: int) -> tuple[tuple, Array]:
    """All batches in a new order, the last of which may be smaller; the new state and the mean loss."""

    def step(state: tuple, rows: Array) -> tuple[tuple, Array]:
        params, means, squares, count = state
        loss, gradients = jax.value_and_grad(loss_of)(params, images[rows], labels[rows])
        return adam(params, gradients, means, squares, count), loss

    order = jax.random.permutation(key, len(labels))
    whole = len(labels) // batch_size * batch_size
    state, losses = jax.lax.scan(step, state, order[:whole].reshape(-1, batch_size))
    if whole < len(labels):
        state, loss = step(state, order[whole:])
        losses = jnp.append(losses, loss)
    return state, losses.mean()


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    if pick_device().type == "cpu":
        jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 on a GPU too, as PyTorch's default
    images, labels = (jnp.asarray(tensor.numpy()) for tensor in bytes_in_memory(data_dir, num_samples))
    key = jax.random.key(0)
    state = init(key)

    def epoch() -> None:
        nonlocal state, key
        key, own = jax.random.split(key)
        state, loss = train_epoch(state, own, images, labels, batch_size)
        loss.block_until_ready()

    outcome = timed(epoch, num_samples, f"jax {jax.__version__}", "cpu")
    return outcome | {"device": {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())}


if __name__ == "__main__":
    start(main)
