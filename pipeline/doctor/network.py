"""The network of an allocation, as its ranks have measured it (links.py), against what the plan assumes. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.doctor.finding import Finding, Group, State
from pipeline.plan.hardware import gpu_of

_GROUP: Group = "Ranks and network"
_SKEW_S = 1.0
"""Beyond it files seem to come from the future, and logs of two nodes cannot be laid side by side. (Kerberos and munge bear minutes.)"""
_SLOW, _BROKEN = 0.5, 0.1
"""Share of the plan's figure: worth a look; bytes go another way than the plan's (TCP for InfiniBand, main memory for NVLink)."""
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
        return 'NCCL_DEBUG=INFO must say "via P2P"; nvidia-smi topo -m shows how GPUs are connected.'
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
