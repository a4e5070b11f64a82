"""The command line: one clear line for bad input, exit status 2, nothing left behind; help without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from support import ROOT, TRAIN, assert_one_line_error, mnist_dist, result_of, run, run_here

from mnist_dist.cli import main, parse
from mnist_dist.commands.shared import training_config
from mnist_dist.config import HEADINGS, TrainConfig, flag_of
from mnist_dist.errors import UserError

BAD = {
    "unknown flag": (["--batchsize", "5"], "unknown option --batchsize: did you mean --batch-size?"),
    "unknown flag, nothing like it": (["--zzz"], "unknown option --zzz"),
    "no value": (["--lr"], "--lr: expected one argument"),
    "batch 0": (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    "negative lr": (["--lr", "-1e-3"], "--lr must be above 0, got -0.001"),
    "both batch sizes": (["--batch-size", "8", "--per-device-batch-size", "4"], "say the same thing twice"),
    "batch smaller than processes": (["--processes", "3", "--batch-size", "2"], "smaller than the 3 processes"),
    "unknown dataset": (["--dataset", "cifar"], "--dataset must be one of"),
    "no processes": (["--processes", "0"], "--processes must be a whole number from 1 to 4,096"),
    "not a number": (["--processes", "two"], "got 'two'"),
    "resume without a folder": (["--resume"], "--resume needs --output-dir"),
    "missing config": (["--config", "none.yaml"], "--config none.yaml cannot be read"),
    "a word": (["fast"], "unknown option fast"),
    "another's flag": (["--optimizer", "sgd"], "unknown option --optimizer: mnist-dist train --help"),
    "a part of a flag": (["--batch", "5"], "unknown option --batch: did you mean --batch-size?"),
    "a control character": (["--run-name", "a\x1b[31m"], "a\\x1b[31m has control characters"),
    "bytes": (["--data-dir", "a\udcff"], "a\\udcff has control characters, or bytes that are no text"),
    "a long path": (["--config", "x" * 5000], "xxx...xxx"),
    "many processes": (["--processes", "9" * 5000], "--processes must be a whole number from 1 to 4,096"),
    "float64 in half": (["--dtype", "float64", "--mixed-precision", "bf16"], "exclude each other"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    words, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    assert run_here(["train", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mnist-dist: error: ") and message in lines[0]
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_unknown_key_in_a_config_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("learning_rate: 1\n")
    monkeypatch.chdir(tmp_path)
    assert run_here(["train", "--config", "c.yaml"]) == 2
    assert "unknown keys learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["fly"], ["--dry-run"]])
def test_a_command_is_needed(words, capsys):
    assert run_here(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_only_the_run_itself_finds(small_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for words, needle in (
        (["--mixed-precision", "fp16"], "fp16 needs a GPU"),
        (["--output-dir", tmp_path / "file" / "run"], "cannot be written"),
        (["--data-dir", tmp_path / "file"], "is not a folder"),
    ):
        done = mnist_dist("train", "--data-dir", small_dir, *words, cwd=tmp_path)
        assert_one_line_error(done, needle)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_divergence_ends_with_3_and_names_the_step(small_dir, tmp_path):
    done = mnist_dist("train", "--data-dir", small_dir, "--lr", "1e39", "--batch-size", 100, "--epochs", 3, "--wandb",
                      "disabled", "--output-dir", "run", "--processes", 2, "--checkpoint-every", "1steps", cwd=tmp_path)
    assert_one_line_error(done, "training diverged", "step", "--lr", status=3)
    assert result_of(tmp_path / "run")["status"] == "diverged"
    assert not (tmp_path / "run" / "checkpoints").exists(), "no checkpoint has useless weights"
    done = mnist_dist("train", "--data-dir", small_dir, "--lr", "1e38", "--max-steps", 1, "--wandb", "disabled",
                      "--output-dir", "short", cwd=tmp_path)
    assert_one_line_error(done, "the test NLL is nan after step 1", "--lr", status=3)


def test_a_folder_that_holds_a_run_is_left_as_it_was(small_dir, tmp_path):
    words = ["train", "--data-dir", small_dir, "--max-steps", 2, "--wandb", "disabled", "--output-dir", "run"]
    assert mnist_dist(*words, cwd=tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert_one_line_error(mnist_dist(*words, cwd=tmp_path), "already holds a run", "--resume")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = mnist_dist("train", "--config", "run/config.yaml", "--output-dir", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    first, second = (result_of(tmp_path / name)["epochs"][0] for name in ("run", "again"))
    assert first["test_nll_sum"] == second["test_nll_sum"], "a run's config repeats it"


def test_one_process_of_several_speaks(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run([*launcher, TRAIN, "--batch-size", "0"], cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("--batch-size must be at least 1") == 1


def test_help_imports_no_torch():
    code = ("import sys; from mnist_dist.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules, 'matplotlib' in sys.modules, 'wandb' in sys.modules)")
    for words in (["--help"], ["train", "--help"], ["predict", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False False False", done.stderr
        assert "usage: mnist-dist" in done.stdout


def test_every_knob_has_its_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert [flag_of(option.name) for option in fields(TrainConfig) if flag_of(option.name) not in text] == []


def test_options_are_in_groups_with_headings_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{heading}:\n") for heading in HEADINGS.values()]
    assert places == sorted(places) and len(places) >= 5
    assert text.startswith("usage: mnist-dist train [OPTIONS]\n")
    assert "(default 0)" in text[text.index("--seed") :][:160]
    assert set(HEADINGS) <= {option.name for option in fields(TrainConfig)}


def test_the_versions_are_printed_without_imports():
    code = ("import sys; from mnist_dist.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    versions, imported = done.stdout.splitlines()
    assert re.fullmatch(r"mnist-dist [\d.]+, torch [\d.]+\S*, accelerate [\d.]+\S*", versions) and imported == "False"


def test_underscores_and_the_mirror_of_the_environment(monkeypatch):
    monkeypatch.setenv("MNIST_DIST_MIRROR", "http://from.environment/")
    config = training_config(parse(["train", "--batch_size=64", "--no_shuffle", "--data_dir", "a_b"]))
    assert (config.batch_size, config.shuffle, config.data_dir) == (64, False, "a_b")
    assert config.mirror == "http://from.environment/"
    assert training_config(parse(["train", "--mirror", "http://typed/"])).mirror == "http://typed/"
    with pytest.raises(UserError, match="expected one argument"):
        parse(["train", "--seed"])


@pytest.mark.parametrize(("words", "values"), [
    (["--reproducible=True", "--shuffle=False"], {"reproducible": True, "shuffle": False}),
    (["--reproducible=false", "--no-shuffle"], {"reproducible": False, "shuffle": False}),
    (["--shuffle=1", "--noise_scale=0"], {"shuffle": True, "noise_scale": False}),
    (["--batch_size=32.0", "--epochs=1e1"], {"batch_size": 32, "epochs": 10}),
    (["--local-rank=1", "--seed", "3"], {"seed": 3}), (["--local_rank=0"], {}),
])
def test_options_as_sweeps_and_launchers_write_them(words, values):
    config = training_config(parse(["train", *words]))
    assert {name: getattr(config, name) for name in values} == values
