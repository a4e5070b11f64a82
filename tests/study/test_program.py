"""Any command as the training of a study: its placeholders, its axes, and what is wrong with them, in one line."""

from __future__ import annotations

import socket
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support import ROOT, run_here

from mnist_dist.cli import parse
from mnist_dist.commands.shared import training_config
from mnist_dist.commands.study import NOT_AN_AXIS, OPTIONS, request_from
from mnist_dist.config import checked
from mnist_dist.errors import UserError
from mnist_dist.study.plan.grid import Cell, Grid, PlannedRun, run_of
from mnist_dist.study.plan.table import read_table
from mnist_dist.study.run.program import Program, check_command, command_of, environment_of, read_axes

SHELL = """#!/bin/sh
samples=$((100 * $1))
cat > "$3/result.json" <<END
{"status": "completed", "environment": {"num_processes": $2}, "summary": {"global_batch_size": $1},
 "epochs": [{"measured_samples": $samples, "measured_seconds": 0.$4$1}]}
END
echo "mode $MODE"
"""


@pytest.fixture
def script(tmp_path):
    """A training that is a shell script: batch size, processes, folder, and a digit of its seconds."""
    path = tmp_path / "train.sh"
    path.write_text(SHELL)
    path.chmod(0o755)
    return path


def test_a_shell_script_with_axes_and_a_variable(script, tmp_path):
    folder = tmp_path / "study"
    command = f"{script} {{batch_size}} {{processes}} {{output_dir}} {{factor}}"
    words = ["study", "--command", command, "--axis", "factor=1,2", "--axis", "env:MODE=fast,safe", "--batch-sizes",
             "50,200", "--processes", "2", "--repeats", "1", "--wandb", "disabled", "--output-dir", str(folder)]
    assert run_here(words) == 0
    rows = read_table(folder)
    assert len(rows) == 8 + 2 and {row["status"] for row in rows} == {"completed"}
    for row in rows:
        output = (folder / "runs" / row["run"] / "output.txt").read_text()
        assert output == f"mode {row['options']['env:MODE']}\n"
    seconds = {(row["global_batch_size"], row["options"]["factor"]): row["epochs"][0]["measured_seconds"]
               for row in rows}
    assert seconds == {(50, "1"): 0.15, (50, "2"): 0.25, (200, "1"): 0.12, (200, "2"): 0.22}
    environment = rows[0]["environment"]
    assert environment["host"] == socket.gethostname() and environment["device"] and environment["device_name"]
    assert environment["torch"] == version("torch") and environment["num_processes"] == rows[0]["processes"]
    assert f"device_name {environment['device_name']}" in (folder / "report.md").read_text()
    assert run_here(words) == 0 and len(read_table(folder)) == len(rows), "it is done already"
    words[2] += " more"
    assert run_here(words) == 2, "another command needs another folder"


def test_a_gpu_and_its_driver_are_in_the_facts(tmp_path, monkeypatch):
    from mnist_dist.study.run.launches import facts_of_machine

    for printed, expected in (("NVIDIA H200, 575.57.08", ("cuda", "NVIDIA H200", "575.57.08")),
                              ("no devices were found", ("cpu", None, None))):
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho '{printed}'\n")
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        facts_of_machine.cache_clear()
        facts = facts_of_machine()
        assert (facts["device"], facts.get("driver")) == (expected[0], expected[2])
        assert expected[1] in (None, facts["device_name"])
    facts_of_machine.cache_clear()


CELL = Cell(200, 4, (("lr", "0.1"), ("env:NCCL_ALGO", "Ring"), ("name", "a b;$(x)")))


@pytest.mark.parametrize("command, words", [
    ("./t --bs {batch_size} -n {processes} {options} -o {output_dir}",
     ["./t", "--bs", "200", "-n", "4", "--x", "1", "--lr", "0.1", "--name", "a b;$(x)", "-o", "runs/r"]),
    ("./t {lr} 'x={name}' {{}} {output_dir} {per_process_batch_size} {seed}",
     ["./t", "0.1", "x=a b;$(x)", "{}", "runs/r", "50", "2"]),
    ("sh -c './t {options} > {output_dir}/log'", ["sh", "-c", "./t --x 1 --lr 0.1 --name 'a b;$(x)' > runs/r/log"]),
])
def test_placeholders_are_filled_word_by_word(command, words):
    run = PlannedRun(CELL, "repeat", 3)
    assert command_of(run, Path("runs/r"), ["--x", "1"], Program(command=command)) == words


def test_variables_are_no_options():
    run = PlannedRun(CELL, "repeat", 1)
    for program in (Program(), Program(script="t.py"), Program(command="./t {options} {output_dir}")):
        assert not any("NCCL" in word for word in command_of(run, Path("r"), [], program))
        environment = environment_of(run, program, {"A": "1", "NCCL_ALGO": "Tree"}, 8)
        assert environment["NCCL_ALGO"] == "Ring" and environment["A"] == "1"
        assert environment.get("OMP_NUM_THREADS") == (None if program.is_ours else "2")
    assert CELL.name.startswith("b200-p4-lr-0.1-env-NCCL-ALGO-Ring-name-a_b__")
    assert run_of({**CELL.as_row(), "role": "repeat", "number": 1}).cell == CELL


def test_axes_are_read():
    assert read_axes(["a=1, 2,1", "hidden-sizes=256;1024,1024", "env:X_1=a"]) == {
        "a": ("1", "2"), "hidden-sizes": ("256", "1024,1024"), "env:X_1": ("a",)}


@pytest.mark.parametrize("text", ["", "a", "=1", "a=", "a=1,,2", "1a=1", "env:=1", "env:a-b=1", "a b=1", "../a=1",
                                  "ü=1", "batch_size=1", "batch-size=1", "processes=1", "options=1", "output_dir=/tmp"])
def test_what_is_no_axis(text):
    with pytest.raises(UserError, match="--axis"):
        read_axes([text])
    with pytest.raises(UserError, match="given twice"):
        read_axes(["a=1", "a=2"])


GRID = Grid(batch_sizes=(50, 200), processes=(1, 2), axes={"factor": ("1", "2"), "env:MODE": ("a",)})
WRONG = {
    "{batch}": "has the placeholder {batch}: there are {batch_size}, ",
    "{batch_size:4}": "has the placeholder {batch_size:4}", "{0}": "has the placeholder {0}",
    "{}": "has the placeholder {}",
    "{env:MODE}": "has the placeholder {env:MODE}",
    "{batch_size} {processes} {options}": "has no {output_dir}: there a run leaves its result.json",
    "{processes} {options} {output_dir}": "has no {batch_size}, and the study has 2 values of it",
    "{batch_size} {options} {output_dir}": "has no {processes}, and the study has 2 values of it",
    "{batch_size} {processes} {output_dir}": "has neither {factor} nor {options}: the axis would change nothing",
    "{batch_size": "must be a command with {placeholders}", "'{batch_size}": "must be a command as a shell reads it",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_is_one_line(words):
    with pytest.raises(UserError) as error:
        check_command(f"sh {words}", GRID)
    assert WRONG[words] in str(error.value) and "\n" not in str(error.value)


def test_a_right_command_and_a_program_that_is_not_there():
    whole = "{per_process_batch_size} {processes} {factor} {output_dir}"
    check_command(f"sh {whole}", GRID)
    for program in ("no-such-program", "/none/there"):
        with pytest.raises(UserError, match="which is no program here"):
            check_command(f"{program} {whole}", GRID)
    for command in ("", "   "):
        with pytest.raises(UserError, match="--command must be a command"):
            check_command(command, GRID)


@pytest.mark.parametrize("words, message", [
    (["--axis", "colour=red,blue"], "--axis colour is no option of training that a study can vary: "),
    (["--axis", "output-dir=1"], "--axis output-dir is no further axis"),
    (["--axis", "resume=on"], "--axis resume is no option of training"),
    (["--axis", "lr=fast"], "--lr must be a number above 0, got 'fast'"),
    (["--axis", "lr-rule=sqrt", "--axis", "lr_rule=none"], "--axis lr_rule is an axis already"),
    (["--axis", "lr=0.1,0.2", "--lr", "0.3"], "--lr 0.3 and an axis of it say two things"),
    (["--quick", "--axis", "lr=0.1,0.2"], "--quick chooses the grid by itself, got --axis"),
    (["--quick", "--command", "sh {output_dir}"], "--quick chooses the grid by itself, got --command"),
    (["--command", "sh {output_dir}", "--script", "t.py"], "--script t.py and --command say two things"),
])
def test_bad_input_is_one_line(words, message, assert_refused):
    assert_refused(words, message)


def test_an_axis_of_our_own_training(tmp_path, capsys):
    words = ["study", "--axis", "gradient-accumulation-steps=1,2", "--axis", "env:MODE=a,b", "--dry-run", "--repeats",
             "1", "--output-dir", str(tmp_path / "s")]
    assert run_here(words) == 0
    plan = capsys.readouterr().out
    assert "4 cells, 6 runs" in plan and "b200-p1-gradient-accumulation-steps-2-env-MODE-b-repeat-1" in plan


TEXTS = {"data_dir": "here;there", "mirror": "http://a/;http://b/", "target_nll": "0.4,0.3;0.2;none",
         "evaluate_every": "100samples;none", "checkpoint_every": "never;2steps", "log_every": "3steps;never"}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in NOT_AN_AXIS])
def test_every_axis_reaches_the_training(name):
    option, kind = OPTIONS[name], OPTIONS[name].metadata["kind"]
    choices = option.metadata.get("choices")
    text = TEXTS.get(name) or ";".join(choices or {bool: ("true", "False"), str: ("a", "b")}.get(kind, ("2", "3.0")))
    words = ["study", "--axis", f"{name.replace('_', '-')}={text}"]
    request = request_from(parse(words), words)
    configs = []
    for cell in request.grid.cells():
        request.check(cell)
        command = command_of(PlannedRun(cell, "repeat", 1), Path("run"), request.options, request.program)
        configs.append(training_config(parse(command[3:])))
    assert [getattr(config, name) for config in configs] == [checked(option, value) for value in text.split(";")]


@pytest.mark.parametrize("launcher, processes", [
    pytest.param(f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {{processes}}", 2,
                 marks=pytest.mark.long, id="torchrun"),
    # without GPUs Accelerate starts several processes with MPI only
    pytest.param("accelerate launch --cpu --num_processes {processes} --num_machines 1 --mixed_precision no", 1,
                 marks=pytest.mark.faults, id="accelerate"),
])
def test_launchers_as_commands(launcher, processes, tmp_path):
    """The example of a training of one's own, started by torchrun and by `accelerate launch`."""
    training = ROOT / "examples" / "your_training.py"
    command = f"{launcher} {training} --batch-size {{batch_size}} --output-dir {{output_dir}}"
    words = ["study", "--command", command, "--batch-sizes", "100", "--processes", str(processes), "--repeats", "1",
             "--wandb", "disabled", "--output-dir", str(tmp_path / "s")]
    assert run_here(words) == 0
    rows = read_table(tmp_path / "s")
    assert {(row["status"], row["environment"]["num_processes"]) for row in rows} == {("completed", processes)}
