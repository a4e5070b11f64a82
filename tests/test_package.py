"""The package as users install it: every module is in the wheel, and the wheel trains without the checkout."""

from __future__ import annotations

import sys
import zipfile

import pytest
from support import ROOT, result_of, run


def files_of(folder):
    """The package's files below the folder."""
    return [path for path in (folder / "mnist_dist").rglob("*") if path.is_file() and "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, unpacked: what `pip install .` puts beside the other packages."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))")
    # from a copy: setuptools writes into the folder that it builds
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in files_of(ROOT):
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    done = run([sys.executable, "-c", build, folder], cwd=source)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as packed:
        packed.extractall(folder / "installed")
    return folder / "installed"


def test_every_module_is_in_the_wheel(wheel):
    there = {path.relative_to(wheel) for path in files_of(wheel)}
    assert there == {path.relative_to(ROOT) for path in files_of(ROOT)}
    assert {path.suffix for path in there} == {".py", ".css", ".typed"}


@pytest.mark.long
def test_the_wheel_trains(wheel, small_dir, tmp_path):
    done = run([sys.executable, "-m", "mnist_dist", "train", "--data-dir", small_dir, "--max-steps",
                2, "--wandb", "disabled", "--output-dir", "run"], cwd=tmp_path, PYTHONPATH=str(wheel))
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run")["environment"]["git_commit"] is None, "it is the wheel that ran"
