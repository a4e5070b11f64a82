"""`mnist-dist predict`: a run's model on image files, or on 16 random test images beside their labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mnist_dist.commands.show import open_images
from mnist_dist.config import TrainConfig
from mnist_dist.data.picture import BLANK, Grey, prepare, read_picture, reduced
from mnist_dist.disk.files import real
from mnist_dist.errors import UserError
from mnist_dist.output import columns, complain, say
from mnist_dist.text import cause, cut
from mnist_dist.training.results import load_model, random_indices
from mnist_dist.training.results import predict as probabilities_of

SURE = 0.6  # least probability without a note: below it the default model is wrong on half of the test images
MOST_DRAWN = 50  # pictures
WIDE = 80  # columns of a terminal, from which on the ten probabilities are shown
CPU = torch.device("cpu")


def predict_files(run_dir: Path, paths: Sequence[Path], output: str | None, as_json: bool) -> int:
    """Print each picture's digit and probabilities; a file that is no picture is one line. The exit status: 0, or 2 if
    any file is none. `output` also gets what the model sees. Raises `UserError`.
    """
    model = load_model(run_dir)
    is_wide = columns() >= WIDE
    if not as_json:
        say("digit    sure  " + "".join(f"{digit:4d}" for digit in range(10) if is_wide) + "  image")
    drawn: list[tuple[str, Grey, Tensor, Tensor]] = []
    status = 0
    for path in paths:
        try:
            grey, of_file = read_picture(path)
        except UserError as error:
            complain("error", error)
            status = error.exit_status
            continue
        image, of_digit = prepare(grey)
        row = probabilities_of(model, image.unsqueeze(0), CPU, torch.float32)[0]
        notes = [*of_file, *of_digit, *(() if BLANK in of_digit else _doubts(row))]
        if output and len(drawn) < MOST_DRAWN:
            drawn.append((str(path), reduced(grey), image, row))
        digit = int(row.argmax())
        if as_json:
            say(json.dumps({"file": str(path), "digit": digit, "probabilities": row.tolist(), "notes": notes}))
        else:
            shares = "".join(f"{100 * probability:4.0f}" for probability in row if is_wide)
            say(f"{digit:5d} {100 * row.max():5.1f} %  {shares}  {cut(path)}")
        if notes:
            complain("warning", f"{cut(path)}: {'; '.join(notes)}")
    if drawn:
        from mnist_dist.record.run_pictures import draw_seen

        target = _target(str(output))
        try:
            draw_seen(drawn, target)
        except (OSError, ValueError) as error:
            raise _refusal(target, error) from None
        if not as_json:
            say(f"drawn: {target}")
    return status


def predict_grid(config: TrainConfig, run_dir: Path, output: str | None) -> None:
    """Draw the tutorial's grid of 16 test images with their predictions, and print these. Raises `UserError`."""
    from mnist_dist.record.run_pictures import draw_predictions

    model = load_model(run_dir)
    sets = open_images(config)
    images, labels = sets.test.__getitems__(random_indices(sets.test, config.seed))
    probabilities = probabilities_of(model, images, CPU, torch.float32)
    target = _target(output or str(run_dir / "predict.png"))
    try:
        draw_predictions(images, labels, probabilities, target, f"{sets.name}: 16 random test images")
    except (OSError, ValueError) as error:
        raise _refusal(target, error) from None
    say("label      " + "".join(f"{label:4d}" for label in labels.tolist()))
    say("prediction " + "".join(f"{guess:4d}" for guess in probabilities.argmax(dim=1).tolist()))
    say("sure (%)   " + "".join(f"{100 * sure:4.0f}" for sure in probabilities.max(dim=1).values.tolist()))
    say(f"drawn: {target}")


def _doubts(probabilities_C: Tensor) -> list[str]:
    """A note if no digit is likely."""
    (first, second), (digit, other) = (part.tolist() for part in probabilities_C.topk(2))
    return [f"unsure: {digit} {100 * first:.0f} %, {other} {100 * second:.0f} %"] if first < SURE else []


def _target(output: str) -> Path:
    return real(Path(output).parent) / Path(output).name


def _refusal(target: Path, error: Exception) -> UserError:
    return UserError(f"--output {cut(target)} cannot be written ({cause(error)}): give another .png")
