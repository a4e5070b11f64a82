"""Every knob of a training run, once: its default, its help, its check. Command-line flags are generated from it.

Knows nothing of torch, processes or files. All checks raise `UserError`, naming the flag, what was got and what is
allowed.

In one file, because every option has its default, help and check here, once.
"""

from __future__ import annotations

import math
import re
from dataclasses import Field, asdict, dataclass, field, fields
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mnist_dist.errors import UserError
from mnist_dist.text import cut, is_text

REFERENCE_BATCH_SIZE = 200  # the tutorial's mini-batch: the default, and what --lr-rule scales from
DATASETS = ("auto", "mnist", "fashion-mnist", "kmnist", "synthetic")
# These do not change what a run computes, so its config.yaml leaves them out.
NOT_IN_FILE = ("output_dir", "resume", "quiet")
# Each machine of a run may have its own: files lie in other places, the data are compared by their digest, and the main
# process alone records the run.
OF_A_MACHINE = ("dataset", "data_dir", "mirror", "output_dir", "wandb", "wandb_project", "wandb_entity", "wandb_notes",
                "wandb_group", "run_name", "tags", "quiet")

# Headings of --help, each above the option with which it begins.
HEADINGS = {"dataset": "data", "batch_size": "batch and optimizer", "epochs": "length and evaluation",
            "dtype": "precision and speed", "output_dir": "what a run leaves, and resume", "wandb": "Weights & Biases"}


class Every(NamedTuple):
    """How often something is due: `number` of `unit`s (epochs, steps, samples or seconds); a number of 0 is never."""

    number: int
    unit: str


def knob(default: Any, kind: type, help: str, *, metavar: str | None = None, **rule: Any) -> Any:
    """A field of `TrainConfig`: rule is any of choices=…, minimum=…, maximum=…, above=…, and fixed=True for an option
    that a resumed run may not change, because it changes the result; none=True if the word none unsets it.
    """
    return field(default=default, metadata={"kind": kind, "help": help, "metavar": metavar, **rule})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of `mnist-dist train`. Raises `UserError` if a value or a combination is not allowed."""

    dataset: str = knob("auto", str, "auto = MNIST from --data-dir or its mirrors, else the embedded digits, with a "
                        "warning; synthetic = the embedded digits", choices=DATASETS)
    data_dir: str = knob("data", str, "folder that holds torchvision's MNIST/raw or the four IDX files themselves, .gz "
                         "or not; downloads go there", metavar="DIR")
    mirror: str | None = knob(None, str, "base URL to download from, tried before torchvision's (also: environment "
                              "variable MNIST_DIST_MIRROR)", metavar="URL", url=True)
    batch_size: int | None = knob(None, int, "global batch: samples that one optimizer step averages over, whatever "
                                  f"the number of processes (default {REFERENCE_BATCH_SIZE})", minimum=1)
    per_device_batch_size: int | None = knob(None, int, "samples per process in one optimizer step; alternative to "
                                             "--batch-size", minimum=1)
    gradient_accumulation_steps: int = knob(1, int, "cut each process's share of a batch into this many passes; the "
                                            "result is the same and needs less memory", minimum=1,
                                            maximum=1_000_000)
    lr: float = knob(1e-4, float, "Adam's learning rate", above=0.0, fixed=True)
    lr_rule: str = knob("none", str, f"scale --lr from a batch of {REFERENCE_BATCH_SIZE} to the global batch: by the "
                        "square root of the ratio, or by the ratio", choices=("none", "sqrt", "linear"), fixed=True)
    seed: int = knob(0, int, "seed of the initial weights and of the order of the samples", minimum=0,
                     maximum=2**32 - 1, fixed=True)
    shuffle: bool = knob(True, bool, "a new order each epoch; --no-shuffle is file order", fixed=True)
    epochs: int = knob(20, int, "passes over the training images", minimum=1)
    max_steps: int | None = knob(None, int, "end after this many optimizer steps, if that comes first; none = no limit",
                                minimum=1, none=True)
    target_nll: str | None = knob(None, str, "end when the test NLL (mean per image, nats) is at or below this; of "
                                  "several, separated by commas, the lowest; none = no target", metavar="X[,X]",
                                  none=True)
    evaluate_every: str | None = knob(None, str, "evaluate also within the epochs, each time after N samples, rounded "
                                      "up to whole steps: 10000samples; none = at their ends alone", metavar="Nsamples",
                                      none=True)
    noise_scale: bool = knob(False, bool, "estimate the gradient noise scale in each epoch, from some of its steps; "
                             "not with --reproducible, Local SGD, fp16 or batches of one sample", fixed=True)
    dtype: str = knob("float32", str, "float64 is for proving exactness: 1 and N processes agree to 1e-12; in float32 "
                      "the rounding, amplified by Adam, grows to 1e-4 in three epochs",
                      choices=("float32", "float64"), fixed=True)
    mixed_precision: str | None = knob(None, str, "default: the launcher's choice, else no; fp16 needs a GPU",
                                       choices=("no", "fp16", "bf16"), fixed=True)
    compile: str = knob("auto", str, "compile the whole step; auto = if the run has steps enough to save more time "
                        "than compiling takes: 12,000 on the CPU, on a GPU what launch/qualify.sh has measured; fused "
                        "= many steps with one launch, on one GPU", choices=("auto", "on", "off", "fused"))
    reproducible: bool = knob(False, bool, "the same bits on any number of processes and any processor: every sum is "
                              "exact, and so has no order; slower", fixed=True)
    gradient_compression: str = knob("none", str, "send gradients between processes as fp16 or bf16, or as PowerSGD's "
                                     "rank-1 factors: approximate, so the number of processes changes the result",
                                     choices=("none", "fp16", "bf16", "powersgd"), fixed=True)
    local_sgd_steps: int = knob(1, int, "Local SGD: each process takes this many steps alone, then the weights (not "
                                "Adam's moments) are averaged; approximate, so the number of processes changes the "
                                "result", minimum=1, fixed=True)
    timeout: float = knob(300.0, float, "seconds that a process waits for another one before it ends with an error",
                          above=0.0, maximum=1e7, metavar="SECONDS")
    output_dir: str | None = knob(None, str, "folder for everything a run leaves (default runs/<time>-<id>)",
                                  metavar="DIR")
    checkpoint_every: str = knob("1epoch", str, "a number with its unit: 2epochs, 100steps, 30s; or never",
                                 metavar="N[epochs|steps|s]")
    keep_checkpoints: int = knob(2, int, "newest checkpoints to keep", minimum=1)
    resume: bool = knob(False, bool, "continue from the newest whole checkpoint in --output-dir; without one, start "
                        "from the beginning")
    log_every: str | None = knob(None, str, "how often the loss within an epoch is recorded: a number with its unit, "
                                 "20steps or 1000samples, or never (default about 50 times an epoch)",
                                 metavar="N{steps,samples}")
    quiet: bool = knob(False, bool, "print warnings and the closing line only")
    wandb: str = knob("auto", str, "auto = online if an API key is configured and W&B is not switched off in one of "
                      "its own ways, else offline or disabled; never asks, never stops a run",
                      choices=("auto", "online", "offline", "disabled"))
    wandb_project: str = knob("mnist_dist", str, "W&B project (also: WANDB_PROJECT)", metavar="NAME")
    wandb_entity: str | None = knob(None, str, "W&B team or user (also: WANDB_ENTITY)", metavar="NAME")
    wandb_group: str | None = knob(None, str, "W&B group, for runs that belong together", metavar="NAME")
    run_name: str | None = knob(None, str, "name of the run in W&B (also: WANDB_NAME; default like "
                                "b200-p2-lr1e-4-seed0)", metavar="NAME")
    tags: str | None = knob(None, str, "W&B tags, separated by commas (also: WANDB_TAGS)", metavar="A,B")
    wandb_notes: str | None = knob(None, str, "W&B: what the run is about (also: WANDB_NOTES)")

    def __post_init__(self) -> None:
        for option in fields(self):
            # the class is frozen; values are set once, here, as they are checked
            object.__setattr__(self, option.name, checked(option, getattr(self, option.name)))
        if self.batch_size is not None and self.per_device_batch_size is not None:
            raise UserError(
                f"--batch-size {self.batch_size} and --per-device-batch-size {self.per_device_batch_size} say the same "
                "thing twice: give one of the two"
            )
        if self.batch_size is None and self.per_device_batch_size is None:
            object.__setattr__(self, "batch_size", REFERENCE_BATCH_SIZE)
        if self.dtype == "float64" and self.mixed_precision in ("fp16", "bf16"):
            raise UserError(
                f"--dtype float64 and --mixed-precision {self.mixed_precision} exclude each other: drop one"
            )
        if self.resume and self.output_dir is None:
            raise UserError("--resume needs --output-dir: name the folder of the run to continue")
        if self.reproducible:
            self._check_reproducible()
        if self.compile in ("on", "fused") and self.clashes_with_compile:
            raise UserError(f"--compile {self.compile} and {self.clashes_with_compile} exclude each other: drop one")
        _ = self.checkpoint_interval, self.targets, self.evaluation_samples, self.log_interval

    def _check_reproducible(self) -> None:
        clashes = {
            "--gradient-accumulation-steps": self.gradient_accumulation_steps > 1,
            "--mixed-precision": self.mixed_precision in ("fp16", "bf16"),
            "--gradient-compression": self.gradient_compression != "none",
            "--local-sgd-steps": self.local_sgd_steps > 1,
        }
        for flag, clash in clashes.items():
            if clash:
                raise UserError(f"--reproducible and {flag} exclude each other: drop one")

    @property
    def common(self) -> dict[str, Any]:
        """The options that must be the same on all machines of a run."""
        return {name: value for name, value in asdict(self).items() if name not in OF_A_MACHINE}

    @property
    def clashes_with_compile(self) -> str | None:
        """The option that needs the plain step, or None."""
        needs_plain = {
            "--reproducible": self.reproducible,
            "--mixed-precision fp16": self.mixed_precision == "fp16",  # its loss scaling reads each step's gradients
            "--gradient-compression": self.gradient_compression != "none",
            "--local-sgd-steps": self.local_sgd_steps > 1,
        }
        return next((flag for flag, clash in needs_plain.items() if clash), None)

    @property
    def targets(self) -> tuple[float, ...]:
        """The values of `target_nll`, the highest first."""
        try:
            targets = [float(part) for part in self.target_nll.split(",")] if self.target_nll else []
        except ValueError:
            targets = [math.nan]
        if not all(0 < value < math.inf for value in targets):
            raise UserError("--target-nll must be a number above 0, or some separated by commas; got "
                            f"{_shown(self.target_nll)}")
        return tuple(sorted(set(targets), reverse=True))

    @property
    def evaluation_samples(self) -> int | None:
        """`evaluate_every`, read: `10000samples` is 10000."""
        if self.evaluate_every is None:
            return None
        return _every("--evaluate-every", self.evaluate_every, "samples?", "10000samples").number

    @property
    def checkpoint_interval(self) -> Every:
        """`checkpoint_every`, read: `100steps` is Every(100, "steps")."""
        return _every("--checkpoint-every", self.checkpoint_every, "epochs?|steps?|s",
                      "2epochs, 100steps or 30s, or never")

    @property
    def log_interval(self) -> Every | None:
        """`log_every`, read: `20steps` is Every(20, "steps"); None if it is not given."""
        if self.log_every is None:
            return None
        return _every("--log-every", self.log_every, "steps?|samples?", "20steps or 1000samples, or never")

    def global_batch_size(self, num_processes: int) -> int:
        """Samples that one optimizer step averages over. Raises `UserError` if there are fewer than processes."""
        size = self.batch_size or (self.per_device_batch_size or 0) * num_processes
        if size < num_processes:
            raise UserError(
                f"--batch-size {size} is smaller than the {num_processes} processes, and each needs a sample in every "
                f"step: give --batch-size {num_processes} or more, or start at most {size} processes"
            )
        return size

    def learning_rate(self, global_batch_size: int) -> float:
        """The rate in force: --lr scaled by --lr-rule from the reference batch of 200 to this one."""
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_rule]
        rate = self.lr * (global_batch_size / REFERENCE_BATCH_SIZE) ** power
        if not 0 < rate < math.inf:
            raise UserError(f"--lr {self.lr:g} with --lr-rule {self.lr_rule} is {rate:g} at a batch of "
                            f"{global_batch_size}: give another --lr")
        return rate


def checked(option: Field, value: Any) -> Any:
    """`value` as the option's type, or `UserError`. Text is read as on the command line, also from a file."""
    kind, choices = option.metadata["kind"], option.metadata.get("choices")
    flag = flag_of(option.name)
    if value is None and (option.default is None or option.name in NOT_IN_FILE):
        return None
    if value == "none" and option.metadata.get("none"):
        return None
    if isinstance(value, bool) and choices and {"on", "no"} & set(choices):
        # YAML 1.1 reads the words on, off and no as booleans
        value = "on" if value else "no" if "no" in choices else "off"
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):  # of an axis of a study
        value = value.lower() == "true"
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        else:
            value = _whole(value) if kind is int else kind(value)
            if kind is float and not math.isfinite(value):
                raise ValueError
    except (ValueError, OverflowError):
        name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise UserError(f"{flag} must be {name}{_rule(option)}, got {_shown(value)}") from None
    if choices and value not in choices:
        raise UserError(f"{flag} must be one of {', '.join(choices)}; got {_shown(value)}")
    rule = option.metadata
    if (
        ("minimum" in rule and value < rule["minimum"])
        or ("maximum" in rule and value > rule["maximum"])
        or ("above" in rule and value <= rule["above"])
    ):
        raise UserError(f"{flag} must be {_rule(option).removeprefix(' ')}, got {_shown(value)}")
    if kind is str and not value.strip():
        raise UserError(f"{flag} must not be empty")
    if kind is str and not is_text(value):
        raise UserError(f"{flag} must not have control characters, or bytes that are no text; got {_shown(value)}")
    if rule.get("url"):
        _check_url(flag, value)
    return value


def _every(flag: str, text: str, units: str, examples: str) -> Every:
    """`20steps` as Every(20, "steps"), and `30s` as Every(30, "seconds"); `never`, if it is among the examples, has the
    number 0. `units` is a regular expression. Raises `UserError`.
    """
    if text.strip() == "never" and "never" in examples:
        return Every(0, "steps")
    match = re.fullmatch(rf"(\d{{1,18}})\s*({units})", text.strip(), re.ASCII)
    if not match or int(match[1]) == 0:
        raise UserError(f"{flag} must be a number of at least 1 with its unit, like {examples}; got "
                        f"{_shown(text.strip())}")
    return Every(int(match[1]), "seconds" if match[2] == "s" else f"{match[2].removesuffix('s')}s")


def _check_url(flag: str, text: str) -> None:
    """Raises `UserError`, without the text, unless it is plain where user and password end and the host begins."""
    try:
        url = urlsplit(text)
        is_plain = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        is_plain &= "@" not in url.path + url.query + url.fragment and url.netloc.count("@") <= 1
    except ValueError:
        is_plain = False
    if not is_plain or not re.fullmatch(r"[!$%&()*+,./:;=?@\[\]\w~-]+", text, re.ASCII):
        raise UserError(f"{flag} must be a URL like http://HOST/FOLDER/ or https://USER:PASSWORD@HOST/, with special "
                        "characters in user and password as %2F (/), %23 (#), %40 (@), %20 (blank); the value is not "
                        "shown, because it may hold a password")


def _shown(value: Any) -> str:
    return cut(repr(value))


def _whole(value: str | int | float) -> int:
    """The value as a whole number; `32.0` and `1e2` are some too, as sweeps write them. Raises `ValueError` if it is
    none, or has more than 18 digits.
    """
    try:
        exact = Decimal(value)
    except ArithmeticError:
        raise ValueError from None
    if not exact.is_finite() or exact.adjusted() > 17 or exact != exact.to_integral_value():
        raise ValueError
    return int(exact)


def _rule(option: Field) -> str:
    rule = option.metadata
    if "maximum" in rule and "above" in rule:
        return f" above {rule['above']:g} and at most {rule['maximum']:,.0f}"
    if "maximum" in rule:
        return f" from {rule['minimum']} to {rule['maximum']}"
    if "minimum" in rule:
        return f" at least {rule['minimum']}"
    return f" above {rule['above']:g}" if "above" in rule else ""


def flag_of(name: str) -> str:
    """`batch_size` as it is typed: `--batch-size`."""
    return "--" + name.replace("_", "-")
