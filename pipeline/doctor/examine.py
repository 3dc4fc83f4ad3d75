"""The whole examination on a page: what is looked at, in which order, and who judges it. No torch in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.launch import visible_gpus
from pipeline.doctor.allocation import look_at_network, ranks_per_node, refuse_outside
from pipeline.doctor.disks import judge_disk, look_at_disks, places
from pipeline.doctor.finding import Finding
from pipeline.doctor.gpus import judge_gpus
from pipeline.doctor.libraries import judge_libraries
from pipeline.doctor.limits import judge_limits, look_at_limits
from pipeline.doctor.look import Look
from pipeline.doctor.network import judge_network
from pipeline.doctor.proof import grounds, judge_proof, prove
from pipeline.doctor.slurm import judge_slurm, look_at_slurm


def examine(run: Path | None, nodes: int | None) -> tuple[list[Finding], dict[str, Any] | None]:
    """All findings, in the order in which they are shown, and what was measured of the network.

    Args:
        run: where runs are to be written.
        nodes: of this allocation, whose network is to be measured.

    Raises:
        JobError: `nodes` without an allocation of so many.
    """
    if nodes:
        refuse_outside(nodes)
    with Console(stderr=True).status("looking at the libraries") as status:
        return _examined(run, nodes, status.update)


def _examined(run: Path | None, nodes: int | None, told: Callable[[str], None]) -> tuple[list[Finding], dict[str, Any] | None]:
    gpus, ranks = visible_gpus(), nodes * ranks_per_node() if nodes else 2
    # Loading libraries takes as long as all the rest that needs none.
    look = Look()
    try:
        slurm, limits = look_at_slurm(), look_at_limits()
        disks = look_at_disks(places(run), told)
        told("loading the libraries")
        looked = look.answer()
    finally:
        look.end()
    beside = [
        *(finding for disk in disks for finding in judge_disk(disk)),
        *judge_limits(limits, max(ranks, gpus), gpus),
        *judge_slurm(slurm),
    ]
    if isinstance(looked, Finding):
        return [looked, *beside, _unproven()], None
    libraries, found = looked
    findings, network = [*judge_libraries(libraries), *judge_gpus(found), *beside], None
    if libraries.broken:
        return [*findings, _unproven()], None
    if nodes:
        told(f"ranks on {nodes} nodes meet and talk")
        measured = look_at_network(nodes, run)
        if isinstance(measured, Finding):
            findings.append(measured)
        else:
            network = asdict(measured)
            findings += judge_network(measured, nodes)
    for count, on in grounds(found.usable):
        told(f"training steps on {count} {on} rank{'s'[: count != 1]}")
        findings.append(judge_proof(prove(count, on)))
    return findings, network


def _unproven() -> Finding:
    return Finding("Proof", "training steps", "not tried: the libraries do not load", "warning", "Repair them first, then run this again.")
