"""The files of `launch/` that other programs read."""

from __future__ import annotations

import pytest
import yaml
from support import ROOT

from mnist_dist.cli import parse
from mnist_dist.commands.shared import training_config


def test_the_train_job_is_one_of_kubeflow_trainer():
    """Its models drop a field that they do not know: what they give back must be the whole file."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api")
    job = yaml.safe_load((ROOT / "launch" / "trainjob.yaml").read_text())
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job
    trainer = job["spec"]["trainer"]
    assert trainer["command"][:3] == ["torchrun", "-m", "mnist_dist"]
    config = training_config(parse([*trainer["command"][3:], *trainer["args"]]))
    assert config.dataset == "mnist"
    assert config.resume and config.output_dir.startswith("/runs/")
    patch = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod = patch["template"]["spec"]["template"]["spec"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {one["name"] for one in pod["volumes"]}


def test_no_file_for_a_queue_trains_on_other_data_unseen():
    """With "auto" a node without data and without a network trains on the embedded digits."""
    assert "train --dataset mnist " in (ROOT / "launch" / "slurm.sbatch").read_text()
    sweep = yaml.safe_load((ROOT / "launch" / "wandb_sweep.yaml").read_text())
    assert sweep["parameters"]["dataset"] == {"value": "mnist"}
