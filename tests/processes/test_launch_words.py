"""What launchers say of a process: torchrun, MPI and SLURM, each read once into a `Launch`."""

from __future__ import annotations

import pytest

from mnist_dist.config import TrainConfig
from mnist_dist.errors import UserError
from mnist_dist.processes.launch_environment import Launch, read_launch
from mnist_dist.training.run import mixed_precision

ALONE = Launch()
OF_TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host0"}
OF_OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
               "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "host0"}
OF_INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, ALONE),
    ({"WORLD_SIZE": "1", "RANK": "0"}, ALONE),
    ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Launch(is_launched=True)),
    ({"WORLD_SIZE": "1", "MASTER_ADDR": "gone.example"}, ALONE),
    ({"RANK": "0"}, ALONE),
    ({"LOCAL_RANK": "0"}, ALONE),
    ({"RANK": "-1", "LOCAL_RANK": "-1", "WORLD_SIZE": ""}, ALONE),
    ({"MASTER_ADDR": "gone.example", "MASTER_PORT": "1"}, ALONE),
    ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "host0"},
     Launch(rank=5, size=8, local_rank=1, local_size=4, is_launched=True, master_address="host0")),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "host0"},
     Launch(rank=1, size=2, local_size=2, is_launched=True, master_address="host0")),
    ({"RANK": "0", "WORLD_SIZE": "2"}, Launch(size=2, local_size=2, is_launched=True)),
    (OF_TORCH, Launch(rank=1, size=2, local_rank=1, local_size=2, is_launched=True, is_one_machine=True,
                      master_address="host0")),
    (OF_OPEN_MPI, Launch(
        rank=3, size=4, local_rank=1, local_size=2, is_launched=True, has_one_output=True, master_address="host0")),
    ({**OF_OPEN_MPI, "WORLD_SIZE": "4"},
     Launch(
        rank=3, size=4, local_rank=1, local_size=2, is_launched=True, has_one_output=True, master_address="host0")),
    (OF_INTEL_MPI, Launch(rank=1, size=2, local_rank=1, local_size=2, is_launched=True, is_one_machine=True,
                          has_one_output=True)),
    ({**OF_OPEN_MPI, **OF_TORCH}, Launch(rank=1, size=2, local_rank=1, local_size=2, is_launched=True,
                                         is_one_machine=True, master_address="host0")),
    ({**OF_OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, ALONE),
    ({"ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
     Launch(use_cpu=True, mixed_precision="bf16", compiles=True)),
    ({"ACCELERATE_USE_CPU": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"}, ALONE),
])
def test_launchers(environment, expected):
    environment = dict(environment)
    assert read_launch(environment) == expected
    if expected.size == 1:
        assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *OF_OPEN_MPI} & environment.keys() - {
            "MASTER_ADDR"}, "Accelerate would wait for others"


@pytest.mark.parametrize(("rank", "local_rank", "has_one_output", "says"), [
    (0, 0, False, True), (1, 1, False, False), (2, 0, False, True), (0, 0, True, True), (2, 0, True, False)])
def test_an_error_that_all_know_is_said_once_in_each_place(rank, local_rank, has_one_output, says):
    launch = Launch(rank=rank, size=4, local_rank=local_rank, local_size=2, has_one_output=has_one_output)
    assert launch.says_errors == says


@pytest.mark.parametrize(("environment", "said"), [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 without RANK: to run one process, type `unset WORLD_SIZE`;"),
    ({"RANK": "1"}, "RANK=1 without WORLD_SIZE: to run one process, type `unset RANK`;"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 without WORLD_SIZE"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"},
     "RANK=1, WORLD_SIZE=2 and LOCAL_RANK=1 without MASTER_ADDR, the host of rank 0: to run one process, type `unset "
     "RANK WORLD_SIZE LOCAL_RANK`;"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK=2 and WORLD_SIZE=2 cannot be"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 and WORLD_SIZE=1 cannot be"),
    ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0 cannot be"),
    ({**OF_TORCH, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2 cannot be"),
    ({**OF_TORCH, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 cannot be"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a whole number at least 0, got 'one'"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE must be a whole number at least 0, got '99"),
    ({"WORLD_SIZE": "2", **OF_OPEN_MPI}, "WORLD_SIZE=2 and OMPI_COMM_WORLD_RANK=3, "),
    ({name: value for name, value in OF_OPEN_MPI.items() if name != "MASTER_ADDR"}, "without MASTER_ADDR"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true asks for a way to train"),
    ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP=1 asks for a way to train"),
])
def test_incomplete_and_impossible_variables(environment, said):
    with pytest.raises(UserError) as raised:
        read_launch(dict(environment))
    assert said in str(raised.value) and "unset" in str(raised.value)
    assert len(str(raised.value)) <= 400


def test_threads_by_level_of_nesting():
    environment = {"OMP_NUM_THREADS": "4,2"}
    read_launch(environment)
    assert environment["OMP_NUM_THREADS"] == "4"


def slurm(rank, **more):
    """A task of `srun -N 3 -n 5 python train.py` in job 4711."""
    local, node = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)][rank]
    return {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node), "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "5",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[07-08,12]", **more}


def test_srun_starts_the_ranks_of_a_run():
    for rank, (local, local_size) in enumerate([(0, 2), (1, 2), (0, 2), (1, 2), (0, 1)]):
        environment = slurm(rank)
        launch = read_launch(environment)
        assert launch == Launch(rank=rank, size=5, local_rank=local, local_size=local_size, is_launched=True,
                                has_one_output=True, master_address="gpu07",
                                master_port=int(environment["MASTER_PORT"]))
        assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
            "RANK": str(rank), "WORLD_SIZE": "5", "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(local_size)}
        assert environment["MASTER_ADDR"] == "gpu07"
        assert int(environment["OMP_NUM_THREADS"]) >= 1
    ports = {read_launch(words) and words["MASTER_PORT"] for words in map(slurm, range(5))}
    assert len(ports) == 1 and 20_000 <= int(ports.pop()) < 30_000, "the same for all tasks of a step"
    other = slurm(0, SLURM_STEP_ID="3")
    read_launch(other)
    assert other["MASTER_PORT"] != environment["MASTER_PORT"], "another for the next step"


def test_what_is_set_wins_over_slurm():
    environment = slurm(1, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500", OMP_NUM_THREADS="3", SLURM_CPUS_PER_TASK="7")
    read_launch(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "29500")
    assert environment["OMP_NUM_THREADS"] == "3"
    assert read_launch(slurm(1, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")) == Launch(
        size=2, is_launched=True), "torchrun under srun, one task per node"
    assert read_launch(slurm(1, WORLD_SIZE="5", MASTER_ADDR="gpu07")).rank == 1, "as job scripts export it"
    with pytest.raises(UserError, match=r"WORLD_SIZE=4 and SLURM_PROCID=1, .* disagree"):
        read_launch(slurm(1, WORLD_SIZE="4"))
    with pytest.raises(UserError, match=r"SLURM_PROCID=5, .* cannot be"):
        read_launch(slurm(1, SLURM_PROCID="5"))
    assert read_launch(slurm(1, PMI_RANK="1", PMI_SIZE="5")).local_size == 2, "srun --mpi=pmi2 sets these too"
    cores = slurm(1, SLURM_CPUS_PER_TASK="7")
    read_launch(cores)
    assert cores["OMP_NUM_THREADS"] == "7"


def test_a_batch_script_and_a_step_of_one_task_are_one_process(monkeypatch):
    script = slurm(0)
    del script["SLURM_STEP_NUM_TASKS"]
    assert read_launch(script) == ALONE and "RANK" not in script
    assert read_launch(slurm(0, SLURM_STEP_NUM_TASKS="1")) == ALONE
    shell = slurm(0, SLURM_PTY_PORT="40001", PMI_RANK="0", PMI_SIZE="5", SLURM_STEP_ID="4294967290")
    for is_there in (False, True):
        monkeypatch.setattr("mnist_dist.processes.launch_environment.has_terminal", lambda is_there=is_there: is_there)
        assert read_launch({**shell, "RANK": "0", "WORLD_SIZE": "5"}).size == 5
        assert read_launch(dict(shell)).size == (1 if is_there else 5), "an srun within the shell has no terminal"
    assert read_launch(shell) == ALONE and "RANK" not in shell and "PMI_SIZE" not in shell, "srun --pty"


def test_machines():
    assert Launch(size=8, local_size=4).num_machines == 2 and ALONE.num_machines == 1


def test_a_launchers_precision_is_checked_unless_an_option_replaces_it():
    launch = read_launch({"ACCELERATE_MIXED_PRECISION": "fp8"})
    with pytest.raises(UserError, match="mixed precision must be no, fp16 or bf16; got 'fp8'"):
        mixed_precision(TrainConfig(), launch)
    assert mixed_precision(TrainConfig(mixed_precision="bf16"), launch) == "bf16"
    assert mixed_precision(TrainConfig(dtype="float64"), launch) == "no"
    for precision in ("fp16", "bf16"):  # the launcher's, which the option does not show
        launch = read_launch({"ACCELERATE_MIXED_PRECISION": precision})
        with pytest.raises(UserError, match=r"fp16 needs a GPU|--reproducible and mixed precision bf16 exclude each"):
            mixed_precision(TrainConfig(reproducible=True), launch)
        assert mixed_precision(TrainConfig(reproducible=True, mixed_precision="no"), launch) == "no"
