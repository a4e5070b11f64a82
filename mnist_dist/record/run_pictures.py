"""The pictures: one digit, a grid of digits, predictions beside their truth, a run's learning curves.

PNG on a white ground, readable in light and dark viewers; wrong predictions are marked by a word and a frame, not by
colour alone. Images are uint8 [N, 1, 28, 28]. It knows nothing of runs or models.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from mnist_dist.disk.files import replace_synced
from mnist_dist.record.metrics import EpochRecord, samples_at

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # Okabe and Ito's palette, safe for the colour-blind
LINES = (GREY, "#E69F00", "#009E73", BLUE, ORANGE)  # of the same palette


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    with matplotlib.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(content, dpi=120, format=path.suffix[1:])
    replace_synced(path, content.getvalue())


def draw_digit(image_1HW: Tensor, label: int, path: Path) -> None:
    """One image in grey with its label as title and its pixels numbered."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image_1HW.squeeze(0).numpy(), cmap="gray", vmin=0, vmax=255)
    axes.set(title=f"label {label}", xlabel="column (pixels)", ylabel="row (pixels)")
    _save(figure, path)


def draw_grid(images_N1HW: Tensor, titles: Sequence[str], path: Path, *, columns: int = 4, wrong: Sequence[bool] = (),
              heading: str | None = None) -> None:
    """Images in a grid, a title each; those marked `wrong` get an orange frame and title."""
    rows, top = -(-len(titles) // columns), 0.35 if heading else 0.0
    width, height = 1.7 * columns, 1.95 * rows + top  # inches
    figure = Figure(figsize=(width, height))
    # all in one pair of axes, in inches: a pair of axes for each image takes four times as long
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for i, title in enumerate(titles):
        is_wrong = i < len(wrong) and wrong[i]
        left, upper = 1.7 * (i % columns) + 0.1, top + 1.95 * (i // columns) + 0.4
        axes.imshow(images_N1HW[i].squeeze(0).numpy(), cmap="gray", vmin=0, vmax=255,
                    extent=(left, left + 1.5, upper + 1.5, upper), aspect="auto")
        axes.text(left + 0.75, upper - 0.05, title, fontsize=9, ha="center", va="bottom",
                  color=ORANGE if is_wrong else "black")
        if is_wrong:
            axes.add_patch(Rectangle((left, upper), 1.5, 1.5, fill=False, edgecolor=ORANGE, linewidth=3))
    if heading:
        axes.text(width / 2, 0.1, heading, fontsize=11, ha="center", va="top")
    _save(figure, path)


def draw_predictions(images_N1HW: Tensor, labels_N: Tensor, probabilities_NC: Tensor, path: Path, heading: str) -> None:
    """Test images with the predicted digit, its probability, and the truth; wrong ones are marked."""
    best_N, guesses_N = probabilities_NC.max(dim=1)
    wrong = (guesses_N != labels_N).tolist()
    titles = [
        f"{guess} ({100 * best:.1f} %)\n" + (f"WRONG: is {label}" if is_wrong else f"is {label}")
        for guess, best, label, is_wrong in zip(guesses_N.tolist(), best_N.tolist(), labels_N.tolist(), wrong,
                                                strict=True)
    ]
    draw_grid(images_N1HW, titles, path, wrong=wrong, heading=heading)


def draw_seen(pictures: Sequence[tuple[str, NDArray[np.float32], Tensor, Tensor]], path: Path) -> None:
    """A row for each picture: the picture [H, W], what the model sees of it [1, 28, 28], its probabilities [10]."""
    figure = Figure(figsize=(8, 2.2 * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), 3, squeeze=False, width_ratios=(1, 1, 2))
    for (name, picture, seen, probabilities), (left, middle, right) in zip(pictures, grid, strict=True):
        left.imshow(picture, cmap="gray", vmin=0, vmax=255)
        middle.imshow(seen.squeeze(0).numpy(), cmap="gray", vmin=0, vmax=255)
        left.set_title(name if len(name) <= 24 else f"…{name[-23:]}", fontsize=9, parse_math=False)
        middle.set_title("what the model sees", fontsize=9)
        for axes in (left, middle):
            axes.set(xticks=[], yticks=[])
        digit = int(probabilities.argmax())
        bars = right.bar(range(10), (100 * probabilities).tolist(), color=BLUE)
        bars[digit].set_color(ORANGE)
        right.set(xticks=range(10), ylim=(0, 108), ylabel="%")
        right.set_title(f"{digit} ({100 * probabilities[digit]:.1f} %)", fontsize=9)
        right.grid(axis="y", color=GREY, alpha=0.25)
    _save(figure, path)


def draw_lesson(courses: Sequence[tuple[int, Sequence[tuple[float, int, float]]]], path: Path, heading: str) -> None:
    """The test NLL of trainings with different batch sizes, against the seconds and against the samples. Each course is
    a batch size and its (seconds, samples, test NLL).
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_seconds, by_samples = figure.subplots(1, 2, sharey=True)
    for (batch_size, moments), color, marker in zip(courses, LINES, "osD^v", strict=False):
        label = f"{batch_size:,}"
        for axes, at in ((by_seconds, 0), (by_samples, 1)):
            axes.plot([moment[at] for moment in moments], [moment[2] for moment in moments], color=color,
                      marker=marker, markersize=4, label=label)
    by_seconds.set(xlabel="seconds of training", ylabel="test NLL (nats per image)", xscale="log", yscale="log")
    by_samples.set(xlabel="samples", xscale="log")
    by_seconds.yaxis.set_major_formatter("{x:g}")
    by_seconds.yaxis.set_minor_formatter("{x:g}")
    by_samples.legend(title="batch size", fontsize=9)
    for axes in (by_seconds, by_samples):
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.grid(color=GREY, alpha=0.25)
    figure.suptitle(heading, fontsize=11)
    _save(figure, path)


def draw_curves(records: Sequence[EpochRecord], points: Sequence[Mapping[str, Any]], num_train: int, batch: int,
                path: Path, heading: str) -> None:
    """Learning curves of a run: loss, error and throughput against the epochs done, of `num_train` samples in batches
    of `batch`. `points` are the lines of `steps.jsonl`.
    """
    epochs = [samples_at(record.step, num_train, batch) / num_train for record in records]
    figure = Figure(figsize=(11, 3.6))
    loss, error, rate = figure.subplots(1, 3, gridspec_kw={"left": 0.065, "right": 0.99, "bottom": 0.14, "top": 0.9,
                                                           "wspace": 0.36})
    marker = "o" if len(epochs) <= 30 else None
    if points:
        loss.plot([point["epoch"] for point in points], [point["train_loss"] for point in points], color=BLUE,
                  linewidth=0.8, label="training")
    else:
        loss.plot(epochs, [r.train_loss for r in records], color=BLUE, marker=marker, markersize=4, label="training")
    loss.plot(epochs, [r.test_nll for r in records], color=ORANGE, marker=marker and "s", markersize=4,
              linestyle="--", label="test")
    loss.set(ylabel="negative log-likelihood (nats per image)", yscale="log")
    for axis_formatter in (loss.yaxis.set_major_formatter, loss.yaxis.set_minor_formatter):
        axis_formatter("{x:g}")  # 0.3, not 3 times a power of ten
    loss.legend()
    error.plot(epochs, [100 * (1 - r.test_accuracy) for r in records], color=ORANGE, marker=marker and "s",
               markersize=4, linestyle="--")
    error.set(ylabel="test error (%)")
    measured = [(done, r.samples_per_second) for done, r in zip(epochs, records, strict=True) if r.samples_per_second]
    rate.plot([e for e, _ in measured], [s for _, s in measured], color=BLUE, marker=marker, markersize=4)
    rate.set(ylabel="training throughput (samples/s)")
    for axes in (error, rate):
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax if measured and axes.dataLim.ymax > 0 else None)
    for axes in (loss, error, rate):
        axes.set_xlabel("epochs done")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color=GREY, alpha=0.25)
    figure.suptitle(heading, fontsize=11)
    _save(figure, path)
