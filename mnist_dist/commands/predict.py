"""`mnist-dist predict`: a run's model on image files, or on 16 random test images beside their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnist_dist.commands.show import open_images
from mnist_dist.config import TrainConfig
from mnist_dist.data.idx import SIDE
from mnist_dist.disk.files import opened_regular, real
from mnist_dist.errors import UserError
from mnist_dist.output import say
from mnist_dist.text import cause, cut
from mnist_dist.training.results import load_model, random_indices
from mnist_dist.training.results import predict as probabilities_of

MAX_PIXELS = 50_000_000  # of an image file: beyond that it is no picture of one digit


def read_image(path: Path) -> tuple[Tensor, bool]:
    """An image file as uint8 [1, 28, 28], light on dark as in MNIST, and whether it was inverted for that.

    Colours become grey, other sizes are fitted into 28 x 28, keeping their proportions. A light border means a dark
    digit on light paper. Raises `UserError` if the file is not an image.
    """
    from PIL import Image, ImageOps

    try:
        with opened_regular(path) as file, Image.open(file, formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError(f"{path} has {opened.width} x {opened.height} pixels: cut the digit out")
            if "A" in opened.getbands():  # what is transparent is paper
                paper = Image.new("RGBA", opened.size, "white")
                grey = Image.alpha_composite(paper, opened.convert("RGBA")).convert("L")
            else:
                grey = opened.convert("L")
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError, RuntimeError, EOFError) as error:
        raise UserError(f"{cut(path)} cannot be read as an image ({cause(error)}): give a PNG or JPEG of one digit"
                        ) from None
    pixels = np.asarray(grey)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    inverted = bool(np.median(border) > 127)
    if inverted:
        grey = ImageOps.invert(grey)
    if grey.size != (SIDE, SIDE):
        grey = ImageOps.pad(grey, (SIDE, SIDE), method=Image.Resampling.LANCZOS, color=0)
    return torch.from_numpy(np.array(grey, dtype=np.uint8)).unsqueeze(0), inverted


def predict(config: TrainConfig, run_dir: Path, paths: Sequence[Path], output: str | None) -> None:
    """Print each image's digit and probabilities; without image files, draw the tutorial's grid. Raises `UserError`."""
    model = load_model(run_dir)
    cpu = torch.device("cpu")
    if paths:
        say(f"{'digit':>5} {'sure':>7}   " + " ".join(f"p({digit})".rjust(6) for digit in range(10)) + "   image")
        for path in paths:
            image, inverted = read_image(path)
            row = probabilities_of(model, image.unsqueeze(0), cpu, torch.float32)[0]
            numbers = " ".join(f"{probability:6.4f}" for probability in row)
            note = "  (inverted: dark on light)" if inverted else ""
            say(f"{int(row.argmax()):5d} {100 * row.max():5.1f} %   {numbers}   {path}{note}")
        return
    from mnist_dist.record.pictures import draw_predictions

    sets = open_images(config)
    images, labels = sets.test.__getitems__(random_indices(sets.test, config.seed))
    probabilities = probabilities_of(model, images, cpu, torch.float32)
    target = Path(output) if output else run_dir / "predict.png"
    target = real(target.parent) / target.name
    try:
        draw_predictions(images, labels, probabilities, target, f"{sets.name}: 16 random test images")
    except (OSError, ValueError) as error:
        raise UserError(f"--output {target} cannot be written ({cause(error)}): give another .png") from None
    say("label      " + " ".join(f"{label:5d}" for label in labels.tolist()))
    say("prediction " + " ".join(f"{guess:5d}" for guess in probabilities.argmax(dim=1).tolist()))
    say("sure (%)   " + " ".join(f"{100 * sure:5.1f}" for sure in probabilities.max(dim=1).values.tolist()))
    say(f"drawn: {target}")
