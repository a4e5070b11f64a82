"""Why a step on more processes takes longer than an ideal division of the work."""

from __future__ import annotations

import statistics

from mnist_dist.study.analysis.analysis import usual_own_ms
from mnist_dist.study.analysis.cells import CellMetrics
from mnist_dist.tables import number
from mnist_dist.text import counted

LEAST_SHARE = 0.1  # a smaller part of the loss is not named
AS_LARGE = 0.5  # a part that is at least this share of the largest one is a cause as well
COMPUTING = "computing"
CAUSES = {
    COMPUTING: "computing", "wait": "waiting for data", "straggler": "waiting for the slowest rank",
    "communication": "communication",
}


def cause(metrics: CellMetrics, base: CellMetrics) -> str:
    """What a step loses in comparison with an ideal division of the base case's, which has the same global batch on
    fewer processes: a sentence with the parts, the largest first. "" if the runs say nothing of ranks, or if nothing is
    lost.
    """
    ours, theirs = _parts(metrics), _parts(base)
    if ours is None or theirs is None:
        return ""
    ideal = base.cell.processes / metrics.cell.processes
    lost = {name: value - theirs[name] * ideal for name, value in ours.items()}
    total = sum(lost.values())
    if total <= 0:
        return ""
    named = sorted((name for name in lost if lost[name] > LEAST_SHARE * total), key=lambda name: -lost[name])
    shared = " (the processes share the same cores)" if metrics.devices <= base.devices else ""
    words = ", ".join(f"{number(lost[name])} ms {CAUSES[name]}{shared if name == COMPUTING else ''}" for name in named)
    causes = [CAUSES[name] for name in named if lost[name] >= AS_LARGE * lost[named[0]]]
    begin = f"The cause is {causes[0]}" if len(causes) == 1 else f"The causes are {' and '.join(causes)}"
    return (f"{begin}: at batch {metrics.cell.global_batch_size:,} a step takes "
            f"{number(total)} ms more than {number(ideal)} times a step on "
            f"{counted(base.cell.processes, 'process', 'processes')}; of these {words}")


def _parts(metrics: CellMetrics) -> dict[str, float] | None:
    """Milliseconds of a step by what they are for: medians over the runs, of their last epoch."""
    milliseconds: dict[str, list[float]] = {name: [] for name in CAUSES}
    if len(metrics.ranks) < len(metrics.repeats):
        return None
    for ranks in metrics.ranks:
        if not all(ranks.get(name) for name in ("step_ms", "data_wait_ms")):
            return None
        usual, slowest, wait = usual_own_ms(ranks), ranks["own_ms"]["max"], ranks["data_wait_ms"]["median"]
        parts = (usual - wait, wait, slowest - usual, ranks["step_ms"]["median"] - slowest)
        for name, value in zip(CAUSES, parts, strict=True):
            milliseconds[name].append(value)
    return {name: statistics.median(values) for name, values in milliseconds.items()}
