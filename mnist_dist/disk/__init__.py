"""Files and locks in folders that may come from others. Needs no torch, and knows nothing of runs."""
