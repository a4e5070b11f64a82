"""The commands beside `train`, each in one module, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mnist_dist.errors import UserError


@contextmanager
def writing_to(output_dir: Path) -> Iterator[None]:
    """What is done inside writes to the folder that --output-dir names. Raises `UserError` if that fails."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output-dir {output_dir} cannot be written ({error.strerror}): give another") from None
