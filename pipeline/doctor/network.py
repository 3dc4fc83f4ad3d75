"""The network of an allocation: ranks of all its nodes are started by srun and measure it, and what they found is judged. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.cluster.launch import PROGRAM, visible_gpus
from pipeline.doctor.finding import Finding, Group, State
from pipeline.job.errors import JobError
from pipeline.plan.hardware import gpu_of

_GROUP: Group = "Ranks and network"
_LONGEST_S = 300.0
_SKEW_S = 1.0
"""Beyond it files seem to come from the future, and logs of two nodes cannot be laid side by side. (Kerberos and munge bear minutes.)"""
_SLOW, _BROKEN = 0.5, 0.1
"""Share of the plan's figure: worth a look; another way than the plan's is taken (TCP instead of InfiniBand, main memory instead of NVLink)."""
_MIB = 1 << 20


Place = Literal["within", "between"]
"""Ranks of one node, and what one rank takes in; or nodes, and what a whole node does."""


@dataclass(frozen=True)
class Link:
    place: Place
    collective: str
    bytes: int
    bytes_s: float


@dataclass(frozen=True)
class Network:
    backend: str
    ranks: int
    nodes: tuple[str, ...]
    row: str | None
    """Of the plan's table; None: this GPU is not in it."""
    joined_s: float
    """Rendezvous of the last rank to come."""
    waited_s: float
    """Of the first one."""
    links: tuple[Link, ...]
    clocks: dict[str, tuple[float, float]]
    """Node -> seconds ahead of the first, and how wrong that may be."""
    machines: dict[str, tuple[str, ...]]
    """Node -> what its ranks compute on, and versions."""
    folder: str
    unshared: tuple[str, ...]
    """Nodes that do not see the run folder's files."""
    unlocked: tuple[str, ...]
    """Nodes that a lock there does not keep away."""


def network_of(facts: dict[str, Any]) -> Network:
    """What JSON has made of one."""
    return Network(
        **{
            **facts,
            "nodes": tuple(facts["nodes"]),
            "links": tuple(Link(**link) for link in facts["links"]),
            "clocks": {node: tuple(pair) for node, pair in facts["clocks"].items()},
            "machines": {node: tuple(words) for node, words in facts["machines"].items()},
            "unshared": tuple(facts["unshared"]),
            "unlocked": tuple(facts["unlocked"]),
        }
    )


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
    command += [sys.executable, "-c", PROGRAM, "doctor", f"--nodes={nodes}", "--json", *(["--run", str(run)] if run else [])]
    # A rank of another step must not be taken for one of this.
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return _failed(f"{nodes * each} ranks on {nodes} nodes came to no end in {_LONGEST_S:.0f} s")
    except OSError as error:
        return _failed(f"srun: {error}")
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return _failed(_cause(done.stderr) or f"srun: exit code {done.returncode}")
    return network_of(json.loads(lines[-1])["network"])


def _cause(text: str) -> str:
    """A rank's own words rather than Slurm's about it."""
    lines = [line for line in text.splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    return (own or lines or [""])[0].removeprefix("error: ")


def _failed(why: str) -> Finding:
    repair = (
        "Ranks meet at the first node: its name must resolve on all of them (or set MASTER_ADDR), a firewall must let ports 20000-65535 "
        "through, and GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME name the interface where there are several."
    )
    return Finding(_GROUP, "rendezvous", why, "problem", repair)


def judge_network(found: Network, asked: int) -> list[Finding]:
    """Against what the plan assumes (pipeline/plan/hardware.py).

    Args:
        asked: nodes.
    """
    findings = [_met(found, asked)]
    findings += [*_bandwidth(found, "within"), *_bandwidth(found, "between")]
    if len(found.nodes) > 1:
        findings += [_clock(found), _alike(found), _shared(found)]
    return findings


def _met(found: Network, asked: int) -> Finding:
    count = len(found.nodes)
    value = f"{found.ranks} ranks on {count} node{'s'[: count != 1]} by {found.backend} in {found.joined_s:.2g} s"
    if count < asked:
        return Finding(_GROUP, "rendezvous", f"{value}; {asked} nodes asked for", "problem", "Give --nodes as many as the allocation has.")
    if found.waited_s - found.joined_s > 60.0:
        repair = "Libraries load slowly on some nodes. Put the environment on a disk of each node, or into a container image."
        return Finding(_GROUP, "rendezvous", f"{value}; the first one waited {found.waited_s:.0f} s for the last", "warning", repair)
    return Finding(_GROUP, "rendezvous", value)


def _bandwidth(found: Network, place: Place) -> list[Finding]:
    links = [link for link in found.links if link.place == place]
    name = {"within": "within a node", "between": "between nodes"}[place]
    if not links:
        few = "one rank on a node" if place == "within" else "one node"
        return [Finding(_GROUP, name, f"nothing to measure: {few}")]
    row = gpu_of(found.row) if found.row else None
    assumed = (row.peers_bytes_s if place == "within" else row.node_bytes_s) if row else None
    findings = []
    for collective in ("all-gather", "all-reduce"):
        rates = {link.bytes: link.bytes_s for link in links if link.collective == collective}
        best = max(rates.values())
        value = f"{best / 1e9:.2g} GB/s ({', '.join(f'{size // _MIB} MiB {rate / 1e9:.2g}' for size, rate in rates.items())})"
        if assumed is None:
            findings.append(Finding(_GROUP, f"{collective} {name}", f"{value}; this GPU is not in the plan's table"))
            continue
        share = best / assumed
        state: State = "good" if share >= _SLOW else "warning" if share >= _BROKEN else "problem"
        repair = "" if state == "good" else _faster(found.backend, place)
        findings.append(Finding(_GROUP, f"{collective} {name}", f"{value}; the plan assumes {assumed / 1e9:.3g}", state, repair))
    return findings


def _faster(backend: str, place: Place) -> str:
    if backend != "nccl":
        return "zlora plan's times are too short by that. Other work on these cores, or a slow interface: GLOO_SOCKET_IFNAME names another."
    if place == "within":
        return 'NCCL_DEBUG=INFO must say "via P2P"; nvidia-smi topo -m shows how GPUs are connected. zlora plan\'s times are too short by that.'
    return (
        'NCCL_DEBUG=INFO must say "NET/IB", not "NET/Socket": NCCL_IB_HCA and NCCL_SOCKET_IFNAME name the network. '
        "Until then zero_hpz_partition_size keeps gathers within nodes (ds_configs/zero3_node.json)."
    )


def _clock(found: Network) -> Finding:
    node, (ahead, bound) = max(found.clocks.items(), key=lambda item: abs(item[1][0]))
    value = f"{abs(ahead) * 1e3:.1f} ms apart at most (± {bound * 1e3:.1f})"
    # Certainly too much, not just possibly.
    if abs(ahead) - bound <= _SKEW_S:
        return Finding(_GROUP, "clocks", value)
    value = f"{node} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} {found.nodes[0]}"
    return Finding(_GROUP, "clocks", value, "problem", f"On {node}: chronyc makestep (or ntpdate), and see that chronyd or ntpd runs.")


def _alike(found: Network) -> Finding:
    (most, count), *others = Counter(found.machines.values()).most_common()
    if not others:
        return Finding(_GROUP, "nodes alike", ", ".join(most))
    odd = [f"{node} has {' '.join(sorted(set(words) - set(most)))}" for node, words in found.machines.items() if words != most]
    repair = "Use one environment on a shared disk or one container image, and nodes of one kind (--constraint)."
    return Finding(_GROUP, "nodes alike", f"{'; '.join(odd)}; {count} have {' '.join(most)}", "problem", repair)


def _shared(found: Network) -> Finding:
    name = "run folder"
    if found.unshared:
        repair = "Name a folder on a file system that all nodes share: --run DIR."
        return Finding(_GROUP, name, f"{found.folder}: {', '.join(found.unshared)} cannot see it", "problem", repair)
    if found.unlocked:
        repair = "Mount it with locks between nodes: Lustre with flock (not localflock), NFS without nolock or local_lock."
        return Finding(_GROUP, name, f"{found.folder}: a lock does not reach {', '.join(found.unlocked)}", "warning", repair)
    return Finding(_GROUP, name, f"{found.folder}: seen and locked on all nodes")
