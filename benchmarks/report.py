"""From measurements to what is read: medians with minimum and maximum, paired ratios, Markdown. Pure: no disk.

A record is what the JSON file holds: command, date, settings, machine, measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.rows import BY_NAME, EPOCH_IMAGES, LIMIT, OURS, ROWS
from mnist_dist.tables import Spread, cell, number, spread, table

INSTALL = 'pip install -e ".[benchmarks]"'
WARMUP_BATCH = 200


def values(record: Mapping[str, Any], name: str, batch_size: int, key: str = "seconds") -> dict[int, float]:
    """Of a row at a batch size, by repeat: `key` in seconds per epoch of 60,000 images."""
    return {
        m["repeat"]: m[key] * EPOCH_IMAGES / m["samples"] for m in record["measurements"]
        if m["row"] == name and m["batch_size"] == batch_size and m["status"] == "ok"
    }


def ratios(record: Mapping[str, Any], slow: str, fast: str, batch_size: int) -> Spread | None:
    """Seconds of `slow` over those of `fast`, repeat by repeat; None if no repeat has both."""
    above, below = values(record, slow, batch_size), values(record, fast, batch_size)
    paired = [above[repeat] / below[repeat] for repeat in above.keys() & below.keys()]
    return spread(paired) if paired else None


def rows_of(record: Mapping[str, Any], processes: int) -> list[str]:
    """Names of the rows that were tried with so many processes, in the tables' order."""
    tried = {m["row"] for m in record["measurements"]}
    return [row.name for row in ROWS if row.processes == processes and row.name in tried]


def batch_sizes_of(record: Mapping[str, Any], processes: int) -> list[int]:
    """Batch sizes that were tried with so many processes."""
    return sorted({m["batch_size"] for m in record["measurements"] if m["processes"] == processes})


def trouble(record: Mapping[str, Any], name: str, batch_size: int) -> str:
    """Why a cell is empty: not installed, failed, or not measured."""
    of_row = [m for m in record["measurements"] if m["row"] == name]
    if any(m["status"] == "missing" for m in of_row):
        return "not installed"
    return "failed" if any(m["status"] == "failed" and m["batch_size"] == batch_size for m in of_row) else "-"


def grid(record: Mapping[str, Any], names: Sequence[str], processes: int, spread_of: Callable[[str, int], Spread | None]
         ) -> list[str]:
    """A table of rows by batch sizes."""
    sizes = batch_sizes_of(record, processes)
    return table(["", *(f"batch {size:,}" for size in sizes)], [
        [title(record, name), *(cell(spread_of(name, size), trouble(record, name, size)) for size in sizes)]
        for name in names
    ])


def title(record: Mapping[str, Any], name: str) -> str:
    """What a table calls the row; also its device, where that is not ours."""
    devices = {row: {m["device"] for m in record["measurements"] if m["row"] == row and m["status"] == "ok"}
               for row in (name, *OURS.values())}
    elsewhere = devices[name] - devices[OURS[1]] - devices[OURS[2]]
    on = f" (on the {', '.join(sorted(elsewhere))})" if elsewhere and (devices[OURS[1]] or devices[OURS[2]]) else ""
    return BY_NAME[name].title + on


def markdown(record: Mapping[str, Any]) -> str:
    """The whole report."""
    return "\n".join([*_introduction(record), *_times(record), *_limit(record), *_warmup(record), *_notes(record)])


def _introduction(record: Mapping[str, Any]) -> Iterator[str]:
    machine, settings = record["machine"], record["settings"]
    name = " + ".join([*machine["gpus"], f"{machine['processor']}, {machine['cores']} cores"])
    done = max((m["repeat"] for m in record["measurements"]), default=-1) + 1
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
    yield from (f"# Training speed on {name}", "")
    yield from (f"`{record['command']}`, {record['date']}, commit {machine['commit'] or 'unknown'}; {versions}.", "")
    if machine.get("gflops"):
        maker, family = machine["family"] or ("unknown maker", "unknown")
        rates = ", ".join(f"{library} {rate:,.0f}" for library, rate in machine["gflops"].items())
        yield (f"The processor: {maker}, family {family}, {' '.join(machine['vector_instructions'])}. Its float32 "
               f"products of 1,000 x 784 by 784 x 256, GFLOP/s: {rates}.")
        yield ""
    yield ("784-256-10 with LeakyReLU 0.1, Adam at 1e-4, MNIST in [-1, 1], float32, a new order each epoch; ours with "
           f"`--compile {settings['compile']}`. {done} repeat{'s' if done != 1 else ''}, rows taking turns in shuffled "
           "order, each measurement a fresh process. A cell is the median (minimum to maximum).")
    yield ""


def _times(record: Mapping[str, Any]) -> Iterator[str]:
    for processes in (1, 2):
        names = rows_of(record, processes)
        if not names:
            continue
        words = {1: "One process", 2: "Two processes"}[processes]
        yield from (f"## {words}: seconds per epoch of {EPOCH_IMAGES:,} images", "")
        yield from grid(record, names, processes, lambda name, size: _spread(values(record, name, size)))
        peers = [name for name in names if name not in (*OURS.values(), LIMIT)]
        ours = OURS[processes]
        if ours in names and peers:
            yield from (f"## {words}: ours is so many times as fast as", "")
            yield from grid(record, peers, processes, lambda name, size, ours=ours: ratios(record, name, ours, size))


def _spread(by_repeat: Mapping[int, float]) -> Spread | None:
    return spread(list(by_repeat.values())) if by_repeat else None


def _limit(record: Mapping[str, Any]) -> Iterator[str]:
    if LIMIT not in rows_of(record, 1):
        return
    yield from ("## The limit: matrix products and Adam alone, seconds per epoch", "")
    yield from table(
        ["batch", "matrix products", "Adam", "both: the limit", "ours", "time over limit"],
        [[f"{size:,}", *(cell(_spread(values(record, LIMIT, size, key)))
                         for key in ("matmul_seconds", "adam_seconds", "seconds")),
          cell(_spread(values(record, OURS[1], size))), cell(ratios(record, OURS[1], LIMIT, size))]
         for size in batch_sizes_of(record, 1)],
    )


def _warmup(record: Mapping[str, Any]) -> Iterator[str]:
    """The first measurement of a cell found an empty compiler cache, the later ones did not."""
    lines = []
    for row in ROWS:
        of_row = {m["repeat"]: m["warmup_seconds"] for m in record["measurements"]
               if m["row"] == row.name and m["batch_size"] == WARMUP_BATCH and m["status"] == "ok"}
        if of_row and row.name != LIMIT:
            first = min(of_row)
            later = [seconds for repeat, seconds in of_row.items() if repeat != first]
            lines.append([title(record, row.name), number(of_row[first]), cell(spread(later) if later else None)])
    if lines:
        yield from (f"## Warm-up at batch {WARMUP_BATCH}, in no figure above: seconds", "")
        yield ("Of a peer, its first epoch, with compilation; of ours, compilation and the first steps. The first "
               "process finds the compiler's cache empty, the later ones do not.")
        yield ""
        yield from table(["", "first process", "later ones"], lines)


def _notes(record: Mapping[str, Any]) -> Iterator[str]:
    for m in record["measurements"]:
        if m["status"] == "missing":
            yield f"- {m['row']}: {m['note']}; {INSTALL}"
        elif m["status"] == "failed":
            yield f"- {m['row']} at batch {m['batch_size']:,} failed in repeat {m['repeat'] + 1}: {m['note']}"
