"""Killed at any place at which it writes, renames or removes a file, a run or a study is what it would have been."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from forked import run_forked
from support import ROOT

from benchmarks.faults import TIMES

STAND_IN = str(ROOT / "tests" / "helpers" / "stand_in.py")
RUN = ["train", "--batch-size", 97, "--lr", "1e-3", "--epochs", 5, "--checkpoint-every", "4steps",
       "--gradient-accumulation-steps", 2, "--evaluate-every", "400samples", "--output-dir", "run", "--resume"]
ENDS = {"target": ["--target-nll", 0.22], "steps": ["--max-steps", 27]}  # both in the middle of the third epoch
MEASURED = {"checkpoints", "checkpoint_pause_seconds", "checkpoint_seconds", "samples_per_second", "compile_seconds",
            "seconds_to_target", "train_seconds", "run_id"} | TIMES


def without_times(values):
    """The values without what is measured, at any depth."""
    if isinstance(values, dict):
        return {name: without_times(value) for name, value in values.items() if name not in MEASURED}
    return [without_times(value) for value in values] if isinstance(values, list) else values


class Command:
    """A command whose places are numbered, in a folder of its own."""

    def __init__(self, words, cwd, size=1):
        self.words, self.cwd, self.size = words, cwd, size
        self.cwd.mkdir()

    def start(self, kill_at=""):
        """The exit status and what was printed; the places are in `places`."""
        return run_forked(self.words, cwd=self.cwd, size=self.size, patience=0.5, target="places:main", environment={
            "PLACES_BELOW": str(self.cwd / "run"), "PLACES_IN": str(self.cwd / "places"), "KILL_AT": kill_at})

    def places(self):
        return (self.cwd / "places").read_text().splitlines()


def left_by_run(cwd):
    """What a run has left, without what is measured."""
    folder = cwd / "run"
    return {
        "weights": (folder / "model.safetensors").read_bytes(), "config": (folder / "config.yaml").read_text(),
        "lines": [without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "points": [{**json.loads(line), "samples_per_second": None}
                   for line in (folder / "steps.jsonl").read_text().splitlines()],
        "windows": [json.loads(line)["epoch"] for line in (folder / "windows.jsonl").read_text().splitlines()],
        "result": without_times(json.loads((folder / "result.json").read_text())),
        "names": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
    }


def left_by_study(cwd):
    """What a study has left, without dates, what is measured, and what a run printed, which is lost with the study."""
    folder = cwd / "run"
    rows = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    for row in rows:
        row["study"]["date"] = row["started"] = row["seconds"] = None
    plan = json.loads((folder / "study.json").read_text())
    plan["mark"] = [grid.pop("date") for grid in plan["grids"]] and None
    return {"rows": rows, "plan": plan, "table": len((folder / "runs.csv").read_text().splitlines()),
            "names": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                            if path.name != "output.txt")}


def check(words, tmp_path, left_by, choose, size=1):
    """Kill the command at each chosen place, and start it again; returns how many places there are and were tried."""
    alone = Command(words, tmp_path / "alone", size)
    done = alone.start()
    assert done.returncode == 0, done.stderr
    expected, places = left_by(alone.cwd), alone.places()
    assert len(set(places)) == len(places), "each has a name of its own"
    chosen = choose(places)

    def differs(number):
        command = Command(words, tmp_path / str(number), size)
        killed = command.start(chosen[number])
        if killed.returncode != -signal.SIGKILL:
            return f"{chosen[number]}: was not killed there ({killed.returncode}): {killed.stderr}"
        again = command.start()
        if again.returncode != 0:
            return f"{chosen[number]}: {again.returncode} {again.stderr}"
        found = left_by(command.cwd)
        wrong = [name for name in expected if found[name] != expected[name]]
        return f"{chosen[number]}: {', '.join(wrong)}" if wrong else None

    with ThreadPoolExecutor(2) as pool:
        wrong = list(filter(None, pool.map(differs, range(len(chosen)))))
    print(f"{len(places)} places, {len(chosen)} tried on {size} process{'es' if size > 1 else ''}: {len(wrong)} differ")
    assert not wrong, "\n".join(wrong)
    return len(places), len(chosen)


def first_and_last(places):
    """Of each call site the first visit and the last."""
    by_site = {}
    for place in places:
        by_site.setdefault(place.rpartition(" #")[0], []).append(place)
    return list(dict.fromkeys(place for visits in by_site.values() for place in (visits[0], visits[-1])))


def test_first_and_last():
    assert first_and_last(["a #1", "a #2", "b #1", "a #3"]) == ["a #1", "a #3", "b #1"]


@pytest.mark.long
def test_each_call_site_of_a_run(small_dir, tmp_path):
    places, tried = check([*RUN, *ENDS["target"], "--data-dir", small_dir], tmp_path, left_by_run, first_and_last)
    assert tried > 40 and places > 100
    result = json.loads((tmp_path / "alone" / "run" / "result.json").read_text())
    assert [epoch["step"] for epoch in result["epochs"][:2]] == [11, 22] and 22 < result["epochs"][2]["step"] < 33


@pytest.mark.faults
@pytest.mark.parametrize(("end", "size"), [("target", 1), ("steps", 1), ("target", 2), ("steps", 2)])
def test_every_place_of_a_run(end, size, small_dir, tmp_path):
    check([*RUN, *ENDS[end], "--data-dir", small_dir], tmp_path, left_by_run, list, size)


KILLS, MOST_KILLS = 400, 8  # in all, and of one run
VARIANTS = [  # of the options, which of two ends within an epoch
    ("steps", []), ("target", []), ("steps", ["--gradient-accumulation-steps", 1, "--reproducible"]),
    ("target", ["--checkpoint-every", "1epoch"]), ("steps", ["--checkpoint-every", "3steps", "--batch-size", 50]),
]


@pytest.mark.faults
def test_random_kills(small_dir, tmp_path):
    """A plan follows from a run's number: its seed, end and options, 1 or 2 processes, whom each kill hits, and when.
    Each run is started again until it is done, by which it has been killed some times.
    """
    def learnt(number):
        chance = random.Random(number)
        end, more = VARIANTS[number % len(VARIANTS)]
        size, kills = 1 + number // len(VARIANTS) % 2, 0
        words = [*RUN, *ENDS[end], *more, "--seed", number % 7, "--data-dir", small_dir]
        alone, cut = (tmp_path / f"{number}-{name}" for name in ("alone", "cut"))
        for folder in (alone, cut):
            folder.mkdir()
        begin = time.monotonic()
        done = run_forked(words, cwd=alone, size=size, target="places:main")
        assert done.returncode == 0, done.stderr
        seconds, wrong = time.monotonic() - begin, []
        while True:
            after = chance.uniform(0.2, 1.0) * seconds if kills < MOST_KILLS else 1000.0
            mark = cut / "killed"
            mark.unlink(missing_ok=True)
            done = run_forked(words, cwd=cut, size=size, patience=0.5, target="places:main", environment={
                "KILL_AFTER": str(after), "KILLS_RANK": str(chance.randrange(size)), "KILLED": str(mark)})
            if done.returncode == 0:
                break
            if not mark.exists() or "Traceback" in done.stderr:
                return kills, [f"run {number}: {done.returncode} {done.stderr}"]
            kills += 1
        expected, found = left_by_run(alone), left_by_run(cut)
        wrong = [f"run {number}: {name}" for name in expected if found[name] != expected[name]]
        if not wrong:
            shutil.rmtree(alone)
            shutil.rmtree(cut)
        return kills, wrong

    kills, runs, wrong = 0, 0, []
    with ThreadPoolExecutor(2) as pool:
        while kills < KILLS:
            for more, differ in pool.map(learnt, range(runs, runs + 10)):
                kills, wrong = kills + more, wrong + differ
            runs += 10
            print(f"{runs} runs, {kills} kills, {len(wrong)} wrong {wrong or ''}", flush=True)
    assert not wrong, "\n".join(wrong)


STUDY = ["study", "--script", STAND_IN, "--batch-sizes", "10,20", "--repeats", 1, "--wandb", "disabled", "--output-dir",
         "run"]


@pytest.mark.faults
def test_every_place_of_a_study(tmp_path):
    check(STUDY, tmp_path, left_by_study, list)
