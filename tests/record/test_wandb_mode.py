"""W&B is on if nothing switches it off: each of wandb's own ways, nothing sent, no address taken from a folder."""

from __future__ import annotations

import os

import pytest
from support import mnist_dist, records_of
from wandb_server import WandbServer

from mnist_dist.cli import parse
from mnist_dist.commands.shared import training_config
from mnist_dist.record.wandb_mode import mode_asked

KEY = "0123456789012345678901234567890123456789"
OFF = {  # of each way: the environment, the file of the working directory, the user's file, the mode
    "WANDB_MODE=disabled": ({"WANDB_MODE": "disabled"}, "", "", "disabled"),
    "WANDB_MODE=offline": ({"WANDB_MODE": "offline"}, "", "", "offline"),
    "WANDB_MODE=dryrun": ({"WANDB_MODE": "dryrun"}, "", "", "offline"),
    "WANDB_DISABLED=true": ({"WANDB_DISABLED": "true"}, "", "", "disabled"),
    "WANDB_DISABLED=Yes": ({"WANDB_DISABLED": "Yes", "WANDB_MODE": "online"}, "", "", "disabled"),
    "wandb offline": ({}, "offline", "", "offline"),
    "wandb disabled": ({}, "disabled", "", "disabled"),
    "offline by the user": ({}, "", "offline", "offline"),
    "disabled by the user": ({}, "", "disabled", "disabled"),
    "dryrun by the user": ({}, "", "dryrun", "offline"),
    "offline here, on elsewhere": ({}, "offline", "online", "offline"),
    "no such mode": ({"WANDB_MODE": "OFFLINE"}, "", "", "offline"),
}
ON = {
    "WANDB_DISABLED=false": ({"WANDB_DISABLED": "false"}, "", "", "online"),
    "WANDB_MODE=online before files": ({"WANDB_MODE": "online"}, "offline", "disabled", "online"),
    "nothing": ({}, "", "", "online"),
}


def settings(folder, **values):
    """A settings file of wandb's in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {value}\n" for name, value in values.items() if value]
    (folder / "settings").write_text("[default]\n" + "".join(lines))


def prepared(way, tmp_path):
    """The environment of a run in `tmp_path` in which W&B is switched on or off in this way."""
    environment, here, of_user, _ = {**OFF, **ON}[way]
    if here:
        settings(tmp_path / "wandb", mode=here)
    settings(tmp_path / "home", mode=of_user)
    return {**environment, "WANDB_CONFIG_DIR": str(tmp_path / "home")}


@pytest.mark.parametrize("way", [*OFF, *ON])
def test_the_mode_that_is_asked_for(way, tmp_path, monkeypatch):
    for name, value in prepared(way, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    warnings = []
    assert mode_asked("auto", warnings.append) == {**OFF, **ON}[way][3]
    assert len(warnings) == (way == "no such mode")
    assert [mode_asked(asked, pytest.fail) for asked in ("online", "offline", "disabled")] == [
        "online", "offline", "disabled"]


@pytest.mark.parametrize("damage", ["[default\nmode = x", "mode = offline", "[default]\nmode\n", "\x00",
                                    "[other]\nmode=offline"])
def test_a_damaged_settings_file_says_nothing(damage, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text(damage)
    monkeypatch.chdir(tmp_path)
    assert mode_asked("auto", pytest.fail) == "online"


def run(small_dir, tmp_path, *words, **environment):
    return mnist_dist("train", "--data-dir", small_dir, "--max-steps", 2, "--output-dir", "run", *words, cwd=tmp_path,
                      **environment)


QUICK, LONG = ("WANDB_MODE=dryrun",), ("WANDB_DISABLED=true", "wandb disabled", "offline by the user")


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in QUICK else pytest.mark.long if way in LONG else
                                              pytest.mark.faults) for way in OFF])
def test_nothing_is_sent(way, small_dir, tmp_path):
    with WandbServer() as server:
        done = run(small_dir, tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url, **prepared(way, tmp_path))
    assert done.returncode == 0 and server.requests == 0, done.stderr
    assert len(list((tmp_path / "run").glob("wandb/offline-run-*"))) == (OFF[way][3] == "offline")
    assert ("wandb sync" in done.stdout) == (OFF[way][3] == "offline")


def test_what_is_given_overrides_what_switches_it_off(small_dir, tmp_path):
    """And the environment's names of the run hold, but for those that are given."""
    with WandbServer() as server:
        done = run(small_dir, tmp_path, "--wandb", "online", "--tags", "given", WANDB_API_KEY=KEY,
                   WANDB_MODE="disabled", WANDB_BASE_URL=server.url, WANDB_PROJECT="of the environment",
                   WANDB_NAME="named", WANDB_TAGS="x,y")
    assert done.returncode == 0 and server.history, done.stderr
    assert server.keys == {f"api:{KEY}"}
    said = server.runs[0]
    assert (said["project"], said["displayName"], said["tags"]) == ("of the environment", "named", ["given"])


def test_flag_then_environment_then_the_continued_run_then_default(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("wandb_project: of the run\ntags: r\nmirror: http://run/\n")
    resumed = ["train", "--resume", "--output-dir", str(tmp_path)]
    assert training_config(parse(["train"])).wandb_project == "mnist_dist"
    assert training_config(parse(resumed)).wandb_project == "of the run"
    for name, value in (("WANDB_PROJECT", "p"), ("WANDB_NAME", "n"), ("WANDB_TAGS", "a,b"),
                        ("MNIST_DIST_MIRROR", "http://m/")):
        monkeypatch.setenv(name, value)
    for words in (["train"], resumed):
        config = training_config(parse(words))
        assert (config.wandb_project, config.run_name, config.tags, config.mirror) == ("p", "n", "a,b", "http://m/")
        config = training_config(parse([*words, "--wandb-project", "P", "--run-name", "N", "--tags", "A"]))
        assert (config.wandb_project, config.run_name, config.tags, config.mirror) == ("P", "N", "A", "http://m/")
    monkeypatch.setenv("WANDB_PROJECT", " ")
    assert training_config(parse(["train"])).wandb_project == "mnist_dist"


@pytest.mark.parametrize("key", ["base_url", pytest.param("http_proxy", marks=pytest.mark.long)])
def test_no_folder_says_where_to_send(key, small_dir, tmp_path):
    """The working directory's file, or one in the run's folder, names another server: it gets nothing."""
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    with WandbServer() as server, WandbServer() as other:
        settings(tmp_path / "home", base_url=server.url)
        for folder in (tmp_path / "wandb", tmp_path / "run" / "wandb"):
            settings(folder, **{key: other.url}, api_key="9" * 40, entity="somebody")
        done = run(small_dir, tmp_path, WANDB_API_KEY=KEY, WANDB_CONFIG_DIR=str(tmp_path / "home"))
    assert done.returncode == 0 and server.history, done.stderr
    assert other.requests == 0 and server.keys == {f"api:{KEY}"}
    assert f"has {key}: ignored" in done.stderr
    assert "somebody" in {update.get("entity") for update in server.runs}, "what a folder may say holds"


BROKEN = {
    "a key with a line break": {"WANDB_API_KEY": KEY[:20] + "\n" + KEY[20:]},
    "a mode that there is not": {"WANDB_MODE": "OFFLINE", "WANDB_API_KEY": KEY},
    "no home": {"HOME": None, "WANDB_CONFIG_DIR": None},
    "a number that is none": {"WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "soon"},
}


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case == "no home" else
                 pytest.mark.long if case == "a key with a line break" else pytest.mark.faults) for case in BROKEN])
def test_a_set_up_that_fails_means_offline(case, small_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        for name, value in BROKEN[case].items():
            if value is None:
                broken.delenv(name)
            else:
                broken.setenv(name, value)
        done = run(small_dir, tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert records_of(tmp_path / "run")["history"] and "wandb sync" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["run"], "nothing is written elsewhere"
    assert KEY[20:] not in done.stdout + done.stderr
