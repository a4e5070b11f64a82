"""JAX: an epoch is one compiled function, a `lax.scan` over its batches, uint8 images resident on the device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.peers.common import bytes_in_memory, pick_device, start, timed
from benchmarks.peers.jax_script import init, train_epoch


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
        key, epoch_key = jax.random.split(key)
        state, loss = train_epoch(state, epoch_key, images, labels, batch_size)
        loss.block_until_ready()

    outcome = timed(epoch, num_samples, f"jax {jax.__version__}", "cpu")
    return outcome | {"device": {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())}


if __name__ == "__main__":
    start(main)
