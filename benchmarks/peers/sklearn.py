"""scikit-learn's MLPClassifier. `partial_fit` is one epoch, with Adam's moments kept; it has no LeakyReLU: ReLU here.

It runs on the CPU alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sklearn
from sklearn.neural_network import MLPClassifier

from benchmarks.peers.common import floats_in_memory, start, timed


def main(data_dir: str, batch_size: int, num_samples: int) -> dict[str, Any]:
    """Train two epochs; the peer's line."""
    images, labels = (tensor.numpy() for tensor in floats_in_memory(data_dir, num_samples))
    classifier = MLPClassifier(
        hidden_layer_sizes=(256,), activation="relu", solver="adam", learning_rate_init=1e-4, alpha=0.0,
        batch_size=min(batch_size, num_samples), shuffle=True,
    )

    def epoch() -> None:
        classifier.partial_fit(images, labels, classes=np.arange(10))

    return timed(epoch, num_samples, f"scikit-learn {sklearn.__version__}", "cpu")


if __name__ == "__main__":
    start(main)
