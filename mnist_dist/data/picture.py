"""A picture of one digit, prepared as MNIST's images are: the digit's bounding box in 20 x 20, centred in 28 x 28.

The method is that of LeCun et al. 1998, "Gradient-based learning applied to document recognition", section III.A: the
digit is scaled to fit into 20 x 20 pixels with its proportions, and moved so that its centre of mass is the image's
centre. Before that, ink is separated from paper, by levels that the noise of the picture does not reach.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mnist_dist.data.idx import SIDE
from mnist_dist.disk.files import opened_regular
from mnist_dist.errors import UserError
from mnist_dist.text import cause, cut

MAX_PIXELS = 50_000_000  # of an image file: beyond that it is no picture of one digit
BOX = 20  # pixels: the longer side of a digit in MNIST
CENTRE = 14.5  # pixels: the mean centre of mass of MNIST's images, which is the middle of pixel 14
WORKING_SIDE = 400  # pixels: a larger picture is made smaller first
LEAST_CONTRAST = 24.0  # grey levels between paper and ink; with less a picture is blank
NOISE_LEVELS = 7.0  # deviations of the paper's noise that ink differs from paper at least
EDGE = 0.2  # of the contrast: a pixel that belongs to the digit if it touches the digit's core
CORE = 0.5  # of the contrast
SPECK = 0.05  # of the largest shape's area: a smaller shape is dirt
SHAPE = 0.25  # of the largest shape's area: a larger one beside it may be another digit

BLANK = "blank"  # a note

Grey = NDArray[np.float32]


class Prepared(NamedTuple):
    """What the model sees of a picture."""

    image_1HW: Tensor  # uint8 [1, 28, 28], light on dark
    notes: tuple[str, ...]  # what a person should know: "blank", "2 shapes: the largest is read"


def read_picture(path: Path) -> tuple[Grey, tuple[str, ...]]:
    """An image file as grey levels float32 [H, W], 0 is black and 255 white, and notes on the file.

    What is transparent is white; the camera's orientation is undone. Raises `UserError` if it is no PNG or JPEG.
    """
    from PIL import Image, ImageOps

    try:
        with opened_regular(path) as file, Image.open(file, formats=("PNG", "JPEG")) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise UserError(f"{cut(path)} has {opened.width} x {opened.height} pixels: cut the digit out")
            frames = getattr(opened, "n_frames", 1)
            notes = (f"{frames} frames: the first is read",) if frames > 1 else ()
            upright = ImageOps.exif_transpose(opened)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            if upright.mode.startswith("I"):  # 16 bits: "L" would cut off what is above 255
                return np.asarray(upright, np.float32) / np.float32(257), notes
            return np.asarray(upright.convert("L"), np.float32), notes
    except (OSError, Image.DecompressionBombError, ValueError, SyntaxError, RuntimeError, EOFError) as error:
        raise UserError(f"{cut(path)} cannot be read as an image ({cause(error)}): give a PNG or JPEG of one digit"
                        ) from None


def prepare(grey_HW: Grey) -> Prepared:
    """The digit of a picture as the model wants it. A picture of 28 x 28 keeps its pixels: only a light border, which
    means a dark digit on light paper, inverts it.
    """
    if grey_HW.shape == (SIDE, SIDE):
        border = np.concatenate([grey_HW[0], grey_HW[-1], grey_HW[:, 0], grey_HW[:, -1]])
        image = 255 - grey_HW if np.median(border) > 127 else grey_HW
        return Prepared(_tensor(image), (BLANK,) if np.ptp(image) < LEAST_CONTRAST else ())
    ink, noise = _ink(reduced(grey_HW))
    contrast = float(ink.max())
    if contrast < max(LEAST_CONTRAST, NOISE_LEVELS * noise):
        return Prepared(_tensor(np.zeros((SIDE, SIDE), np.float32)), (BLANK,))
    digit, others = _largest(ink, noise, contrast)
    rows, columns = np.flatnonzero(digit.any(1)), np.flatnonzero(digit.any(0))
    level = np.percentile(ink[digit & (ink > CORE * contrast)], 75)
    crop = (np.where(digit, ink, 0) / level).clip(0, 1)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    notes = (f"{others + 1} shapes: the largest is read",) if others else ()
    return Prepared(_tensor(255 * _centred(_resized(crop, BOX / max(crop.shape)).clip(0, 1))), notes)


def reduced(grey_HW: Grey) -> Grey:
    """The picture with at most `WORKING_SIDE` pixels on a side."""
    return _resized(grey_HW, min(1.0, WORKING_SIDE / max(grey_HW.shape)))


def _tensor(image_HW: Grey) -> Tensor:
    return torch.from_numpy(image_HW.round().astype(np.uint8)).unsqueeze(0)


def _resized(image_HW: Grey, factor: float) -> Grey:
    """The image `factor` times as large, at least one pixel wide."""
    from PIL import Image

    if factor == 1:
        return image_HW
    height, width = (max(1, round(factor * length)) for length in image_HW.shape)
    return np.asarray(Image.fromarray(image_HW).resize((width, height), Image.Resampling.BICUBIC))


def _ink(grey_HW: Grey) -> tuple[Grey, float]:
    """In grey levels, after a mean over 3 x 3 pixels: how much each pixel differs from the paper towards the ink, and
    the deviation of the paper's noise. The paper is a plane through the border, so that light may fall from a side.
    """
    height, width = grey_HW.shape
    padded = np.pad(grey_HW, 1, mode="edge")
    smooth: Grey = np.mean([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    plane: Grey = np.stack([np.ones_like(x), x / width, y / height], -1)
    is_paper = np.ones(grey_HW.shape, bool)
    is_paper[2:-2, 2:-2] = False
    residual: Grey = smooth - np.median(smooth[is_paper])
    noise = 0.0
    for _ in range(3):  # a digit that touches the border is no paper
        noise = 1.4826 * float(np.median(np.abs(residual[is_paper])))  # a normal distribution's deviation
        is_paper &= np.abs(residual) <= max(3 * noise, 1)
        residual = smooth - plane @ np.linalg.lstsq(plane[is_paper], smooth[is_paper], rcond=None)[0]
    return (residual if residual.max() > -residual.min() else -residual), noise


def _largest(ink_HW: Grey, noise: float, contrast: float) -> tuple[NDArray[np.bool_], int]:
    """The pixels of the largest shape with its parts, such as the separate bar of a 5; and the number of other shapes
    of a digit's size.
    """
    is_core = ink_HW > CORE * contrast
    labels = _labels(ink_HW > max(EDGE * contrast, NOISE_LEVELS * noise))
    names, areas = np.unique(labels[is_core], return_counts=True)
    order = np.argsort(-areas)
    names, areas = names[order], areas[order]
    digit, others = labels == names[0], 0
    left, right = np.flatnonzero(digit.any(0))[[0, -1]]
    for name, area in zip(names[1:], areas[1:], strict=True):
        if area < SPECK * areas[0]:
            break
        columns = np.flatnonzero((labels == name).any(0))
        if columns[-1] >= left and columns[0] <= right:
            digit |= labels == name
        else:
            others += bool(area >= SHAPE * areas[0])
    return digit, others


def _labels(mask_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """A number for each pixel of the mask, the same for pixels that are connected, also by a corner; 0 outside.

    A union-find over the runs of each row (Rosenfeld and Pfaltz 1966).
    """
    height, width = mask_HW.shape
    steps = np.diff(np.pad(mask_HW.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    first = np.searchsorted(rows, np.arange(height + 1))  # run of each row
    for row in range(1, height):
        above, here = int(first[row - 1]), int(first[row])
        while above < first[row] and here < first[row + 1]:
            if starts[above] <= ends[here] and starts[here] <= ends[above]:  # a corner is enough
                parents[root(here)] = root(above)
            above, here = (above + 1, here) if ends[above] < ends[here] else (above, here + 1)
    numbers = np.array([root(run) + 1 for run in range(len(rows))], np.int64)
    labels = np.zeros(height * (width + 1), np.int64)
    np.add.at(labels, rows * (width + 1) + starts, numbers)
    np.add.at(labels, rows * (width + 1) + ends, -numbers)
    return labels.cumsum().reshape(height, width + 1)[:, :-1]


def _centred(digit_HW: Grey) -> Grey:
    """The digit, of at most 20 x 20, in 28 x 28 with its centre of mass in the middle, as far as whole pixels allow."""
    image = np.zeros((SIDE, SIDE), np.float32)
    corner = []
    for axis, length in enumerate(digit_HW.shape):
        mass = digit_HW.sum(axis=1 - axis)
        centre = float((mass * (np.arange(length) + 0.5)).sum() / mass.sum())
        corner.append(min(max(round(CENTRE - centre), 0), SIDE - length))
    top, left = corner
    image[top : top + digit_HW.shape[0], left : left + digit_HW.shape[1]] = digit_HW
    return image
