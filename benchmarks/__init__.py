"""Peers and ours, side by side. `python -m benchmarks --help`."""
