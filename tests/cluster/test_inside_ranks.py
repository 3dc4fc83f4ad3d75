"""Whether this process is a rank already: under torchrun, under srun (with a stand-in for `scontrol`), and alone."""

from __future__ import annotations

import os
from unittest import mock

import pytest

from pipeline.cluster.launch import inside_ranks
from pipeline.job.errors import JobError

STEP = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", *STEP)


@pytest.fixture
def environment(tmp_path):
    """An environment of its own, put back afterwards: `inside_ranks` writes into it."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[07-08]" ] || exit 1\necho gpu07\necho gpu08\n')
    scontrol.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    with mock.patch.dict(os.environ, {**kept, "PATH": f"{tmp_path}:/usr/bin:/bin"}, clear=True):
        yield scontrol


def test_alone_it_is_no_rank(environment):
    assert not inside_ranks()


def test_under_torchrun_it_is_one_and_nothing_is_changed(environment):
    os.environ.update(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="host", MASTER_PORT="29500", **STEP)
    before = dict(os.environ)
    assert inside_ranks()
    assert dict(os.environ) == before


def test_under_srun_slurms_variables_become_torchruns(environment):
    os.environ.update(STEP)
    assert inside_ranks()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")] == ["5", "8", "1", "gpu07"]
    # Below the range that Linux hands out to outgoing connections.
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768


@pytest.mark.parametrize(
    ("tasks", "node", "local"), [("4(x2)", 1, "4"), ("8", 0, "8"), ("8(x2),4", 2, "4"), ("8(x2),4", 1, "8"), ("3,2", 1, "2")]
)
def test_srun_says_how_many_ranks_this_node_has(environment, tasks, node, local):
    os.environ.update({**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)})
    assert inside_ranks()
    assert os.environ["LOCAL_WORLD_SIZE"] == local


@pytest.mark.parametrize(("gpus", "accelerator"), [("", "cpu"), ("0,1", None)])
def test_ranks_of_srun_have_the_settings_that_the_launcher_gives_its_own(environment, gpus, accelerator):
    for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    os.environ.update(STEP, CUDA_VISIBLE_DEVICES=gpus, SLURM_CPUS_PER_TASK="3")
    assert inside_ranks()
    assert os.environ.get("DS_ACCELERATOR") == accelerator
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")


def test_two_jobs_on_one_node_meet_on_two_ports(environment):
    ports = set()
    for job in ("12345", "12346"):
        os.environ.update({**STEP, "SLURM_JOB_ID": job})
        assert inside_ranks()
        ports.add(os.environ["MASTER_PORT"])
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            del os.environ[name]
    assert len(ports) == 2


def test_a_meeting_point_of_the_batch_script_is_kept_and_needs_no_scontrol(environment):
    environment.unlink()
    os.environ.update(STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT="12000")
    assert inside_ranks()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "12000")


def test_the_batch_script_itself_and_a_step_of_one_task_start_their_own_ranks(environment):
    os.environ["SLURM_JOB_ID"] = "12345"
    assert not inside_ranks()
    os.environ.update({**STEP, "SLURM_STEP_NUM_TASKS": "1"})
    assert not inside_ranks()
    assert "RANK" not in os.environ


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexit 1\n", "#!/bin/sh\n"])
def test_without_an_answer_from_scontrol_the_repair_is_named(environment, script):
    if script is None:
        environment.unlink()
        os.environ["PATH"] = str(environment.parent)
    else:
        environment.write_text(script)
    os.environ.update(STEP)
    with pytest.raises(JobError) as caught:
        inside_ranks()
    assert "gpu[07-08]" in str(caught.value)
    assert "Set MASTER_ADDR" in str(caught.value)
