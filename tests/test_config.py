"""Every knob: its check and its message, where its value comes from, and the file that it is kept in."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from mnist_dist.config import Every, TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.record.config_file import config_text, merged, read_config

BAD = [
    ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
    ({"batch_size": "x"}, "--batch-size must be a whole number at least 1, got 'x'"),
    ({"batch_size": 2.5}, "--batch-size must be a whole number"),
    ({"batch_size": True}, "--batch-size must be a whole number"),
    ({"lr": -1e-4}, "--lr must be above 0, got -0.0001"),
    ({"lr": "nan"}, "--lr must be a number above 0, got nan"),
    ({"epochs": "0"}, "--epochs must be at least 1"),
    ({"seed": -1}, "--seed must be from 0 to"),
    ({"shuffle": "yes"}, "--shuffle must be true or false"),
    ({"dataset": "cifar"}, "--dataset must be one of auto, mnist, fashion-mnist, kmnist, synthetic; got 'cifar'"),
    ({"lr_rule": "cubic"}, "--lr-rule must be one of none, sqrt, linear"),
    ({"mixed_precision": "fp8"}, "--mixed-precision must be one of no, fp16, bf16"),
    ({"data_dir": " "}, "--data-dir must not be empty"),
    ({"data_dir": None}, "--data-dir must be text"),
    ({"checkpoint_every": "5"}, "--checkpoint-every must be a number of at least 1 with its unit"),
    ({"checkpoint_every": "0steps"}, "got '0steps'"),
    ({"batch_size": 200, "per_device_batch_size": 50}, "--batch-size 200 and --per-device-batch-size 50"),
    ({"dtype": "float64", "mixed_precision": "bf16"}, "exclude each other"),
    ({"resume": True}, "--resume needs --output-dir"),
    ({"reproducible": True, "gradient_accumulation_steps": 2}, "--reproducible and --gradient-accumulation-steps"),
    ({"reproducible": True, "compile": "on"}, "--compile on and --reproducible"),
    ({"epochs": "9" * 20_000}, "--epochs must be a whole number at least 1, got '9999"),
    ({"epochs": 10**4000}, "--epochs must be a whole number at least 1, got "),
    ({"epochs": "1e30"}, "--epochs must be a whole number"),
    ({"batch_size": "1e-1"}, "--batch-size must be a whole number"),
    ({"evaluate_every": f"{'9' * 5000}samples"}, "--evaluate-every must be a number of at least 1 with its unit"),
    ({"checkpoint_every": f"{'9' * 5000}s"}, "--checkpoint-every must be a number"),
    ({"gradient_accumulation_steps": 10**9}, "--gradient-accumulation-steps must be from 1 to 1000000"),
    ({"timeout": 1e300}, "--timeout must be above 0 and at most 10,000,000"),
    ({"lr": 10**400}, "--lr must be a number above 0"),
    ({"output_dir": "a\0b"}, "--output-dir must not have control characters"),
    ({"data_dir": "a\udcff"}, "--data-dir must not have control characters, or bytes that are no text; got 'a\\udcff'"),
    ({"run_name": "\x1b[31mred"}, "--run-name must not have control characters"),
    ({"dataset": "x" * 5000}, "xxx...xxx"),
    ({"dataset": ["a"] * 5000}, "--dataset must be text"),
]
PASSWORDS = ["p/w", "p#w", "p'w", "p w", "p@w", "p?w", 'p"w', "p\\w", "p<w"]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_values_are_named(values, message):
    with pytest.raises(UserError) as caught:
        TrainConfig(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize("url", [*(f"http://someone:{password}@host/" for password in PASSWORDS), "host", "//host/",
                                 "file:///etc/", "http://", "http://[::1/", "http://host:99999/", "http://u@v@host/"])
def test_a_url_that_may_be_read_in_two_ways_is_not_shown(url):
    """Where the password ends is not plain: a part of it could be written down, or sent to another host."""
    with pytest.raises(UserError) as caught:
        TrainConfig(mirror=url)
    message = str(caught.value)
    assert "--mirror must be a URL like http://HOST/FOLDER/" in message and len(message) <= 400
    assert not any(part in message for part in ("someone", "p/w", "p#w", "p w", "u@v"))


@pytest.mark.parametrize("url", ["http://host/", "https://someone:p%2Fw@host:8000/a/b?c=d", "http://[::1]:80/",
                                 "http://token@10.0.0.1/", "http://host.example/~x/(y)/"])
def test_plain_urls(url):
    assert TrainConfig(mirror=url).mirror == url


@pytest.mark.parametrize(("value", "number"), [("32.0", 32), ("1e2", 100), (32.0, 32), ("1_000", 1000), (" 7 ", 7)])
def test_whole_numbers_as_sweeps_write_them(value, number):
    assert TrainConfig(batch_size=value).batch_size == number


def test_a_rate_that_the_rule_makes_infinite():
    with pytest.raises(UserError, match=r"--lr 1e\+308 with --lr-rule linear is inf at a batch of 1000"):
        TrainConfig(lr=1e308, lr_rule="linear").learning_rate(1000)


def test_every_knob_has_help_and_its_default_passes_its_own_check():
    assert TrainConfig().batch_size == 200
    assert all(option.metadata["help"] for option in fields(TrainConfig))


@pytest.mark.parametrize(("text", "every"), [
    ("1epoch", Every(1, "epochs")), ("2epochs", Every(2, "epochs")), ("100steps", Every(100, "steps")),
    ("1step", Every(1, "steps")), ("30s", Every(30, "seconds")), ("never", Every(0, "steps")),
])
def test_checkpoint_interval(text, every):
    assert TrainConfig(checkpoint_every=text).checkpoint_interval == every


@pytest.mark.parametrize(("rule", "batch", "rate"), [
    ("none", 800, 1e-4), ("sqrt", 800, 2e-4), ("linear", 800, 4e-4), ("sqrt", 200, 1e-4), ("linear", 50, 2.5e-5),
])
def test_learning_rate_rules(rule, batch, rate):
    assert TrainConfig(lr_rule=rule).learning_rate(batch) == pytest.approx(rate, rel=1e-12)


def test_global_batch():
    assert TrainConfig().global_batch_size(3) == 200
    assert TrainConfig(per_device_batch_size=17).global_batch_size(3) == 51
    with pytest.raises(UserError, match=r"--batch-size 2 is smaller than the 3 processes.*at most 2 processes"):
        TrainConfig(batch_size=2).global_batch_size(3)
    assert TrainConfig(reproducible=True).global_batch_size(3) == 200


def test_a_config_file_holds_what_the_run_does(tmp_path):
    config = TrainConfig(
        dataset="kmnist", data_dir="d", mirror="http://m/", per_device_batch_size=7, epochs=3, max_steps=9,
        target_nll="0.3,0.25", lr=3e-5, seed=4, shuffle=False, lr_rule="sqrt", gradient_accumulation_steps=2,
        mixed_precision="no", compile="off", output_dir="o", checkpoint_every="30s", keep_checkpoints=5, timeout=7.5,
        wandb="offline", wandb_project="p", wandb_group="g", run_name="n", tags="a,b",
    )
    path = tmp_path / "config.yaml"
    path.write_text(config_text(config))
    again = merged(read_config(path), {})
    assert asdict(again) == {**asdict(config), "output_dir": None}


def test_the_command_line_wins_over_the_file():
    assert merged({"lr": 0.5, "epochs": 3}, {"epochs": "7"}) == TrainConfig(lr=0.5, epochs=7)
    assert merged({"batch_size": 64}, {"per_device_batch_size": "8"}) == TrainConfig(per_device_batch_size=8)
    assert merged({"per_device_batch_size": 8}, {"batch_size": "64"}) == TrainConfig(batch_size=64)


def test_what_yaml_makes_of_words_and_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-4\ncompile: on\nmixed_precision: no\nbatch-size: 50\n")
    assert read_config(path) == {"lr": 1e-4, "compile": "on", "mixed_precision": "no", "batch_size": 50}


@pytest.mark.parametrize(("content", "message"), [
    (b"learning_rate: 1\nlr: 1\n", "unknown keys learning_rate: mnist-dist train --help lists"),
    (b"- a\n- b\n", "must hold a mapping"), (b"a: [1\n", "is not YAML"), (b"\xff\xfe\x00", "cannot be read"),
    (b"epochs: many\n", "--epochs must be a whole number"), (b"!!python/object/apply:os.getcwd []", "is not YAML"),
    (b"a: &a [x]\nb: *a\n", "it has an alias"), (b"epochs: " + b"9" * 20_000, "is not YAML"),
    (b"#" * 70_000, "at most 65,536 are read"), (b'"\\e[31m": 1\n', "unknown keys \\x1b[31m"),
])
def test_bad_files_are_named(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_config(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)") as caught:
        read_config(tmp_path / ("1" * 1000))
    assert len(str(caught.value)) <= 400
