"""Ranks on all nodes of this Slurm allocation, started by srun to measure its network; what they found comes back as JSON. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pipeline.cluster.launch import PROGRAM, visible_gpus
from pipeline.doctor.finding import Finding
from pipeline.doctor.network import Network, network_of
from pipeline.job.errors import JobError

_LONGEST_S = 300.0


def refuse_outside(nodes: int) -> None:
    """Raises:
    JobError: this is no allocation, or too small a one.
    """
    if not os.environ.get("SLURM_JOB_ID"):
        raise JobError(
            f"--nodes {nodes}: this is no Slurm allocation. Get one (salloc --nodes={nodes} --gpus-per-node=8 --ntasks-per-node=8), "
            "or start the doctor on every rank by torchrun."
        )
    if (there := int(os.environ.get("SLURM_JOB_NUM_NODES", nodes))) < nodes:
        raise JobError(f"--nodes {nodes}: this allocation has {there}. Use at most {there}.")


def ranks_per_node() -> int:
    """One for each GPU; without any, as many as the allocation has tasks, but two so that they have somebody to talk to."""
    if gpus := int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0) or visible_gpus():
        return gpus
    tasks = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    return min(int(tasks) if tasks.isdigit() else 2, int(os.environ.get("SLURM_CPUS_ON_NODE", "2")))


def look_at_network(nodes: int, run: Path | None) -> Network | Finding:
    """Through ranks on so many nodes of this allocation; or, if it comes to nothing, that."""
    each = ranks_per_node()
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * each}", f"--ntasks-per-node={each}", "--kill-on-bad-exit=1", "--overlap"]
    if cores := int(os.environ.get("SLURM_CPUS_ON_NODE", "0")):
        # The job may have asked for all of a node's cores for one task.
        command.append(f"--cpus-per-task={max(1, cores // each)}")
    command += [sys.executable, "-c", PROGRAM, "doctor", f"--nodes={nodes}", "--json", *(["--run", str(run)] if run else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except subprocess.TimeoutExpired:
        return _failed(f"{nodes * each} ranks on {nodes} nodes came to no end in {_LONGEST_S:.0f} s")
    except OSError as error:
        return _failed(f"srun: {error}")
    lines = done.stdout.strip().splitlines()
    if lines and lines[-1].startswith("{"):
        return network_of(json.loads(lines[-1])["network"])
    return _told(done.stderr) or _failed(f"srun: exit code {done.returncode}")


def _told(text: str) -> Finding | None:
    """A rank's own words rather than Slurm's about it; with the rank's own repair, if it has one."""
    lines = [line for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    if repairable := next((line for line in own if line.startswith("error: ")), None):
        value, _, repair = repairable.removeprefix("error: ").partition(". ")
        return Finding("Ranks and network", "ranks", value, "problem", repair)
    return _failed((own or lines)[0]) if lines else None


def _failed(why: str) -> Finding:
    repair = (
        "Ranks meet at the first node: its name must resolve on all of them (or set MASTER_ADDR), a firewall must let ports 20000-65535 "
        "through, and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME name the interface where there are several."
    )
    return Finding("Ranks and network", "rendezvous", why, "problem", repair)
