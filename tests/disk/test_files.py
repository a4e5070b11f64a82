"""What is written below a folder stays below it, whatever links, pipes and devices lie there."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnist_dist.disk import files

CALLS = {  # each does something to a path
    "write": lambda path: files.write_synced(path, b"new"),
    "replace": lambda path: files.replace_synced(path, b"new"),
    "append": lambda path: files.append_line(path, "new\n"),
    "json": lambda path: files.replace_json(path, [1]),
    "open": lambda path: os.close(files.open_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)),
    "remove": files.remove,
    "remove tree": files.remove_tree,
    "remove left": files.remove_left,
    "make folder": files.make_folder,
    "make the last": lambda path: files.make_folder(path, parents=False),
    "rename": lambda path: files.rename(path, path.with_name("renamed")),
    "rename to": lambda path: (files.write_synced(path.with_name("fresh"), b"new"),
                               files.rename(path.with_name("fresh"), path)),
    "sync": files.sync_folder,
    "names": files.names_in,
}
OBSTACLES = ("link to a file", "link to a folder", "link to nothing", "loop", "pipe", "device", "folder")


def snapshot(folder: Path) -> dict[str, str]:
    """Every name below the folder, with what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else os.readlink(path) if path.is_symlink() else b""
        found[str(path.relative_to(folder))] = f"{status.st_mode:o} {hashlib.sha256(os.fsencode(content)).hexdigest()}"
    return found


def place(kind: str, path: Path, outside: Path) -> None:
    """Put an obstacle at the path; the links lead to `outside`."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
        (path / "inner").write_text("inner")
    else:
        path.symlink_to({"link to a file": outside / "file", "link to a folder": outside / "folder", "device":
                         Path("/dev/zero"), "link to nothing": outside / "new", "loop": path}[kind])


def outside_of(folder: Path) -> Path:
    outside = folder / "outside"
    (outside / "folder" / "deeper").mkdir(parents=True)
    for name in ("file", "folder/file", "folder/deeper/file", "folder/.file.1", "folder/step-000000001"):
        (outside / name).write_text(name)
    return outside


@pytest.mark.parametrize("kind", OBSTACLES)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("depth", ["at the name", "above it", pytest.param("above that", marks=pytest.mark.long)])
def test_nothing_outside_changes(depth, call, kind, tmp_path):
    outside, folder = outside_of(tmp_path), tmp_path / "run"
    path = {"at the name": folder / "file", "above it": folder / "folder" / "file",
            "above that": folder / "folder" / "deeper" / "file"}[depth]
    folder.mkdir()
    place(kind, path if depth == "at the name" else folder / "folder", outside)
    before = snapshot(outside)
    try:
        CALLS[call](path)
    except OSError as error:
        assert error.strerror and error.filename, "a message needs both"
    assert snapshot(outside) == before


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_tree_with_links_is_removed_alone(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tree")
    outside = outside_of(folder)
    places = [folder / "run"]
    places[0].mkdir()
    for number in range(data.draw(st.integers(1, 8))):
        path = data.draw(st.sampled_from(places)) / f"{number}"
        kind = data.draw(st.sampled_from(OBSTACLES))
        place(kind, path, outside)
        places += [path] * (kind == "folder")
    before = snapshot(outside)
    files.remove_tree(folder / "run")
    assert snapshot(outside) == before and not (folder / "run").exists()


def test_a_person_may_name_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert files.real(tmp_path / "link" / "run") == tmp_path / "disk" / "run"
    assert files.real(tmp_path / "disk") == tmp_path / "disk"


def test_a_path_as_it_is_typed_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.real(Path("runs/one")) == Path("runs/one")
    assert files.real(Path("../runs")) == Path("../runs")
    files.make_folder(Path("runs/one"))
    files.write_synced(Path("runs/one/file"), b"1")
    files.write_synced(Path("runs/../runs/file"), b"1")
    assert files.names_in(Path("runs/one")) == ["file"] and files.names_in(Path("nowhere")) == []


def test_modes_are_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        files.make_folder(tmp_path / "folder")
        files.replace_synced(tmp_path / "folder" / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o640


def test_a_file_that_is_being_replaced_is_never_in_parts(tmp_path):
    """What a process that was killed has left is removed, and that of a living one is not."""
    (tmp_path / ".file.999999999").write_text("of a process that is gone")
    (tmp_path / f".file.{os.getppid()}").write_text("of a living process")
    files.replace_synced(tmp_path / "file", b"new")
    assert sorted(files.names_in(tmp_path)) == sorted(["file", f".file.{os.getppid()}"])
