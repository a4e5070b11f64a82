"""What a run leaves at its end beside its metrics: the model and the pictures.

Called by the main process alone; `load_model` reads a run's model back, executing nothing from it.
"""

from __future__ import annotations

import platform
import resource
from collections.abc import Sequence
from pathlib import Path

import accelerate
import torch
from torch import Tensor

import mnist_dist
from mnist_dist.data import Images, scale
from mnist_dist.disk.files import read_limited, replace_synced
from mnist_dist.errors import UserError
from mnist_dist.processes.launch_environment import Launch
from mnist_dist.processes.team import Team
from mnist_dist.record.checkpoint import tensor_bytes
from mnist_dist.record.environment import Environment, git_commit, processor_name
from mnist_dist.record.metrics import EpochRecord
from mnist_dist.record.run_folder import CURVES, MODEL, PREDICTIONS, read_points
from mnist_dist.text import cause, counted, cut
from mnist_dist.training.model import MLP
from mnist_dist.training.trainer import Trainer

GRID_IMAGES = 16  # the tutorial's 4 x 4 test images


def describe_environment(launch: Launch, team: Team, step: str, onednn_from: int | None) -> Environment:
    """Hardware and versions of this run; `step` is the kind of its optimizer step, `onednn_from` the least
    multiplications of a product that is oneDNN's.
    """
    device = team.accelerator.device
    return Environment(
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        num_processes=team.size,
        num_machines=launch.num_machines,
        num_threads=torch.get_num_threads(),
        mixed_precision=team.accelerator.mixed_precision,
        step=step,
        torch=torch.__version__,
        accelerate=accelerate.__version__,
        python=platform.python_version(),
        mnist_dist=mnist_dist.__version__,
        git_commit=git_commit(),
        onednn_from=onednn_from,
    )


def peak_memory_bytes(team: Team) -> int:
    """The largest memory use of this process so far, in bytes: of the GPU if it has one, else of the machine."""
    if team.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def random_indices(images: Images, seed: int) -> list[int]:
    """The grid's images, drawn without replacement by `seed`."""
    return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:GRID_IMAGES].tolist()


def leave_results(folder: Path, trainer: Trainer, seed: int, records: Sequence[EpochRecord]
                  ) -> tuple[list[int], list[int]]:
    """Write the model and the pictures; returns the test set's labels and the model's guesses."""
    from mnist_dist.record.run_pictures import draw_curves, draw_predictions

    replace_synced(folder / MODEL, tensor_bytes(trainer.module.state_dict()))
    trainer.module.eval()
    test = trainer.sets.test
    probabilities = predict(trainer.module, test.images)
    picked = random_indices(test, seed)
    draw_predictions(test.images[picked], test.labels[picked], probabilities[picked], folder / PREDICTIONS,
                     f"{trainer.sets.name}: 16 random test images")
    batch, size = trainer.global_batch_size, trainer.team.size
    draw_curves(records, read_points(folder), len(trainer.sets.train), batch, folder / CURVES,
                f"{trainer.sets.name}, global batch {batch}, {counted(size, 'process', 'processes')}")
    return test.labels.tolist(), probabilities.argmax(dim=1).tolist()


def predict(module: MLP, images_N1HW: Tensor) -> Tensor:
    """Probabilities [N, 10] of uint8 images [N, 1, 28, 28], on the CPU."""
    weight = next(module.parameters())
    chunks = [module.probabilities(scale(chunk.to(weight.device), weight.dtype)) for chunk in images_N1HW.split(1000)]
    return torch.cat(chunks).cpu().float()


def load_model(folder: Path) -> MLP:
    """The model of a run's folder, in float32 on the CPU. Raises `UserError` if it is missing or another model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(read_limited(folder / MODEL))
        for name, tensor in tensors.items():
            if tensor.dtype not in (torch.float32, torch.float64) or not tensor.isfinite().all():
                raise ValueError(f"{cut(name)} is {tensor.dtype}, and finite numbers of float32 or float64 are needed")
        model = MLP()
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {MODEL}: name the folder of a run that was completed") from None
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / MODEL} cannot be read ({cause(error)}): name another run") from None
    return model.eval()
