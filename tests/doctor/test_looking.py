"""Reading this machine: what is measured is true, what is broken is told, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pipeline.doctor import disks, look, slurm
from pipeline.doctor.disks import look_at_disks, places
from pipeline.doctor.finding import Finding
from pipeline.doctor.gpus import Device, judge_gpus
from pipeline.doctor.libraries import judge_libraries
from pipeline.doctor.limits import look_at_limits
from pipeline.doctor.look import Look
from pipeline.doctor.slurm import judge_slurm, look_at_slurm
from pipeline.plan.hardware import named

GIB = 1 << 30


@pytest.fixture
def folders(tmp_path):
    return {"run folders": tmp_path / "a" / "runs", "zlora's cache": tmp_path / "cache"}


def test_a_disk_is_measured_and_left_as_it_was(folders, tmp_path):
    told = []
    first, second = look_at_disks(folders, told.append)
    assert list(tmp_path.iterdir()) == []
    assert first.folder == tmp_path / "a" / "runs"
    assert [line.partition(":")[0] for line in told] == [f"measuring {name}" for name in folders]
    free = os.statvfs(tmp_path)
    assert first.free_bytes == pytest.approx(free.f_bavail * free.f_frsize, rel=0.05)
    assert 1e5 < first.write_bytes_s < 1e11
    assert 1e5 < first.read_bytes_s < 1e11
    assert first.locks
    # One file system is measured once.
    assert second.write_bytes_s == first.write_bytes_s
    assert (first.refused, second.refused) == ("", "")


def test_it_takes_no_longer_than_it_may(folders, monkeypatch):
    moved = []
    monkeypatch.setattr(disks, "_LONGEST_S", 0.0)
    monkeypatch.setattr(os, "write", lambda descriptor, block: moved.append(len(block)) or len(block))
    look_at_disks(folders, lambda text: None)
    assert moved == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_seen(folders, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not look_at_disks(folders, lambda text: None)[0].locks


def test_locks_that_keep_nobody_away_are_seen(folders, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)
    assert not look_at_disks(folders, lambda text: None)[0].locks


def test_a_disk_that_fills_up_meanwhile_is_told_and_left_clean(folders, monkeypatch, tmp_path):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    assert look_at_disks(folders, lambda text: None)[0].refused == "No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_the_caches_are_those_that_are_used(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = places(None)
    assert found == {"run folders": Path("runs"), "hub's cache": Path(constants.HF_HUB_CACHE), "zlora's cache": tmp_path / "zlora"}
    assert places(Path("elsewhere"))["run folders"] == Path("elsewhere")


def test_limits_are_the_processs_own():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        found = look_at_limits()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.open_files, found.most_open_files) == (300, before[1])
    assert found.memory_bytes > GIB // 2


@pytest.fixture
def scontrol(monkeypatch, tmp_path):
    """Puts a shell script in the place of Slurm's commands; nothing else is in PATH."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(text):
        for name in ("sbatch", "srun", "squeue", "scontrol"):
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)

    return put


ANSWERS = """case "$1" in
--version) echo slurm 23.11.4 ;;
ping) echo 'Slurmctld(primary) at head is UP' ;;
show) echo localhost; echo no-such-host.invalid ;;
esac"""


def test_a_machine_without_slurm_has_none(scontrol):
    (finding,) = judge_slurm(look_at_slurm())
    assert (finding.state, finding.value) == ("good", "not here; zlora train starts its ranks itself")


def test_slurm_answers_and_an_allocations_names_are_resolved(scontrol, monkeypatch):
    scontrol(ANSWERS)
    assert [f.value for f in judge_slurm(look_at_slurm())] == ["23.11.4, the controller answers"]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "any[1-2]")
    known = socket.getaddrinfo

    def resolve(host, port):
        if host.endswith(".invalid"):
            raise socket.gaierror
        return known(host, port)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = look_at_slurm()
    assert (found.nodes, found.unresolved) == (("localhost", "no-such-host.invalid"), ("no-such-host.invalid",))
    assert "job 7 on 2 nodes; no-such-host.invalid cannot be resolved" in judge_slurm(found)[1].value
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert look_at_slurm().unresolved == ()


@pytest.mark.parametrize(
    ("text", "state", "value"),
    [
        (
            '[ "$1" = ping ] && echo "Slurmctld(primary) at head is DOWN" || echo slurm 23.11.4',
            "problem",
            "Slurmctld(primary) at head is DOWN",
        ),
        ("echo a; echo scontrol: error: Unable to contact slurm controller >&2; exit 1", "problem", "Unable to contact"),
        ("echo scontrol: fatal: Could not establish a configuration source >&2; exit 1", "warning", "a slurm.conf is not"),
        ('[ "$1" = ping ] && exec /bin/sleep 20 || echo slurm 23.11.4', "problem", "no answer in"),
    ],
)
def test_a_controller_that_does_not_answer_is_told_by_its_words(scontrol, monkeypatch, text, state, value):
    monkeypatch.setattr(slurm, "_ANSWER_S", 0.5)
    scontrol(text)
    (finding,) = judge_slurm(look_at_slurm())
    assert finding.state == state
    assert value in finding.value


def test_the_libraries_here_load_and_are_as_required():
    libraries, gpus = Look().answer()
    for name in ("torch", "deepspeed", "transformers"):
        assert libraries.versions[name] == version(name)
    assert (libraries.broken, gpus.torch) == ({}, torch.__version__)
    assert any(line.startswith("deepspeed") for line in libraries.required)
    assert {finding.state for finding in judge_libraries(libraries)} <= {"good", "warning"}
    if not gpus.shown:
        assert [f.name for f in judge_gpus(gpus)] == ["GPUs", "bf16, fp16", "NCCL"]


def put_library(folder, monkeypatch, text):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def test_a_library_that_does_not_load_is_told_by_its_words(tmp_path, monkeypatch):
    put_library(tmp_path, monkeypatch, "raise OSError('libcudart.so.13: cannot open shared object file')")
    libraries, gpus = Look().answer()
    found = {finding.name: finding for finding in judge_libraries(libraries)}
    assert found["torch"].state == "problem"
    assert "does not load: OSError: libcudart.so.13" in found["torch"].value
    assert gpus.torch == ""


def test_a_library_that_ends_its_process_is_a_finding_not_an_end(tmp_path, monkeypatch):
    put_library(tmp_path, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    found = Look().answer()
    assert isinstance(found, Finding)
    assert (found.state, found.value) == ("problem", "loading them: ended by SIGSEGV")


def test_a_library_whose_parts_do_not_fit_is_told_by_the_loaders_words(tmp_path, monkeypatch):
    put_library(
        tmp_path, monkeypatch, "import os; os.write(2, b'python: symbol lookup error: undefined symbol: _ZN5torch\\n'); os._exit(127)"
    )
    found = Look().answer()
    assert (found.state, found.value) == ("problem", "loading them: python: symbol lookup error: undefined symbol: _ZN5torch")


def test_gpus_are_read_through_torch(monkeypatch):
    from types import SimpleNamespace

    cards = [SimpleNamespace(name=f"card {n}", major=8, minor=n, total_memory=80 * GIB) for n in range(2)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    for name, answer in {
        "init": lambda: None,
        "device_count": lambda: 2,
        "get_device_properties": cards.__getitem__,
        "mem_get_info": lambda place: (70 * GIB, 80 * GIB),
        "get_arch_list": lambda: ["sm_80", "sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    asked = []
    monkeypatch.setattr(look, "_failed", lambda torch, device, bf16: asked.append((str(device), bf16)) or "")
    found = look._gpus(without_torch=False)
    assert (found.shown, found.hidden, found.cuda, found.built, found.nccl) == (2, "0,1", "13.0", ("sm_80", "sm_90"), "2.27.5")
    assert found.devices[1] == Device("card 1", (8, 1), 80 * GIB, 70 * GIB, "")
    assert asked == [("cuda:0", True), ("cuda:1", True), ("cpu", True)]

    def refuse():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    found = look._gpus(without_torch=False)
    assert (found.unusable, found.devices) == ("The NVIDIA driver on your system is too old (found version 12020).", ())


@pytest.mark.parametrize(
    ("name", "gib", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80g"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "a100-40g"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100-16g"),
        ("NVIDIA H200", 139.8, "h200-141g"),
        ("NVIDIA A10", 22.0, None),
    ],
)
def test_a_gpu_finds_its_row_of_the_plans_table(name, gib, row):
    found = named(name, int(gib * GIB))
    assert (found.name if found else None) == row
