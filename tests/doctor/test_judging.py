"""What the doctor says of made-up machines: sound ones are good, and each fault is named with its repair."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.doctor.disks import judge_disk
from pipeline.doctor.gpus import judge_gpus
from pipeline.doctor.libraries import judge_libraries
from pipeline.doctor.limits import judge_limits
from pipeline.doctor.network import Link, judge_network
from pipeline.doctor.proof import Proof, grounds, judge_proof
from pipeline.doctor.slurm import judge_slurm
from tests.doctor.machines import (
    A100,
    A100S,
    CU126,
    CU130,
    DISK,
    GIB,
    LIBRARIES,
    LIMITS,
    MIB,
    NETWORK,
    NO_GPUS,
    NO_SLURM,
    NODES,
    PROOF,
    SLURM,
    V100,
)

SOUND = {
    "libraries": judge_libraries(LIBRARIES),
    "CPU": judge_gpus(NO_GPUS),
    "A100s": judge_gpus(A100S),
    "disk": judge_disk(DISK),
    "limits": judge_limits(LIMITS, 16, 8),
    "no Slurm": judge_slurm(NO_SLURM),
    "Slurm": judge_slurm(SLURM),
    "allocation": judge_slurm(replace(SLURM, job="7", nodes=NODES)),
    "network": judge_network(NETWORK, 2),
    "proof": [judge_proof(PROOF)],
}


@pytest.mark.parametrize("findings", SOUND.values(), ids=SOUND)
def test_a_sound_machine_is_good_and_nothing_is_to_be_done(findings):
    assert findings
    for finding in findings:
        assert (finding.state, finding.repair) == ("good", ""), finding
        assert finding.value


def v100s(built):
    return replace(A100S, devices=(V100,) * 4, shown=4, built=built)


SLOW = tuple(replace(link, bytes_s=link.bytes_s * (0.01 if link.place == "between" else 1)) for link in NETWORK.links)
HALF = tuple(replace(link, bytes_s=link.bytes_s * (0.3 if link.place == "within" else 1)) for link in NETWORK.links)
ODD = {**NETWORK.machines, "gpu08": ("NVIDIA A100-SXM4-80GB", "3.11.7", "torch 2.11.0")}
UNCONFIGURED = "fatal: Could not establish a configuration source"
FAULTS = {
    # (findings, the name of the one that is not good, its state, words of its value, words of its repair)
    "V100 with a CUDA 13 torch": (judge_gpus(v100s(CU130)), "kernels", "problem", "V100-SXM2-32GB (sm_70): torch", "a cu126 one for V100"),
    "V100 has no bf16": (judge_gpus(v100s(CU126)), "bf16", "warning", "no: Tesla V100", 'base.dtype = "fp16"'),
    "a torch for CPUs on a machine with GPUs": (
        judge_gpus(replace(NO_GPUS, shown=8, driver="580.65")),
        "GPUs",
        "problem",
        "8 shown, but torch 2.13.0+cpu is a build for the CPU",
        "--index-url https://download.pytorch.org/whl/cu126",
    ),
    "a driver too old for torch's CUDA": (
        judge_gpus(replace(A100S, devices=(), unusable="The NVIDIA driver on your system is too old (found version 12020).")),
        "GPUs",
        "problem",
        "can use none: The NVIDIA driver on your system is too old",
        "built for CUDA 13.0",
    ),
    "a GPU that fell off the bus": (judge_gpus(replace(A100S, devices=(A100,) * 7)), "GPUs", "problem", "8 are shown", "nvidia-smi"),
    "a GPU that computes wrongly": (
        judge_gpus(replace(A100S, devices=(A100, replace(A100, failed="a matrix product in torch.float16 is wrong")), shown=2)),
        "kernels",
        "problem",
        "a matrix product",
        "CUDA_VISIBLE_DEVICES",
    ),
    "somebody else's process": (
        judge_gpus(replace(A100S, devices=(A100, replace(A100, free_bytes=20 * GIB)), shown=2)),
        "memory",
        "warning",
        "others hold 60 GiB of GPU 1",
        "nvidia-smi",
    ),
    "no NCCL": (judge_gpus(replace(A100S, nccl=None)), "NCCL", "problem", "built without it", "make setup"),
    "no gloo": (judge_gpus(replace(NO_GPUS, gloo=False)), "NCCL", "problem", "no gloo", "make setup"),
    "a CPU without fp16": (
        judge_gpus(replace(NO_GPUS, cpu_failed='"addmm" not implemented for Half')),
        "bf16, fp16",
        "problem",
        "Half",
        "make",
    ),
    "an old Python": (judge_libraries(replace(LIBRARIES, python="3.9.18")), "python", "problem", "3.9.18", "PYTHON=python3.12"),
    "another DeepSpeed": (
        judge_libraries(replace(LIBRARIES, versions={**LIBRARIES.versions, "deepspeed": "0.18.2"})),
        "deepspeed",
        "problem",
        "0.18.2, but zlora needs ==0.19.8",
        'pip install "deepspeed==0.19.8"',
    ),
    "no transformers": (
        judge_libraries(replace(LIBRARIES, versions={k: v for k, v in LIBRARIES.versions.items() if k != "transformers"})),
        "transformers",
        "problem",
        "not installed",
        "pip install",
    ),
    "an old small library": (
        judge_libraries(replace(LIBRARIES, versions={**LIBRARIES.versions, "rich": "12.0"})),
        "rich",
        "problem",
        "12.0, but zlora needs >=13.9",
        "pip install",
    ),
    "a torch that does not load": (
        judge_libraries(replace(LIBRARIES, broken={"torch": "OSError: libcudart.so.13: cannot open shared object file"})),
        "torch",
        "problem",
        "libcudart.so.13",
        "pip install --force-reinstall torch",
    ),
    "libraries on a slow disk": (
        judge_libraries(replace(LIBRARIES, load_s=90.0)),
        "python",
        "warning",
        "loaded in 90.0 s",
        "disk of the node",
    ),
    "parts for another torch": (
        judge_libraries(replace(LIBRARIES, compiled=("fused_adam",), compiled_for="2.7.1")),
        "DeepSpeed's parts",
        "warning",
        "fused_adam, compiled for torch 2.7.1",
        "DS_BUILD",
    ),
    "a full disk": (judge_disk(replace(DISK, free_bytes=100 * MIB)), "run folders", "problem", "100.0 MiB free", "--run"),
    "little room": (judge_disk(replace(DISK, free_bytes=5 * GIB)), "run folders", "warning", "5.00 GiB free", "zlora plan"),
    "no inodes": (judge_disk(replace(DISK, free_files=3)), "run folders", "problem", "3 more files", "inodes"),
    "a disk full while writing": (
        judge_disk(replace(DISK, name="zlora's cache", refused="No space left on device")),
        "zlora's cache",
        "problem",
        "No space left",
        "XDG_CACHE_HOME",
    ),
    "a cache that is only read": (
        judge_disk(replace(DISK, name="hub's cache", refused="Read-only file system")),
        "hub's cache",
        "warning",
        "Read-only",
        "HF_HOME",
    ),
    "a slow disk": (judge_disk(replace(DISK, write_bytes_s=9e6)), "run folders", "warning", "writes 9, reads 2,000 MB/s", "faster disk"),
    "no locks": (judge_disk(replace(DISK, locks=False)), "locks", "warning", "knows no locks", "nolock"),
    "few open files": (judge_limits(replace(LIMITS, open_files=256), 2, 0), "open files", "problem", "2 ranks need 264", "ulimit -n 65536"),
    "few open files, and no more to be had": (
        judge_limits(replace(LIMITS, open_files=256, most_open_files=256), 512, 0),
        "open files",
        "problem",
        "512 ranks need 2,304",
        "administrator",
    ),
    "a container's shared memory": (
        judge_limits(replace(LIMITS, shared_bytes=64 * MIB), 8, 8),
        "shared memory",
        "problem",
        "64.0 MiB free, for NCCL between 8 GPUs",
        "--shm-size=1g",
    ),
    "little shared memory": (
        judge_limits(replace(LIMITS, shared_bytes=GIB // 2), 8, 8),
        "shared memory",
        "warning",
        "512.0 MiB",
        "--shm-size",
    ),
    "no shared memory": (judge_limits(replace(LIMITS, shared_bytes=None), 8, 8), "shared memory", "problem", "not there", "/dev/shm"),
    "locked memory under InfiniBand": (
        judge_limits(replace(LIMITS, infiniband=True, locked_bytes=64 << 10), 8, 8),
        "locked memory",
        "warning",
        "with InfiniBand",
        "ulimit -l unlimited",
    ),
    "little memory": (judge_limits(replace(LIMITS, memory_bytes=GIB), 2, 0), "main memory", "problem", "1.00 GiB", "--mem"),
    "slurmctld down": (
        judge_slurm(replace(SLURM, refused="Slurmctld(primary) at head is DOWN")),
        "Slurm",
        "problem",
        "does not answer: Slurmctld(primary) at head is DOWN",
        "scontrol ping",
    ),
    "Slurm without a cluster": (judge_slurm(replace(SLURM, refused=UNCONFIGURED)), "Slurm", "warning", "a slurm.conf is not", "SLURM_CONF"),
    "half of Slurm": (judge_slurm(replace(SLURM, missing=("sbatch",))), "Slurm", "problem", "without sbatch", "slurm-client"),
    "a job in a container": (judge_slurm(replace(NO_SLURM, job="7")), "Slurm", "warning", "job 7", "MASTER_ADDR"),
    "nodes without names": (
        judge_slurm(replace(SLURM, job="7", nodes=NODES, unresolved=("gpu08",))),
        "allocation",
        "problem",
        "gpu08 cannot be resolved",
        "/etc/hosts",
    ),
    "fewer nodes than asked for": (judge_network(NETWORK, 4), "rendezvous", "problem", "4 nodes asked for", "--nodes"),
    "a late node": (judge_network(replace(NETWORK, waited_s=100.0), 2), "rendezvous", "warning", "waited 100 s", "container image"),
    "TCP instead of InfiniBand": (
        judge_network(replace(NETWORK, links=SLOW), 2),
        "all-gather between nodes",
        "problem",
        "1.7 GB/s (1 MiB 0.17, 16 MiB 1, 256 MiB 1.7); the plan assumes 200",
        "NET/IB",
    ),
    "no NVLink": (
        judge_network(replace(NETWORK, links=HALF), 2),
        "all-reduce within a node",
        "warning",
        "assumes 300",
        "nvidia-smi topo -m",
    ),
    "a wrong clock": (
        judge_network(replace(NETWORK, clocks={"gpu07": (0.0, 0.0), "gpu08": (-7.5, 0.01)}), 2),
        "clocks",
        "problem",
        "gpu08 is 7.5 s behind gpu07",
        "chronyc makestep",
    ),
    "another torch on a node": (
        judge_network(replace(NETWORK, machines=ODD), 2),
        "nodes alike",
        "problem",
        "gpu08 has torch 2.11.0",
        "image",
    ),
    "a folder of one node only": (
        judge_network(replace(NETWORK, unshared=("gpu08",)), 2),
        "run folder",
        "problem",
        "gpu08 cannot see",
        "--run",
    ),
    "locks of one node only": (
        judge_network(replace(NETWORK, unlocked=("gpu08",)), 2),
        "run folder",
        "warning",
        "does not reach gpu08",
        "flock",
    ),
    "a loss that is not finite": (
        [judge_proof(replace(PROOF, losses=(6.6, math.nan)))],
        "2 GPU ranks",
        "problem",
        "does not fall",
        "make setup",
    ),
    "a loss that rises": ([judge_proof(replace(PROOF, losses=(6.2, 6.6)))], "2 GPU ranks", "problem", "does not fall", "another node"),
    "no gradient": ([judge_proof(replace(PROOF, grad_norms=(0.0, 0.0, 0.0)))], "2 GPU ranks", "problem", "gradient is zero", "make setup"),
    "ranks that drift apart": ([judge_proof(replace(PROOF, apart=1e-3))], "2 GPU ranks", "problem", "differ by 0.001", "NCCL_P2P_DISABLE"),
}
FAILED = {
    "ncclSystemError: Error while creating shared memory segment /dev/shm/nccl-x": "--shm-size",
    "CUDA out of memory. Tried to allocate 2 GiB": "Free memory",
    "rank 1 was ended by SIGKILL. Out of memory is the usual cause.": "Free memory",
    "the ranks came to no end in 180 s": "NCCL_DEBUG=INFO",
    "NCCL error: unhandled cuda error": "NCCL_P2P_DISABLE=1",
    "Gloo connectFullMesh failed": "GLOO_SOCKET_IFNAME",
    "something else": "run zlora doctor again",
}


@pytest.mark.parametrize(("findings", "name", "state", "value", "repair"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_repair(findings, name, state, value, repair):
    found = [finding for finding in findings if finding.state != "good"]
    first = next(finding for finding in found if finding.name == name)
    assert first.state == state
    assert value in first.value
    assert repair in first.repair
    # Nothing else is laid to it but the other collective of a slow network.
    assert len(found) == (2 if "all-" in name else 1), found


@pytest.mark.parametrize(("words", "repair"), FAILED.items(), ids=FAILED)
def test_ranks_that_fail_are_answered_by_what_they_said(words, repair):
    finding = judge_proof(Proof(2, "GPU", words))
    assert (finding.state, finding.value) == ("problem", words)
    assert repair in finding.repair


def test_the_skew_that_a_long_way_could_explain_is_none():
    assert all(f.state == "good" for f in judge_network(replace(NETWORK, clocks={"gpu07": (0.0, 0.0), "gpu08": (1.4, 0.9)}), 2))


def test_a_gpu_that_the_plan_does_not_know_is_measured_but_not_judged():
    findings = judge_network(replace(NETWORK, row=None, links=SLOW), 2)
    assert all(finding.state == "good" for finding in findings)
    assert any("not in the plan's table" in finding.value for finding in findings)


def test_one_node_has_no_way_between_nodes():
    alone = replace(NETWORK, nodes=NODES[:1], links=tuple(link for link in NETWORK.links if link.place == "within"))
    findings = {finding.name: finding for finding in judge_network(alone, 1)}
    assert findings["between nodes"].value == "nothing to measure: one node"
    assert "clocks" not in findings


def test_only_gpus_that_torch_can_use_take_part_in_the_proof():
    assert [A100S.usable, v100s(CU130).usable, v100s(CU126).usable, NO_GPUS.usable] == [8, 0, 4, 0]
    assert grounds(8) == [(2, "GPU")]
    assert grounds(1) == [(1, "GPU"), (2, "CPU")]
    assert grounds(0) == [(2, "CPU")]


def test_gpus_that_the_environment_hides_are_said_to_be_hidden():
    (first, *_) = judge_gpus(replace(NO_GPUS, hidden="", driver="580.65"))
    assert "CUDA_VISIBLE_DEVICES= shows none" in first.value


def test_a_link_of_cpu_ranks_is_held_to_the_plans_row_for_them():
    links = tuple(Link(place, name, MIB, 0.2e9) for place in ("within", "between") for name in ("all-gather", "all-reduce"))
    slow = [f for f in judge_network(replace(NETWORK, backend="gloo", row="cpu", links=links), 2) if f.state == "warning"]
    assert len(slow) == 4
    assert all("the plan assumes 1" in f.value and "GLOO_SOCKET_IFNAME" in f.repair for f in slow)
