"""Do the tests that need no GPU find faults that only a GPU would show? Plants each in a copy and runs one test file.

    python tests/helpers/planted_faults.py [PART OF A NAME]

Prints a line for each fault; exit status 1 if one was not found. Takes some minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FAKE, TURNS = "tests/training/test_fake_cuda.py", "tests/training/test_gpu_in_turns.py"
FAILURES, HEARTBEAT = "tests/processes/test_failures.py", "tests/processes/test_heartbeat.py"


class Fault(NamedTuple):
    """Text of a file of the package, what it becomes, and the tests that must fail."""

    name: str
    file: str
    text: str
    becomes: str
    tests: str


FAULTS = (
    Fault("losses on the CPU", "training/trainer.py",
          "torch.zeros(3, self.batches.num_batches, dtype=torch.float64, device=team.device)",
          "torch.zeros(3, self.batches.num_batches, dtype=torch.float64)", FAKE),
    Fault("sums of the evaluation on the CPU", "training/trainer.py",
          "3, dtype=torch.float64, device=self.team.device)", "3, dtype=torch.float64)", FAKE),
    Fault("cursor on the CPU", "training/steps/cuda_graph.py", "torch.zeros(1, dtype=torch.int64, device=self.device)",
          "torch.zeros(1, dtype=torch.int64)", FAKE),
    Fault("indices on the CPU", "training/sampling.py",
          "torch.from_numpy(self.order()[begin[0] : end[-1]]).to(self.device)",
          "torch.from_numpy(self.order()[begin[0] : end[-1]])", FAKE),
    Fault("Adam is not fused", "training/trainer.py", "fused=True", "fused=False", FAKE),
    Fault(".item() in the plain step", "training/steps/plain.py", "+= loss.detach()", "+= loss.item()", FAKE),
    Fault(".item() in the recorded step", "training/steps/cuda_graph.py", "        self.sums[: len(total)].index_add_(",
          "        self.cursor.item()\n        self.sums[: len(total)].index_add_(", FAKE),
    Fault("a copy to the host in the exact step", "training/steps/reproducible.py",
          "        self.sums[0, step] += nll_sum(nll_B)", "        self.sums[0, step] += nll_sum(nll_B).item()", FAKE),
    Fault("step times of the host", "training/device_events.py", "before.elapsed_time(after) / 1000", "0.001", FAKE),
    Fault("the compiler's memory is the peak", "training/steps/cuda_graph.py",
          "        torch.cuda.reset_peak_memory_stats()", "        ", FAKE),
    Fault("one rank compiles first", "training/steps/__init__.py", "if not parts.team.is_cuda and not was_compiled:",
          "if True:", TURNS),
    Fault("one rank records", "training/steps/__init__.py", "                step.record()",
          "                parts.team.run_on('machine', step.record)", TURNS),
    Fault("a collective on one rank", "training/trainer.py", "total = self.team.sum(self.sums.clone())",
          "total = self.team.sum(self.sums.clone())\n        self.team.is_main and self.team.max(1.0)", TURNS),
    Fault("a graph is alive at the end", "training/steps/cuda_graph.py",
          "        self.team.before_end(self.graph.reset)", "        ", TURNS),
    Fault("CUDA waits without a time limit", "processes/team.py", "            self.wait_for(event)",
          "            torch.cuda.synchronize()", TURNS),
    Fault("who waits for the GPU does not look at the others", "processes/team.py",
          "if self.size == 1 or waited < ASK_SECONDS:", "if True:", HEARTBEAT),
    Fault("the same, with a rank killed", "processes/team.py", "if self.size == 1 or waited < ASK_SECONDS:", "if True:",
          TURNS),
    Fault("an own failure is named as a peer's", "processes/team.py", "self.others(self.heartbeats.look()):",
          "self.others(self.heartbeats.look() or range(self.size)):", FAILURES),
    Fault("no memory is a failed collective", "training/run.py", "except torch.OutOfMemoryError",
          "except ZeroDivisionError", FAILURES),
    Fault("half precision with --reproducible", "training/run.py", 'if wanted != "no" and config.reproducible:',
          "if False:", "tests/processes/test_launch_words.py"),
    Fault("the first agreements are too far apart", "training/pauses.py", "min(2 * self._poll_steps, ", "min(10**9, ",
          "tests/training/test_pauses.py"),
)


def is_found(fault: Fault, copy: Path) -> bool:
    """Plant it in the copy, and say whether its tests fail."""
    path = copy / "mnist_dist" / fault.file
    shutil.copy(ROOT / "mnist_dist" / fault.file, path)
    sound = path.read_text()
    path.write_text(sound.replace(fault.text, fault.becomes))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda", fault.tests]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=600)
    path.write_text(sound)
    assert done.returncode in (0, 1), f"{fault.tests}: {done.stdout[-500:]}{done.stderr[-500:]}"
    return done.returncode == 1


def main(part: str = "") -> int:
    """Plant the faults whose names have this part."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("mnist_dist", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("pyproject.toml", "train.py"):
            shutil.copy(ROOT / name, copy / name)
        results = []
        for fault in (fault for fault in FAULTS if part in fault.name):
            results.append(is_found(fault, copy))
            print(f"{'found' if results[-1] else 'NOT FOUND'}: {fault.name}", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
