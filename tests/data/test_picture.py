"""A picture of a digit becomes what MNIST has: 20 x 20 in 28 x 28, light on dark, centred by mass."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mnist_dist.data.picture import prepare, read_picture
from mnist_dist.errors import UserError

LEVELS = {"black on white": (255, 0), "white on black": (0, 255), "grey on grey": (170, 110), "faint": (200, 160)}


def page(*, height=200, width=150, shapes=(((60, 40), (90, 140)),), paper=255, ink=0, noise=0.0, light=0.0, seed=0):
    """A page with an L in each of the boxes ((left, top), (right, bottom)); light falls in from the left."""
    drawn = Image.new("L", (width, height), paper)
    for (left, top), (right, bottom) in shapes:
        stroke = max(1, (bottom - top) // 8)
        ImageDraw.Draw(drawn).rectangle((left, top, left + stroke, bottom), fill=ink)
        ImageDraw.Draw(drawn).rectangle((left, bottom - stroke, right, bottom), fill=ink)
    pixels = np.asarray(drawn, np.float32) - light * np.arange(width, dtype=np.float32) / width
    return (pixels + noise * np.random.default_rng(seed).standard_normal(pixels.shape)).clip(0, 255).astype(np.float32)


def inked(image_1HW):
    """Rows and columns of the ink's bounding box, and its centre of mass."""
    pixels = image_1HW[0].numpy().astype(float)
    rows, columns = np.flatnonzero(pixels.max(1) > 50), np.flatnonzero(pixels.max(0) > 50)
    centre = [float((pixels.sum(axis) * (np.arange(28) + 0.5)).sum() / pixels.sum()) for axis in (1, 0)]
    return (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1), centre


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("noise, light", [(0, 0), (4, 0), (0, 60), (3, 40)])
def test_any_page_gives_the_same_image(levels, noise, light):
    paper, ink = levels
    image, notes = prepare(page(paper=paper, ink=ink, noise=noise, light=light))
    (top, bottom), (left, right), _ = inked(image)
    reference = prepare(page()).image_1HW
    assert not notes and abs(bottom - top - 20) <= 1 and 4 <= right - left <= 8
    assert (image.float() - reference.float()).abs().mean() < 8, "grey levels of 255"


@settings(max_examples=60, deadline=None)
@given(st.integers(30, 260), st.integers(4, 130), st.integers(0, 500), st.integers(0, 500), st.booleans(),
       st.floats(0, 6), st.integers(0, 10**6))
def test_any_size_and_place_is_centred_in_a_box_of_20(height, width, above, beside, is_dark, noise, seed):
    paper, ink = (255, 0) if is_dark else (0, 255)
    box = ((beside + 3, above + 3), (beside + 3 + width, above + 3 + height))
    image, notes = prepare(page(height=above + height + 40, width=beside + width + 40, shapes=(box,), paper=paper,
                                ink=ink, noise=noise, seed=seed))
    (top, bottom), (left, right), centre = inked(image)
    assert image.shape == (1, 28, 28) and image.dtype.is_floating_point is False
    assert 18 <= max(bottom - top, right - left) <= 21
    assert all(abs(value - 14.5) <= 1 for value in centre), centre
    assert "blank" not in notes


@pytest.mark.parametrize("paper", [0, 90, 255])
@pytest.mark.parametrize("noise", [0, 3, 20])
def test_a_page_without_a_digit_is_blank(paper, noise):
    image, notes = prepare(page(shapes=(), paper=paper, noise=noise))
    assert notes == ("blank",) and image.max() == 0


def test_several_shapes_are_noted_and_the_largest_is_read():
    two = prepare(page(width=300, shapes=(((40, 40), (70, 140)), ((150, 60), (180, 130)))))
    assert two.notes == ("2 shapes: the largest is read",)
    assert np.array_equal(two.image_1HW, prepare(page(width=300, shapes=(((40, 40), (70, 140)),))).image_1HW)


def test_dirt_is_left_out_and_a_bar_above_a_digit_is_kept():
    clean = page()
    dirty = clean.copy()
    dirty[5:9, 5:9] = dirty[180:183, 120:123] = 0
    assert prepare(dirty).notes == () and np.array_equal(prepare(dirty).image_1HW, prepare(clean).image_1HW)
    barred = clean.copy()
    barred[20:28, 60:90] = 0
    image, notes = prepare(barred)
    assert notes == () and (image != prepare(clean).image_1HW).any(), "the bar of a 5 belongs to it"


def test_an_image_of_28_pixels_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.float32)
    pixels[0] = pixels[-1] = pixels[:, 0] = pixels[:, -1] = 0
    assert np.array_equal(prepare(pixels).image_1HW[0], pixels)
    assert np.array_equal(prepare(255 - pixels).image_1HW[0], pixels), "a light border means dark ink"
    assert prepare(np.zeros((28, 28), np.float32)).notes == ("blank",)


@pytest.mark.filterwarnings("error")
def test_a_picture_of_any_size_is_prepared():
    random = np.random.default_rng(0)
    for shape in itertools.product((1, 2, 3, 5, 28, 60), (1, 2, 4, 5, 28, 90)):
        noise = random.random(shape)
        for pixels in (np.zeros(shape), np.full(shape, 255), 255 * noise, 255 * (noise < 0.5)):
            image, _ = prepare(pixels.astype(np.float32))
            assert image.shape == (1, 28, 28) and image.dtype == torch.uint8


def written(image, path, **options):
    image.save(path, **options)
    return read_picture(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_a_file_is_read(mode, tmp_path):
    drawn = Image.fromarray(page().astype(np.uint8))
    if mode == "I;16":
        drawn = Image.fromarray(page().astype(np.uint16) * 257)
    elif mode == "CMYK":
        grey, _ = written(drawn.convert(mode), tmp_path / "d.jpg", quality=95)
        assert prepare(grey).notes == () and abs(grey - page()).mean() < 4
        return
    grey, notes = written(drawn if mode == "I;16" else drawn.convert(mode), tmp_path / "d.png")
    assert notes == () and grey.dtype == np.float32 and np.array_equal(grey, page())


def test_what_is_transparent_is_paper(tmp_path):
    ink = np.zeros((200, 150, 4), np.uint8)
    ink[..., 3] = 255 - page()
    grey, _ = written(Image.fromarray(ink), tmp_path / "d.png")
    assert np.array_equal(grey, page())


def test_a_turned_photograph_is_upright(tmp_path):
    drawn = Image.fromarray(page().astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    grey, _ = written(drawn.transpose(Image.Transpose.ROTATE_90), tmp_path / "d.jpg", exif=exif, quality=95)
    assert grey.shape == page().shape and abs(grey - page()).mean() < 4


def test_of_a_moving_picture_the_first_frame_is_read_and_said(tmp_path):
    frames = [Image.fromarray(page(ink=ink).astype(np.uint8)) for ink in (0, 60, 120)]
    grey, notes = written(frames[0], tmp_path / "d.png", save_all=True, append_images=frames[1:])
    assert notes == ("3 frames: the first is read",) and np.array_equal(grey, page())


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "d.png").write_text("no picture")
    Image.new("1", (30_000, 2_000)).save(tmp_path / "large.png")
    for name, needle in [("d.png", "cannot be read as an image"), ("missing.png", "No such file"),
                         ("", "cannot be read as an image"), ("large.png", "30000 x 2000 pixels")]:
        with pytest.raises(UserError, match=needle):
            read_picture(tmp_path / name)
