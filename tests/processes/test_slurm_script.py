"""launch/slurm.sbatch without SLURM: whether the job goes back to the queue, and in which folder it trains."""

from __future__ import annotations

import os
import subprocess

import pytest
from support import ROOT

SRUN = 'echo "$@" > "$PLACE/srun"; exit {status}'
SCONTROL = 'if [ $1 = requeue ]; then touch "$PLACE/requeued"; fi; echo "JobId=7 {facts}"'


@pytest.fixture
def submit(tmp_path):
    """Run the script with such commands; what it ends with, whether the job is put back, and the words of srun."""
    def run(*words, restarts=None, **commands):
        for name, bash in {"srun": SRUN.format(status=0), "scontrol": SCONTROL.format(facts=""), **commands}.items():
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{bash}\n")
            (tmp_path / name).chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PLACE": str(tmp_path),
                       "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "SLURM_RESTART_COUNT": restarts or ""}
        done = subprocess.run(["bash", ROOT / "launch" / "slurm.sbatch", *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=60)
        return done.returncode, (tmp_path / "requeued").exists(), (tmp_path / "srun").read_text(), done.stderr

    return run


@pytest.mark.parametrize(("status", "facts", "restarts", "is_put_back"), [
    (0, "JobState=RUNNING PreemptTime=None", None, False),
    (1, "JobState=RUNNING PreemptTime=None", None, False),  # a lost process, a full disk: the same would end it again
    (2, "JobState=RUNNING PreemptTime=None", "3", False),
    (192 + 1, "JobState=RUNNING PreemptTime=None", None, False),  # the same, while srun ends the other processes
    (192 + 3, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00", "1", True),
    (143, "JobState=RUNNING PreemptTime=None", None, True),  # by a signal, and nobody has cancelled the job
    (137, "JobState=RUNNING PreemptTime=None", "19", True),
    (143, "JobState=RUNNING PreemptTime=None", "20", False),
    (143, "JobState=CANCELLED PreemptTime=None", None, False),
    (143, "JobState=COMPLETING PreemptTime=None", None, False),
    (1, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00", "40", True),
])
def test_which_jobs_go_back_to_the_queue(status, facts, restarts, is_put_back, submit):
    ended, put_back, _, _ = submit(srun=SRUN.format(status=status), scontrol=SCONTROL.format(facts=facts),
                                   restarts=restarts)
    assert (ended, put_back) == (status % 192, is_put_back)


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (1, 193), (2, 194), (3, 195), (143, 143), (137, 137)])
def test_a_process_that_fails_by_itself_has_the_highest_status(status, ends, submit):
    """The command that srun gets is run here, with a python of ours."""
    python = f"[ $1 = -c ] || exit {status}"
    ended, put_back, _, _ = submit(srun=f'echo > "$PLACE/srun"; shift; "$@"; [ $? = {ends} ] || exit 77; exit {ends}',
                                   python=python, scontrol=SCONTROL.format(facts="JobState=RUNNING"))
    assert (ended, put_back) == (status, status > 128)


def test_a_node_without_the_environment(submit):
    ended, put_back, _, errors = submit(srun='echo > "$PLACE/srun"; shift; export SLURM_LOCALID=0; "$@"',
                                        python="exit 1", scontrol=SCONTROL.format(facts="JobState=RUNNING"))
    assert (ended, put_back) == (2, False)
    assert errors.startswith("slurm.sbatch: error: n1 has no python that imports mnist_dist: submit with the ")


def test_a_step_that_never_ends_although_no_process_runs(submit):
    """A node is lost and back before SLURM notices it. The script looks every ten seconds, here a tenth of one."""
    looks = 'echo >> "$PLACE/looks"; [ $(wc -l < "$PLACE/looks") -gt 3 ] || echo "30 7 0 0 0"'
    scontrol = f'if [ $1 = listpids ]; then {looks}; exit; fi; {SCONTROL.format(facts="JobState=RUNNING")}'
    ended, put_back, _, errors = submit(srun=f'{SRUN.format(status=0).partition(";")[0]}; exec /bin/sleep 50',
                                        scontrol=scontrol, sleep="exec /bin/sleep 0.1")
    assert (ended, put_back) == (143, True)
    assert errors == "slurm.sbatch: no process runs on n1, but srun waits: the job goes back to the queue\n"


def test_a_step_whose_processes_have_not_begun_is_left_alone(submit):
    scontrol = f'if [ $1 = listpids ]; then exit 1; fi; {SCONTROL.format(facts="JobState=RUNNING")}'
    ended, put_back, _, errors = submit(srun=f'{SRUN.format(status=0).partition(";")[0]}; exec /bin/sleep 2',
                                        scontrol=scontrol, sleep="exec /bin/sleep 0.1")
    assert (ended, put_back, errors) == (0, False, "")


def test_the_folder_of_a_job_is_no_other_jobs_and_is_found_again(submit, tmp_path):
    (tmp_path / "runs" / "slurm-7-20200101T000000").mkdir(parents=True)  # of a SLURM that counts from 1 again
    (tmp_path / "runs" / "slurm-77-20990101T000000").mkdir()
    first, again, later = (submit(restarts=restarts)[2] for restarts in (None, "1", "2"))
    assert first == again == later and "--output-dir runs/slurm-7-2" in first and "20200101" not in first
    assert "--output-dir mine" in submit("--output-dir", "mine", restarts="1")[2]


def test_a_folder_that_is_named_is_the_only_one(submit, tmp_path):
    submit("--output-dir", "mine")
    assert not (tmp_path / "runs").exists()
