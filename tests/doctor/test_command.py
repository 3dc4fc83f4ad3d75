"""`zlora doctor` as a person and a program meet it: the whole command, its table, its object, its exit codes, its refusals."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial

import pytest

from pipeline.cluster.launch import PROGRAM
from pipeline.doctor import allocation, examine, proof
from pipeline.doctor.finding import Finding, report
from pipeline.doctor.gpus import judge_gpus
from pipeline.doctor.network import network_of
from pipeline.doctor.show import show
from pipeline.screen import Screen
from tests.doctor.machines import A100S, CU130, NETWORK, V100
from tests.ranks import rank_environment

GROUPS = ["Python and libraries", "GPUs", "Disks", "Limits", "Slurm", "Proof"]
NETWORK_KEYS = ["backend", "clocks", "folder", "joined_s", "links", "machines", "nodes", "ranks", "row", "unlocked", "unshared", "waited_s"]
BAD = Finding("Disks", "run folders", "/scratch: 1.0 MiB free", "problem", "Make room [now], or name a folder on another disk.")
WARNED = Finding("GPUs", "bf16", "no: Tesla V100", "warning", 'Use base.dtype = "fp16" there.')
GOOD = Finding("GPUs", "fp16", "yes")


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """Not in an allocation, no rank, in a folder of its own; with nothing but a stand-in for srun in PATH, if there is one."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def program(*arguments, **environment):
    command = [sys.executable, "-c", PROGRAM, "doctor", *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_whole_command_is_one_object_and_not_a_word_more(outside, tmp_path):
    done = program("--json", "--run", str(tmp_path / "runs"), HF_HOME=str(tmp_path / "hub"), CUDA_VISIBLE_DEVICES="")
    out, error = done.communicate(timeout=240)
    assert error == ""
    assert out.count("\n") == 1
    told = json.loads(out)
    assert list(told) == ["schema_version", "good", "findings", "network"]
    assert (told["schema_version"], told["network"]) == (1, None)
    assert all(list(finding) == ["group", "name", "value", "state", "repair"] for finding in told["findings"])
    assert list(dict.fromkeys(finding["group"] for finding in told["findings"])) == GROUPS
    # This machine may lack something, but the ranks must have trained.
    assert done.returncode == (0 if told["good"] else 2)
    last = told["findings"][-1]
    assert (last["name"], last["state"]) == ("2 CPU ranks", "good"), last
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_are_there_already_measure_the_network(outside, tmp_path):
    ranks = [program("--nodes", "1", "--json", **rank_environment(rank, 2, str(tmp_path))) for rank in range(2)]
    (out, error), (nothing, other) = (rank.communicate(timeout=240) for rank in ranks)
    assert (error, nothing, other) == ("", "", "")
    told = json.loads(out)
    assert {finding["group"] for finding in told["findings"]} == {"Ranks and network"}
    assert ranks[0].returncode == (0 if told["good"] else 2)
    assert sorted(told["network"]) == NETWORK_KEYS
    found = network_of(told["network"])
    assert (found.ranks, len(found.nodes), found.backend) == (2, 1, "gloo")
    assert {link.place for link in found.links} == {"within"}
    assert [link.bytes >> 20 for link in found.links[::2]] == [1, 16, 64]


@pytest.fixture
def doctor(zlora, outside):
    """`doctor("--json")` -> exit code, standard output, standard error; in this process."""
    return partial(zlora, "doctor")


@pytest.mark.parametrize(("findings", "code"), [([GOOD, BAD], 2), ([GOOD, WARNED], 0), ([GOOD], 0)])
def test_a_problem_is_exit_code_2_and_the_table_is_there_all_the_same(doctor, monkeypatch, findings, code):
    monkeypatch.setattr(examine, "examine", lambda run, nodes: (findings, None))
    found, out, error = doctor()
    assert (found, error) == (code, "")
    assert all(finding.value in out and finding.repair in out for finding in findings)
    found, out, error = doctor("--json")
    assert (found, error) == (code, "")
    assert json.loads(out) == report(findings)
    assert json.loads(out)["good"] == (code == 0)


def test_the_table_is_grouped_and_marked_and_ends_with_what_to_do():
    shown = io.StringIO()
    show([GOOD, WARNED, BAD], Screen(shown))
    assert [line.rstrip() for line in shown.getvalue().splitlines()] == [
        "GPUs",
        "  fp16         ok    yes",
        "  bf16         warn  no: Tesla V100",
        "Disks",
        "  run folders  BAD   /scratch: 1.0 MiB free",
        "What to do",
        "  run folders  BAD   Make room [now], or name a folder on another disk.",
        '  bf16         warn  Use base.dtype = "fp16" there.',
        "",
        "1 problem and 1 warning: mend what is marked BAD, then run zlora doctor again.",
    ]


def test_libraries_that_do_not_load_leave_the_rest_looked_at_and_nothing_tried(outside, monkeypatch, tmp_path):
    class Broken:
        def answer(self):
            return Finding("Python and libraries", "libraries", "loading them: ended by SIGSEGV", "problem", "Anew.")

        def end(self):
            pass

    monkeypatch.setattr(examine, "Look", Broken)
    monkeypatch.setattr(examine, "prove", lambda *arguments: pytest.fail("it was tried"))
    findings, _ = examine.examine(tmp_path / "runs", None)
    assert list(dict.fromkeys(finding.group for finding in findings)) == ["Python and libraries", "Disks", "Limits", "Slurm", "Proof"]
    assert (findings[-1].value, findings[-1].state) == ("not tried: the libraries do not load", "warning")


def test_nodes_without_an_allocation_of_so_many_are_refused_in_a_line(doctor, monkeypatch):
    code, out, error = doctor("--nodes", "2")
    assert (code, out) == (2, "")
    assert error.startswith("error: --nodes 2: this is no Slurm allocation. Get one (salloc --nodes=2")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert doctor("--nodes", "2") == (2, "", "error: --nodes 2: this allocation has 1. Use at most 1.\n")


def test_ranks_of_others_are_not_told_to_start_ranks(doctor, monkeypatch):
    for name, value in rank_environment(1, 2, "/tmp").items():
        monkeypatch.setenv(name, value)
    assert doctor() == (2, "", "")
    monkeypatch.setenv("RANK", "0")
    code, out, error = doctor()
    assert (code, out) == (2, "")
    assert error == "error: zlora doctor starts its own ranks, and these are ranks already. Run it once for each node, or give --nodes.\n"


@pytest.fixture
def srun(outside, monkeypatch, tmp_path):
    """Puts a shell script in the place of srun; returns what it was called with."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "96")

    def put(text):
        (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "asked"}\n{text}\n')
        (tmp_path / "srun").chmod(0o755)
        return lambda: (tmp_path / "asked").read_text()

    return put


def test_srun_starts_a_rank_for_each_gpu_and_its_answer_is_read(srun, tmp_path):
    (tmp_path / "answer").write_text(json.dumps(report([], asdict(NETWORK))) + "\n")
    asked = srun(f"echo noise; cat {tmp_path / 'answer'}; exit 2")
    assert allocation.look_at_network(2, tmp_path / "runs") == NETWORK
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --kill-on-bad-exit=1 --overlap --cpus-per-task=12" in asked()
    assert f"doctor --nodes=2 --json --run {tmp_path / 'runs'}" in asked()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo srun: error: node2 >&2; echo 'rank 3 lost the other ranks: timed out' >&2; exit 76", "rank 3 lost the other ranks"),
        ("echo 'srun: error: Unable to create step for job 7' >&2; exit 1", "Unable to create step"),
        ("exit 1", "srun: exit code 1"),
        ("exec sleep 20", "16 ranks on 2 nodes came to no end"),
    ],
)
def test_ranks_that_do_not_meet_are_a_problem_by_their_own_words(srun, monkeypatch, text, words):
    monkeypatch.setattr(allocation, "_LONGEST_S", 0.5)
    srun(text)
    found = allocation.look_at_network(2, None)
    assert (found.name, found.state) == ("rendezvous", "problem")
    assert words in found.value
    assert "MASTER_ADDR" in found.repair


def test_a_rank_that_says_how_to_repair_it_is_believed(srun):
    srun(
        "echo srun: error: node2 >&2; echo 'error: Tesla V100 (sm_70): torch has no kernels for it. Install a build that has.' >&2; exit 2"
    )
    found = allocation.look_at_network(2, None)
    assert (found.value, found.repair) == ("Tesla V100 (sm_70): torch has no kernels for it", "Install a build that has.")


@pytest.mark.parametrize(("tasks", "cpus", "each"), [("4", "8", 4), ("8(x2)", "8", 2), (None, "1", 1)])
def test_without_gpus_a_node_has_the_allocations_tasks(srun, monkeypatch, tasks, cpus, each):
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", cpus)
    if tasks:
        monkeypatch.setenv("SLURM_NTASKS_PER_NODE", tasks)
    assert allocation.ranks_per_node() == each


def test_ranks_that_fail_to_train_are_told_by_their_first_line(monkeypatch):
    def launch(arguments, ranks, talk):
        print("error: Tesla V100 (sm_70): torch has no kernels for it", file=sys.stderr)
        return 2

    monkeypatch.setattr(proof, "launch", launch)
    found = proof.prove(2, "GPU")
    assert found.failed == "Tesla V100 (sm_70): torch has no kernels for it"
    assert (
        proof._cause("rank 0 failed: x\nTraceback (most recent call last):\n  File\nValueError: the last line")
        == "ValueError: the last line"
    )


def test_training_refuses_a_gpu_in_the_doctors_words(monkeypatch):
    import torch

    from pipeline.job.errors import JobError
    from pipeline.model.build import require_dtype

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: V100.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: V100.name)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(CU130))
    with pytest.raises(JobError) as refused:
        require_dtype("fp16", torch.device("cuda", 0))
    (told,) = [f for f in judge_gpus(replace(A100S, torch=torch.__version__, devices=(V100,), shown=1)) if f.name == "kernels"]
    assert str(refused.value) == f"{told.value}. {told.repair}"
