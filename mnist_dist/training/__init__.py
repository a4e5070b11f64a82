"""Training: from a config to a run. Start reading at `run`."""
