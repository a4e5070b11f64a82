"""Scaling studies: a grid of runs, each a separate launch, their table, the statistics and the report.

A study speaks to a training by its command line and its `result.json` only, so it can study any script that accepts
`--batch-size` and `--output-dir`. Nothing here imports torch. Read `run/study.py` first.
"""
