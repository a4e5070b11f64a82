"""The report of a study: its sections, its pictures, and how it is sent to Weights & Biases."""
