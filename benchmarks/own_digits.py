"""How well a run's model reads pictures of digits that are not prepared as MNIST's are.

    python -m benchmarks.own_digits RUN_DIR DATA_DIR [OUT.json]

Two kinds of pictures, from a seed: 1,000 images of the test set, enlarged 2 to 12 times, at a random place of a larger
page, with noise, dark on light or light on dark; and the ten digits printed in five fonts at five heights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mnist_dist.data import load
from mnist_dist.data.picture import prepare
from mnist_dist.tables import table
from mnist_dist.training.model import MLP
from mnist_dist.training.results import load_model, predict

NUMBER, SEED = 1000, 0
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")  # matplotlib has them
HEIGHTS = (0.73, 0.51, 0.36, 0.26, 0.18)  # of a digit, as shares of the page's height
PAGE = 300  # pixels
Grey = NDArray[np.float32]


def squeezed(grey_HW: Grey) -> Tensor:
    """The whole page fitted into 28 x 28, light on dark: how a picture was prepared before."""
    border = np.concatenate([grey_HW[0], grey_HW[-1], grey_HW[:, 0], grey_HW[:, -1]])
    light = 255 - grey_HW if np.median(border) > 127 else grey_HW
    side = max(light.shape)
    page = Image.new("L", (side, side))
    page.paste(Image.fromarray(light.astype(np.uint8)), tuple((side - length) // 2 for length in light.shape[::-1]))
    return torch.from_numpy(np.array(page.resize((28, 28), Image.Resampling.LANCZOS))).unsqueeze(0)


def enlarged(image_HW: NDArray[np.uint8], random: np.random.Generator) -> Grey:
    """A test image on a page: 2 to 12 times as large, anywhere on it, either polarity, noise of 0 to 12 levels."""
    factor = random.uniform(2, 12)
    side = round(28 * factor)
    digit = np.asarray(Image.fromarray(image_HW).resize((side, side), Image.Resampling.BICUBIC), np.float32)
    height, width = (side + random.integers(0, 2 * side, 2)).tolist()
    page = np.zeros((height, width), np.float32)
    top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
    page[top : top + side, left : left + side] = digit
    page += random.uniform(0, 12) * random.standard_normal(page.shape, np.float32)
    page = page.clip(0, 255)
    return page if random.random() < 0.5 else 255 - page


def printed(font: str, digit: int, share: float, random: np.random.Generator) -> Grey:
    """A digit in a font, black on a white page, as high as `share` of the page, at a random place."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    size = 10
    while True:  # the size of a font is not the height of its digits
        typeface = ImageFont.truetype(str(folder / f"{font}.ttf"), size)
        left, top, right, bottom = typeface.getbbox(str(digit))
        if bottom - top >= share * PAGE:
            break
        size += 2
    page = Image.new("L", (PAGE, PAGE), 255)
    x = random.integers(0, PAGE - (right - left) + 1) - left
    y = random.integers(0, PAGE - (bottom - top) + 1) - top
    ImageDraw.Draw(page).text((float(x), float(y)), str(digit), font=typeface, fill=0)
    return np.asarray(page, np.float32)


def test_pages(data_dir: str) -> Iterator[tuple[Grey, int]]:
    """The first 1,000 test images as pages, with their labels."""
    random = np.random.default_rng(SEED)
    test = load("mnist", data_dir).test
    for i in range(NUMBER):
        yield enlarged(test.images[i, 0].numpy(), random), int(test.labels[i])


def printed_pages(share: float) -> Iterator[tuple[Grey, int]]:
    """The 50 printed digits of one height."""
    random = np.random.default_rng(SEED)
    for font in FONTS:
        for digit in range(10):
            yield printed(font, digit, share, random), digit


def right(model: MLP, pages: list[tuple[Grey, int]], preparation: Callable[[Grey], Tensor]) -> int:
    """How many of the pages the model reads right."""
    images = torch.stack([preparation(page) for page, _ in pages])
    guesses = predict(model, images).argmax(1).tolist()
    return sum(guess == digit for guess, (_, digit) in zip(guesses, pages, strict=True))


def main(run_dir: str, data_dir: str, output: str | None = None) -> None:
    """Print the table, and write it as JSON if `output` is given."""
    model = load_model(Path(run_dir))
    test = load("mnist", data_dir).test
    as_they_are = predict(model, test.images[:NUMBER]).argmax(1)
    record = {"of the test set, as they are": {
        "pictures": NUMBER, "prepared": int((as_they_are == test.labels[:NUMBER]).sum())}}
    groups = {"the same on noisy pages": list(test_pages(data_dir)), **{
        f"printed, {share:g} of the page's height": list(printed_pages(share)) for share in HEIGHTS}}
    for name, pages in groups.items():
        record[name] = {"pictures": len(pages), "squeezed": right(model, pages, squeezed),
                        "prepared": right(model, pages, lambda page: prepare(page).image_1HW)}
    print("\n".join(table(["pictures", "number", "right, squeezed into 28 x 28", "right, prepared"],
                          [[name, *(str(row.get(key, "-")) for key in ("pictures", "squeezed", "prepared"))]
                           for name, row in record.items()])))
    if output:
        Path(output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
