"""One short file per way of training the same model, as its users write it: `python -m benchmarks.peers.NAME`."""
