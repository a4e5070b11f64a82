"""Text from outside, as messages show it."""

from __future__ import annotations

import pytest

from mnist_dist.text import first_line

PLACE = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] "


@pytest.mark.parametrize(("text", "line"), [
    (PLACE + "Read error [10.77.0.3]:5273: Connection reset by peer. This is typically caused by a remote worker "
     "hanging or bugs in the application. Check the logs of the remote worker before reporting an error.",
     "Read error [10.77.0.3]:5273: Connection reset by peer"),
    (PLACE + "Timed out waiting 5000ms for recv operation to complete",
     "Timed out waiting 5000ms for recv operation to complete"),
    ("\n CUDA out of memory.\nTried to allocate", "CUDA out of memory."), ("", "RuntimeError"),
])
def test_the_first_line_of_an_error(text, line):
    assert first_line(RuntimeError(text)) == line
