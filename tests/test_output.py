"""Output that fails ends no command and changes no exit status; what is printed carries no control characters."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, epochs_of, mnist_dist, result_of, wait_for_epochs

from mnist_dist import text
from mnist_dist.record.checkpoint import load_newest

WORDS = ["--batch-size", "50", "--wandb", "disabled", "--output-dir", "run"]
# of standard output and standard error; {} is the command
WAYS = {
    "a full disk": "{} > /dev/full 2> /dev/full",
    "closed": "{} >&- 2>&-",
    "closed, with no input": "{} <&- >&- 2>&-",
    "a reader that leaves": "{{ {} ; echo $? > status; }} 2>&1 | head -n 1; exit $(cat status)",
    "a reader that is not there": "{{ {} ; echo $? > status; }} 2>&1 | true; exit $(cat status)",
    "ASCII": "PYTHONIOENCODING=ascii {} --run-name zwölf > out 2>&1",
}
SOME = (("a full disk", 1), ("a reader that leaves", 1), ("closed", 2))  # are long, the others take minutes
CODE = "from mnist_dist.output import protect, say; protect(); {}; open('whole', 'w').close()"


def shell(line, cwd, timeout=300):
    return subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def python(code):
    return shlex.join([sys.executable, "-c", CODE.format(code)])


def train(*words):
    return shlex.join([sys.executable, "-m", "mnist_dist", "train", *map(str, words), *WORDS])


@pytest.mark.parametrize("way", [way for way in WAYS if way != "ASCII"])
def test_what_cannot_be_written_is_dropped(way, tmp_path):
    code = "[say('é' * 1000, is_error=error) for error in (False, True) for _ in range(300)]"
    assert shell(WAYS[way].format(python(code)), tmp_path).returncode == 0
    assert (tmp_path / "whole").exists()


def test_a_closed_descriptor_is_taken_by_no_file(tmp_path):
    """torch prints to descriptor 2: what is opened there would get it."""
    done = shell(python("import os; os.write(2, b'torch'); assert open('run', 'w').fileno() > 2") + " 2>&-", tmp_path)
    assert done.returncode == 0 and (tmp_path / "run").read_text() == ""


def test_other_letters_than_the_terminals(tmp_path):
    done = shell(f"PYTHONIOENCODING=ascii {python('say(chr(252) + chr(0xd800) + chr(27))')}", tmp_path)
    assert (done.returncode, done.stdout) == (0, "\\xfc\\ud800\\x1b\n")


@pytest.mark.parametrize(("way", "size"), [
    pytest.param(way, size, marks=pytest.mark.long if (way, size) in SOME else pytest.mark.faults)
    for way in WAYS for size in (1, 2)])
def test_training_goes_on(way, size, small_dir, tmp_path):
    words = ["--data-dir", small_dir, "--epochs", 2, *(["--processes", 2] if size > 1 else [])]
    done = shell(WAYS[way].format(train(*words)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run")["status"] == "completed" and epochs_of(tmp_path / "run") == 2
    assert load_newest(tmp_path / "run" / "checkpoints", pytest.fail) is not None


@pytest.mark.parametrize(("ignored", "size"), [
    pytest.param(ignored, size, marks=pytest.mark.long if ignored == (size == 1) else pytest.mark.faults)
    for ignored in (False, True) for size in (1, 2)])
def test_a_terminal_that_is_closed(ignored, size, small_dir, tmp_path):
    """It sends SIGHUP: a stop with a checkpoint. Under nohup that is ignored, and nothing can be printed any more."""
    words = train("--data-dir", small_dir, *(["--processes", 2] if size > 1 else []), "--checkpoint-every", "1000s",
                  "--epochs", 6 if ignored else 1000)
    child, terminal = pty.fork()
    if not child:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        if ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execvp("bash", ["bash", "-c", f"{words}; echo $? > status"] if ignored else ["bash", "-c", f"exec {words}"])
    wait_for_epochs(tmp_path / "run", 2)
    if size > 1 and ignored:  # ranks have sessions of their own, and get no signal of the terminal's
        os.kill(child, signal.SIGHUP)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    if ignored:
        assert (tmp_path / "status").read_text() == "0\n"
        assert result_of(tmp_path / "run")["status"] == "completed" and epochs_of(tmp_path / "run") == 6
    else:
        assert os.waitstatus_to_exitcode(status) == 129
        assert load_newest(tmp_path / "run" / "checkpoints", pytest.fail) is not None
        assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.long
def test_ctrl_c_before_the_first_step_says_so_and_leaves_no_run(small_dir, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "mnist_dist", "train", "--data-dir", str(small_dir), *WORDS],
                               cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "run").is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert errors == "mnist-dist: error: stopped by SIGINT: the same command starts again\n"
    again = mnist_dist("train", "--data-dir", small_dir, *WORDS, "--epochs", 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.long
def test_ctrl_c_while_modules_are_imported_is_one_line(small_dir, tmp_path):
    """An exception would come out of some imports as another one, with a traceback."""
    for number in range(12):
        waits = tmp_path / f"{number}"
        waits.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_dist", "train", "--data-dir", str(small_dir), *WORDS], cwd=tmp_path,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={
                **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers' / 'moments'}", "WAITS_AT": "start",
                "RANK": "0", "WAITS_IN": str(waits), "WAITS_SECONDS": "0"})
        while not list(waits.iterdir()):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(number * 0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
        assert (process.returncode, errors) == (
            130, "mnist-dist: error: stopped by SIGINT: the same command starts again\n"), number


@given(st.text(st.characters(codec=None), max_size=300))
def test_a_message_is_one_short_printable_line(written):
    line = text.one_line(written)
    assert len(line) <= 400 and line.isprintable() and len(text.cut(written)) <= 80
    line.encode()


@pytest.mark.parametrize(("error", "said"), [
    (OSError(36, "File name too long", "x" * 5000), "File name too long"), (OSError("no disk"), "no disk"),
    (KeyError("name"), "KeyError: 'name'"), (ValueError("\x1b[31m"), "ValueError: \\x1b[31m"),
])
def test_a_cause_has_no_file_name(error, said):
    assert text.cause(error) == said
    assert len(text.cause(ValueError("x" * 5000))) == 120


@pytest.mark.parametrize("url", ["http://u:p@host/", "https://user:pa%20ss@host:8000/x", "ftp://token@h"])
def test_no_password_is_shown(url):
    assert text.one_line(f"see {url}") == f"see {url.split('//')[0]}//{url.split('@')[1]}"
