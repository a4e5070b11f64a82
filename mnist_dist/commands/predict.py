"""`mnist-dist predict`: a run's model on image files, or on 16 random test images beside their labels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_dist.commands.shared import data_config
from mnist_dist.commands.show import open_images
from mnist_dist.config import TrainConfig
from mnist_dist.disk.files import real
from mnist_dist.errors import UserError
from mnist_dist.options import SHARED, Parser, add_training
from mnist_dist.output import columns, complain, say
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.record.config_file import read_run_config
from mnist_dist.record.run_folder import CONFIG
from mnist_dist.text import cause, cut

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_dist.data.picture import Grey

SURE = 0.6  # least probability without a note: below it the default model is wrong on half of the test images
MOST_DRAWN = 50  # pictures
WIDE = 80  # columns of a terminal, from which on the ten probabilities are shown


def add_options(parser: Parser) -> None:
    """Add the command's options."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a completed run")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="PNG or JPEG of one digit, dark or light, of any "
                        "size and place; a picture of 28 x 28 is taken as it is")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each image file")
    parser.add_argument("--output", metavar="FILE", help="with image files: draw the first 50 of them, what the model "
                        "sees of each, and the ten probabilities; else: where the grid goes (default: predict.png in "
                        "RUN_DIR)")
    add_training(parser, SHARED)


def run(args: argparse.Namespace, argv: Sequence[str], launch: Launch) -> int:
    """Classify; returns the exit status. Raises `UserError`."""
    folder = Path(args.run_dir)
    if args.images:
        data_config(args)  # for its errors
        return predict_files(folder, list(map(Path, args.images)), args.output, args.json)
    config = data_config(args, _data_of_run(folder))
    if args.json:
        raise UserError("--json is of image files: name some")
    predict_grid(config, folder, args.output)
    return 0


def _data_of_run(folder: Path) -> dict[str, Any]:
    """The data set that the run was trained on, as options. Raises `UserError`."""
    values = read_run_config(folder / CONFIG)
    return {name: values[name] for name in ("dataset", "data_dir") if name in values}


def predict_files(run_dir: Path, paths: Sequence[Path], output: str | None, as_json: bool) -> int:
    """Print each picture's digit and probabilities, and an error line for each file that is not a picture. Returns the
    exit status: 2 if there is such a file, else 0. `output` also gets what the model sees. Raises `UserError`.
    """
    from mnist_dist.data.picture import BLANK, prepare, read_picture, reduced
    from mnist_dist.training.results import load_model, predict

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
        row = predict(model, image.unsqueeze(0))[0]
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
    from mnist_dist.training.results import load_model, predict, random_indices

    model = load_model(run_dir)
    sets = open_images(config)
    images, labels = sets.test.__getitems__(random_indices(sets.test, config.seed))
    probabilities = predict(model, images)
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
