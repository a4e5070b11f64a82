"""Reads the IDX files that MNIST comes in, .gz or not, straight into the memory that the images stay in."""

from __future__ import annotations

import contextlib
import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.disk.files import opened_regular
from mnist_dist.errors import UserError
from mnist_dist.text import cause

IDX_MAGIC = {"images": 0x00000803, "labels": 0x00000801}  # unsigned bytes in three dimensions, in one
SIDE = 28
MOST_UNPACKED = 1032  # bytes from one byte of a .gz file, the most that deflate can do (zlib's technical details)
MOST = 10_000_000  # images in a file: more do not fit a machine's memory, so the header is damaged
STEMS = {  # (split, what) to the file's name, less .gz
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def read_idx(path: Path, what: str) -> np.ndarray:
    """An IDX file of "images" uint8 [N, 28, 28] or "labels" uint8 [N], .gz or not. Raises `UserError`.

    The format: a big-endian magic number (element type and number of dimensions), the dimensions, the bytes
    (http://yann.lecun.com/exdb/mnist).
    """
    remedy = "put the original file there, or remove the folder's IDX files to have them downloaded"
    num_dimensions = 3 if what == "images" else 1
    header_bytes = 4 + 4 * num_dimensions
    try:
        with opened_regular(path) as opened, (
                gzip.open(opened) if path.suffix == ".gz" else contextlib.nullcontext(opened)) as file:
            head = file.read(header_bytes)
            header = np.frombuffer(head if len(head) == header_bytes else b"", dtype=">u4")
            if len(header) and header[0] != IDX_MAGIC[what]:
                raise UserError(
                    f"{path} begins with 0x{header[0]:08x}, but IDX {what} begin with 0x{IDX_MAGIC[what]:08x}: {remedy}"
                )
            shape = tuple(int(size) for size in header[1:])
            if shape and not (0 < shape[0] <= MOST and (what == "labels" or shape[1:] == (SIDE, SIDE))):
                raise UserError(f"{path} says that it holds {' x '.join(map(str, shape))}, but N x {SIDE} x {SIDE} is "
                                f"needed, N from 1 to {MOST:,}: {remedy}")
            # read into its place: the images may take most of the memory. The header of a damaged file may ask
            # for more than the file can hold
            most = os.fstat(opened.fileno()).st_size * (MOST_UNPACKED if path.suffix == ".gz" else 1)
            size = math.prod(shape) if shape else 0
            array = np.empty(min(size, most), dtype=np.uint8)
            num_bytes = len(head) + _fill(file, memoryview(array))  # type: ignore[arg-type]
    except FileNotFoundError:
        raise UserError(f"{path} is missing, while other files of its data set are there: {remedy}") from None
    except (OSError, EOFError, zlib.error, MemoryError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({cause(error)}): {remedy}") from None
    if not shape or array.size < size or num_bytes != header_bytes + size:
        held = f"more than {header_bytes + size}" if shape and num_bytes > header_bytes + size else str(num_bytes)
        said = f"says {header_bytes + size} in its header" if shape else "needs a header"
        raise UserError(f"{path} has {held} bytes and {said}: it is truncated or damaged; {remedy}")
    return array.reshape(shape)


def _fill(file: Any, place: memoryview) -> int:
    """Read the rest of the file into `place`; returns the number of bytes, one more if the file goes on."""
    filled = 0
    while filled < len(place) and (count := file.readinto(place[filled:])):
        filled += count
    return filled + len(file.read(1))  # not the rest of it, of which there may be no end
