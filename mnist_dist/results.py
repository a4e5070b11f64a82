"""What the end of a run leaves beside its figures: the model, the pictures, and where it ran.

Called by the main process alone; `load_model` reads a run's model back, executing nothing from it.
"""

from __future__ import annotations

import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mnist_dist
from mnist_dist.checkpoint import tensor_bytes
from mnist_dist.data import Images, scale
from mnist_dist.errors import UserError
from mnist_dist.launching import environment_number
from mnist_dist.loop import Trainer
from mnist_dist.model import MLP
from mnist_dist.processes import Team
from mnist_dist.record.files import replace_synced
from mnist_dist.record.folder import CURVES, MODEL, PREDICTIONS

GRID_IMAGES = 16  # the tutorial's 4 x 4 test images


def describe_environment(team: Team) -> dict[str, Any]:
    """What `result.json` says of where a run ran."""
    import accelerate

    device = team.accelerator.device
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        "num_processes": team.size,
        "num_machines": team.size // environment_number(("LOCAL_WORLD_SIZE",), team.size),
        "num_threads": torch.get_num_threads(),
        "mixed_precision": team.accelerator.mixed_precision,
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
        "mnist_dist": mnist_dist.__version__,
        "git_commit": _git_commit(),
    }


def peak_memory_bytes(team: Team) -> int:
    """The most memory that this process has held: of the GPU where it has one, else of the machine."""
    if team.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_commit() -> str | None:
    """The commit of the checkout that this code is in, with -dirty where it was changed; None where there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def summarise(records: Sequence[Mapping[str, Any]], target_nll: float | None) -> dict[str, float | int | None]:
    """The run's figures over its epochs. Seconds to the target are those of training, evaluation left out."""
    reached = [i for i, record in enumerate(records) if target_nll is not None and record["test_nll"] <= target_nll]
    until = records[: reached[0] + 1] if reached else []
    # rates are not averaged: samples over seconds, of all that was measured
    measured = [(r["samples_per_second"], r["train_seconds"] - r["warmup_seconds"]) for r in records
                if r["samples_per_second"]]
    seconds = sum(s for _, s in measured)
    return {
        "samples_per_second": sum(rate * s for rate, s in measured) / seconds if seconds else None,
        "best_test_nll": min((record["test_nll"] for record in records), default=None),
        "final_test_nll": records[-1]["test_nll"] if records else None,
        "seconds_to_target": sum(record["train_seconds"] for record in until) if until else None,
        "steps_to_target": until[-1]["step"] if until else None,
    }


def random_indices(images: Images, seed: int) -> list[int]:
    """The grid's images, drawn without replacement by `seed`."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:GRID_IMAGES].tolist()


def leave_results(folder: Path, trainer: Trainer, seed: int, records: Sequence[Mapping[str, Any]]
                  ) -> tuple[list[int], list[int]]:
    """Write the model and the pictures; returns the test set's labels and the model's guesses."""
    from mnist_dist.figures import draw_curves, draw_predictions

    replace_synced(folder / MODEL, tensor_bytes(trainer.module.state_dict()))
    trainer.module.eval()
    test = trainer.sets.test
    probabilities = predict(trainer.module, test.images, trainer.accelerator.device, trainer.dtype)
    picked = random_indices(test, seed)
    draw_predictions(test.images[picked], test.labels[picked], probabilities[picked], folder / PREDICTIONS,
                     f"{trainer.sets.name}: 16 random test images")
    draw_curves(records, folder / CURVES, f"{trainer.sets.name}, global batch {trainer.batch_size}, "
                f"{trainer.team.size} process{'es' if trainer.team.size > 1 else ''}")
    return test.labels.tolist(), probabilities.argmax(dim=1).tolist()


def predict(module: MLP, images_N1HW: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Probabilities [N, 10] of uint8 images [N, 1, 28, 28], on the CPU."""
    chunks = [module.probabilities(scale(chunk.to(device), dtype)).cpu() for chunk in images_N1HW.split(1000)]
    return torch.cat(chunks).float()


def load_model(folder: Path) -> MLP:
    """The model of a run's folder, in float32 on the CPU. Raises `UserError` where there is none, or not this model."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load((folder / MODEL).read_bytes())
        model = MLP()
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MODEL}: name the folder of a run that was completed") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / MODEL} cannot be read ({' '.join(str(error).split())[:200]}): name another run"
                        ) from None
    return model.eval()
