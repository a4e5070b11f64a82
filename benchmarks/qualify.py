"""`./launch/qualify.sh [OUTPUT]`: does this machine train as it should, and how fast? On its GPUs, else on its CPU.

Five parts, each a command of its own with a time limit: the machine, the tests that are for it, the benchmark beside
other libraries, the tutorial reproduced, and a small scaling study. Each leaves its result in OUTPUT as it ends, and
its outcome and what it printed in OUTPUT/parts; `OUTPUT/qualify.md` tells all. The same command again goes on with what
has not passed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.machine import describe
from mnist_dist import runner
from mnist_dist.disk.files import replace_json, replace_synced
from mnist_dist.errors import UserError
from mnist_dist.options import Parser
from mnist_dist.processes.launch_environment import child_environment, num_cores
from mnist_dist.record.gains import Gain, keep_gain
from mnist_dist.study.analysis.analysis import Analysis
from mnist_dist.study.plan.table import Row, read_table
from mnist_dist.tables import table

ROOT = Path(__file__).resolve().parents[1]
PAGE, OUTCOMES = "qualify.md", "parts"
GPU_MEMORY = "nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader"


class Part(NamedTuple):
    """A part: the words after `python`, and how many seconds it may take."""

    name: str
    title: str
    words: Sequence[object]
    limit: float


# With --short: what decides about the fused step.
SHORT = ["--rows", "mnist_dist,mnist_dist_fused,jax_scan,pytorch_graph", "--batch-sizes", "1,200,8192", "--repeats", 3]


def parts(output: Path, data_dir: str, gpus: int, is_short: bool = False) -> list[Part]:
    """The parts on a machine with this number of GPUs; 0 is its CPU."""
    processes = [count for count in (1, 2, 4, 8, 16) if count <= (gpus or min(2, num_cores()))]
    chosen = ["-m", "cuda and not long", "-n", min(4, num_cores()), "--dist", "load"] if gpus else ["-n", 2]
    tests = ROOT / "tests" / "training"
    options = ["--data-dir", data_dir, "--wandb", "disabled"]
    every = [
        Part("tests", "Tests", ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, tests,
                                f"--junitxml={output / 'tests.xml'}"], 400),
        Part("benchmark", "Benchmark", ["-m", "benchmarks", *(SHORT if is_short else ["--quick"]), "--data-dir",
                                        data_dir, "--output", output / "benchmark"], 300 if is_short else 900),
        Part("reproduce", "The tutorial", ["-m", "mnist_dist", "reproduce", *options, "--output-dir",
                                           output / "reproduce"], 400),
        Part("study", "Scaling study", ["-m", "mnist_dist", "study", *options, "--output-dir", output / "study",
                                        "--axis", "compile=on,off", "--epochs", 2, "--batch-sizes", "200,4000",
                                        "--processes", ",".join(map(str, processes)), "--repeats", 3], 900),
    ]
    return every[:2] if is_short else every


def carry_out(part: Part, output: Path) -> dict[str, Any]:
    """The part's outcome, which is also in OUTPUT; one that has passed is not done again."""
    kept = output / OUTCOMES / f"{part.name}.json"
    if (outcome := _kept(kept)) and outcome["status"] == "passed":
        print(f"{part.title}: has passed already", flush=True)
        return outcome
    print(f"{part.title}: …", end=" ", flush=True)
    begin = time.monotonic()
    try:
        done = runner.run([sys.executable, *part.words], timeout=part.limit, cwd=ROOT, environment=child_environment())
        printed = done.stdout + done.stderr
        status = "passed" if done.returncode == 0 else f"failed: exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        printed, status = "", f"failed: took more than {part.limit:g} s"
    replace_synced(kept.with_suffix(".txt"), printed.encode())
    outcome = {"status": status, "seconds": round(time.monotonic() - begin, 1),
               "command": " ".join(["python", *map(str, part.words)]), "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    replace_json(kept, outcome)
    print(f"{status}, {outcome['seconds']:.0f} s", flush=True)
    return outcome


def _kept(path: Path) -> dict[str, Any] | None:
    """A part's outcome; None if there is none, or the file is damaged: then the part is done again."""
    try:
        outcome = json.loads(path.read_bytes())
        return outcome if {"status", "seconds", "command", "date"} <= outcome.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def machine(output: Path) -> dict[str, Any]:
    """Hardware and versions, also in OUTPUT."""
    import torch

    facts = describe()
    if facts["gpus"]:
        facts["cuda"] = torch.version.cuda
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        if shutil.which("nvidia-smi"):
            facts["nvidia-smi"] = subprocess.run(GPU_MEMORY.split(), capture_output=True, text=True, timeout=60
                                                 ).stdout.strip().splitlines()
    replace_json(output / "machine.json", facts)
    return facts


def gain_from(rows: Sequence[Row]) -> Gain | None:
    """What compiling saves, from a study with `--axis compile=on,off`; None if no cell has both."""
    cells = Analysis(rows).cells
    pairs = [(plain, cells[on]) for off, plain in cells.items() if off.options == (("compile", "off"),)
             and (on := replace(off, options=(("compile", "on"),))) in cells]
    if not pairs:
        return None
    compiled = [run.row for _, figures in pairs for run in figures.repeats]
    return Gain(max(row["summary"]["compile_seconds"] for row in compiled),
                min(plain.step_ms.value - figures.step_ms.value for plain, figures in pairs) / 1000,
                compiled[0]["environment"]["torch"])


def compiling(folder: Path, facts: dict[str, Any]) -> str:
    """Keep what compiling saves, for `--compile auto`, and say it; "" if it was not measured."""
    try:
        gain = gain_from(read_table(folder))
    except UserError:
        return ""
    if gain is None:
        return ""
    saved = 1e6 * gain.saved_seconds_per_step
    words = f"Compiling takes {gain.compile_seconds:.1f} s"
    words += (f" and saves {saved:.0f} µs per step or more (medians)" if saved > 0 else
              " and does not save time at every batch size (medians)")
    if not facts["gpus"]:
        return f"{words}. On the CPU `--compile auto` has a rule of its own."
    return f"{words}: `--compile auto` reads it from {keep_gain(facts['gpus'][0], gain)}."


def page(output: Path, facts: dict[str, Any], outcomes: dict[str, tuple[str, dict[str, Any]]]) -> str:
    """What passed, what failed and the figures, as Markdown."""
    where = ", ".join(facts["gpus"]) or f"{facts['processor']}, {facts['cores']} cores, no GPU"
    failed = [title for title, outcome in outcomes.values() if outcome["status"] != "passed"]
    lines = [f"# {where}", "", "All parts passed." if not failed else f"**Failed: {', '.join(failed)}.**", ""]
    lines += table(["part", "status", "seconds", "date", "command"], [
        [title, outcome["status"], f"{outcome['seconds']:.0f}", outcome["date"], f"`{outcome['command']}`"]
        for title, outcome in outcomes.values()])
    versions = {**facts["versions"], "CUDA": facts.get("cuda"), "NCCL": facts.get("nccl")}
    lines += [f"{facts['processor']}, {facts['cores']} cores; {facts['system']}; commit {facts['commit']}; "
              + ", ".join(f"{name} {version}" for name, version in versions.items() if version), ""]
    lines += [f"- {line}" for line in facts.get("nvidia-smi", [])]
    lines += ["", facts.get("compiling", "")]
    lines += ["", "## Tests", "", *_tests(output / "tests.xml"), ""]
    for title, path in (("Benchmark", "benchmark.md"), ("The tutorial", "reproduce/report.md"),
                        ("Scaling study", "study/report.md")):
        lines += [f"## {title}", "", *_embedded(output / path, path), ""]
    return "\n".join(lines)


def _tests(path: Path) -> Iterator[str]:
    """How many passed; each that did not, and why those that were skipped were."""
    if not path.exists():
        yield "No result."
        return
    reasons: dict[str, int] = {}
    passed = 0
    for case in ElementTree.parse(path).iter("testcase"):
        if (skipped := case.find("skipped")) is not None:
            reasons[skipped.get("message", "")] = reasons.get(skipped.get("message", ""), 0) + 1
            continue
        bad = [facts for kind in ("failure", "error") for facts in case.iter(kind)]
        passed += not bad
        for facts in bad:
            yield f"- **failed**: `{case.get('classname')}::{case.get('name')}`: `{_line(facts.get('message', ''))}`"
    yield f"- passed: {passed}"
    for reason, count in reasons.items():
        yield f"- skipped: {count} ({_line(reason)})"


def _line(text: str) -> str:
    return " ".join(text.split())[:200].replace("`", "'")


def _embedded(path: Path, link: str) -> list[str]:
    """Another report below a heading of this one, with a link to it. Its title and its pictures stay there."""
    if not path.exists():
        return ["No result."]
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("![", "# "))]
    return [f"[{link}]({link})", "", *(re.sub(r"^(#+) ", r"#\1 ", line) for line in lines)]


def main(words: Sequence[str] | None = None) -> int:
    """Carry out the parts that have not passed; the exit status: 0 if all have, 2 if the command line is wrong."""
    made = Parser(prog="./launch/qualify.sh", description=__doc__, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("output", nargs="?", default="qualify", metavar="OUTPUT", help="folder (default: qualify)")
    made.add_argument("--data-dir", default="data", metavar="DIR", help="folder with MNIST (default: data)")
    made.add_argument("--short", action="store_true", help="tests, and the fused step beside its peers: some minutes")
    try:
        args = made.parse_args(words)
        output, data_dir = Path(args.output).resolve(), str(Path(args.data_dir).resolve())
        (output / OUTCOMES).mkdir(parents=True, exist_ok=True)
    except UserError as error:
        print(f"qualify: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"qualify: error: OUTPUT {args.output} cannot be written ({error.strerror}): name another folder",
              file=sys.stderr)
        return 2
    # what an earlier command left behind, if it was killed, would disturb the measurements
    mark = uuid.uuid5(uuid.NAMESPACE_URL, str(output)).hex
    runner.end_tree(mark)
    os.environ[runner.MARK] = ":".join(filter(None, [os.environ.get(runner.MARK), mark]))
    os.environ.setdefault("MNIST_DIST_TEST_DATA", data_dir)  # some tests need the original files
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = machine(output)
    outcomes = {}
    try:
        for part in parts(output, data_dir, len(facts["gpus"]), args.short):
            outcomes[part.name] = part.title, carry_out(part, output)
            if part.name == "study" and (gain := compiling(output / "study", facts)):
                facts["compiling"] = gain
            replace_synced(output / PAGE, page(output, facts, outcomes).encode())
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", flush=True)
        return 130
    print(f"written: {output / PAGE}")
    return 0 if all(outcome["status"] == "passed" for _, outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
