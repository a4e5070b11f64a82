"""A training of some milliseconds, without torch, for tests of the study. `--trouble BATCH:KIND,…` makes runs fail."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int)
parser.add_argument("--output-dir", type=Path)
parser.add_argument("--trouble", default="")
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--lr")
parser.add_argument("--processes", type=int, default=int(os.environ.get("WORLD_SIZE", 1)))
given = parser.parse_args()
kind = dict(pair.split(":") for pair in given.trouble.split(",") if pair).get(str(given.batch_size))
with open(given.output_dir.parents[1] / "started.txt", "a") as file:
    file.write(f"{given.output_dir.name}\n")
if kind == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif kind == "memory":
    raise MemoryError("no room for the batch")
elif kind == "hang":
    time.sleep(600)
elif kind == "silent":
    sys.exit(0)
time.sleep(given.seconds)
result = {
    "status": "completed", "environment": {"num_processes": given.processes},
    "summary": {"global_batch_size": given.batch_size},
    "epochs": [{"measured_samples": 100 * given.batch_size, "measured_seconds": 0.5 + given.batch_size / 1000}],
}
if kind == "breach":
    del result["summary"], result["epochs"][0]["measured_seconds"]
if kind == "target":
    result["summary"]["targets"] = [{"target_nll": 0.3, "step": 5}]
if os.environ.get("RANK", "0") == "0":
    (given.output_dir / "result.json").write_text(json.dumps(result))
