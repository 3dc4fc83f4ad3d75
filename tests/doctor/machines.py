"""Made-up machines: a sound one of each kind, for tests to spoil."""

from __future__ import annotations

from pathlib import Path

from pipeline.doctor.disks import Disk
from pipeline.doctor.gpus import Device, Gpus
from pipeline.doctor.libraries import Libraries
from pipeline.doctor.limits import Limits
from pipeline.doctor.network import Link, Network
from pipeline.doctor.proof import Proof
from pipeline.doctor.slurm import Slurm

GIB, MIB = 1 << 30, 1 << 20
V100 = Device("Tesla V100-SXM2-32GB", (7, 0), 32 * GIB, 31 * GIB, "")
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 79 * GIB, "")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
LIBRARIES = Libraries(
    python="3.11.7",
    required=("torch>=2.6", "deepspeed==0.19.8", "transformers<6,>=5.20", "rich>=13.9", 'tomli>=2.0; python_version < "3.0"'),
    versions={"torch": "2.13.0+cu130", "deepspeed": "0.19.8", "transformers": "5.23.0", "rich": "15.0.0"},
    broken={},
    compiled=(),
    compiled_for="",
    load_s=3.0,
)
NO_GPUS = Gpus(0, None, "", "2.13.0+cpu", None, (), "", (), None, "", True)
A100S = Gpus(8, None, "580.65", "2.13.0+cu130", "13.0", CU130, "", (A100,) * 8, "2.27.5", "", True)
DISK = Disk("run folders", Path("/scratch/runs"), 1, "", 900 * GIB, 10**7, 1e9, 2e9, True)
LIMITS = Limits(65536, 1 << 20, -1, False, 64 * GIB, 512 * GIB)
NO_SLURM = Slurm(("sbatch", "srun", "squeue", "scontrol"), "", "", None, (), ())
SLURM = Slurm((), "23.11.4", "", None, (), ())
PROOF = Proof(2, "GPU", "", A100.name, "bf16", (6.6, 6.4, 6.2), (0.4, 0.4, 0.5), 0.0, 0.01, 0.02, GIB)
NODES = ("gpu07", "gpu08")
NETWORK = Network(
    backend="nccl",
    ranks=16,
    nodes=NODES,
    row="a100-80g",
    joined_s=0.4,
    waited_s=3.0,
    links=tuple(
        Link(place, collective, size * MIB, rate * share)
        for place, rate in (("within", 230e9), ("between", 170e9))
        for collective in ("all-gather", "all-reduce")
        for size, share in ((1, 0.1), (16, 0.6), (256, 1.0))
    ),
    clocks={"gpu07": (0.0, 0.0), "gpu08": (0.002, 0.0001)},
    machines=dict.fromkeys(NODES, ("NVIDIA A100-SXM4-80GB", "3.11.7", "torch 2.13.0")),
    folder="runs",
    unshared=(),
    unlocked=(),
)
