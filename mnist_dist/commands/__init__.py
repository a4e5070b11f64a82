"""The commands beside `train`, each in one module."""
