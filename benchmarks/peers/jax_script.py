"""A script as a person writes it in JAX: an epoch is one compiled function, a `lax.scan` over its batches.

    python benchmarks/peers/jax_script.py DATA_DIR [EPOCHS [BATCH_SIZE]]

It stands alone, so that its start is that of such a script; `jax_scan` times an epoch of it. DATA_DIR holds MNIST/raw,
as torchvision has it. `pip install jax` runs on the CPU; on an NVIDIA GPU it needs `pip install "jax[cuda12]"`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def init(key: Array) -> tuple:
    """Weights and biases as torch.nn.Linear draws them, Adam's two moments, and the number of steps."""
    params = []
    for fan_in, fan_out in ((784, 256), (256, 10)):
        key, *keys = jax.random.split(key, 3)
        bound = fan_in**-0.5
        params.append(jax.random.uniform(keys[0], (fan_in, fan_out), minval=-bound, maxval=bound))
        params.append(jax.random.uniform(keys[1], (fan_out,), minval=-bound, maxval=bound))
    return params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.float32(0)


def logits_of(params: list[Array], images: Array) -> Array:
    """The model, from uint8 images."""
    w1, b1, w2, b2 = params
    return jax.nn.leaky_relu((images.astype(jnp.float32) / 127.5 - 1.0) @ w1 + b1, 0.1) @ w2 + b2


def loss_of(params: list[Array], images: Array, labels: Array) -> Array:
    """Mean cross-entropy of a batch of uint8 images."""
    log_probs = jax.nn.log_softmax(logits_of(params, images))
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


@jax.jit
def test(state: tuple, images: Array, labels: Array) -> tuple[Array, Array]:
    """The mean NLL and the accuracy over these images."""
    return loss_of(state[0], images, labels), (logits_of(state[0], images).argmax(axis=1) == labels).mean()


def main(data_dir: str, epochs: int, batch_size: int) -> None:
    """Train, print a line for each epoch, save the weights."""
    raw = Path(data_dir, "MNIST", "raw")
    arrays = []
    for name in ("train", "t10k"):
        images = np.fromfile(raw / f"{name}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 784)
        labels = np.fromfile(raw / f"{name}-labels-idx1-ubyte", np.uint8)[8:].astype(np.int32)
        arrays.append((jnp.asarray(images), jnp.asarray(labels)))
    state, key = init(jax.random.key(0)), jax.random.key(1)
    for epoch in range(epochs):
        key, epoch_key = jax.random.split(key)
        state, _ = train_epoch(state, epoch_key, *arrays[0], batch_size)
        nll, accuracy = test(state, *arrays[1])
        print(f"epoch {epoch} test NLL {nll:.5f} accuracy {accuracy:.4f}", flush=True)
    np.savez("model.npz", *state[0])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, [*sys.argv[2:], "20", "200"][:2]))
