"""Slurm, where it is: whether its commands are there and answered, and the allocation that this process is in. No torch."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass

from pipeline.doctor.finding import Finding, Group

_GROUP: Group = "Slurm"
_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")
_ANSWER_S = 5.0
_UNCONFIGURED = "configuration source"
"""In what every command says where there is no slurm.conf."""


@dataclass(frozen=True)
class Slurm:
    missing: tuple[str, ...]
    """Commands that are not there; all of them: there is no Slurm."""
    version: str
    refused: str
    """Why the controller does not answer; empty: it does."""
    job: str | None
    """Of this process."""
    nodes: tuple[str, ...]
    """Hosts of the allocation."""
    unresolved: tuple[str, ...]
    """Those of them, or MASTER_ADDR where that is set, whose names mean nothing here."""


def look_at_slurm() -> Slurm:
    missing = tuple(name for name in _COMMANDS if shutil.which(name) is None)
    if "scontrol" in missing:
        return Slurm(missing, "", "", os.environ.get("SLURM_JOB_ID"), (), ())
    version, refused = _told("--version")[0].removeprefix("slurm-wlm").removeprefix("slurm").strip(), _told("ping")[1]
    nodes: tuple[str, ...] = ()
    if listed := os.environ.get("SLURM_JOB_NODELIST"):
        nodes = tuple(_told("show", "hostnames", listed)[0].split())
    chosen = os.environ.get("MASTER_ADDR")
    meeting = (chosen,) if chosen else nodes
    return Slurm(missing, version, refused, os.environ.get("SLURM_JOB_ID"), nodes, tuple(host for host in meeting if not _resolves(host)))


def _told(*arguments: str) -> tuple[str, str]:
    """What scontrol answers, and why it does not."""
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer in {_ANSWER_S:.0f} s"
    except OSError as error:
        return "", str(error)
    out, error_text = done.stdout.strip(), done.stderr.strip()
    down = done.returncode != 0 or "is DOWN" in out
    # Its last line is the one that it ends by.
    return out, (error_text or out or f"exit code {done.returncode}").splitlines()[-1].removeprefix("scontrol: ") if down else ""


def _resolves(host: str) -> bool:
    with suppress(OSError):
        return bool(socket.getaddrinfo(host, None))
    return False


def judge_slurm(found: Slurm) -> list[Finding]:
    """A machine without Slurm is a good machine too."""
    if len(found.missing) == len(_COMMANDS):
        if found.job:
            repair = "Put Slurm's commands into PATH; in a container, set MASTER_ADDR to the first node in the batch script."
            return [Finding(_GROUP, "Slurm", f"job {found.job}, but its commands are not here", "warning", repair)]
        return [Finding(_GROUP, "Slurm", "not here; zlora train starts its ranks itself")]
    if found.missing:
        repair = "Install the rest of Slurm's commands (slurm-client), or load its module."
        return [Finding(_GROUP, "Slurm", f"{found.version}, without {', '.join(found.missing)}", "problem", repair)]
    if _UNCONFIGURED in found.refused and not found.job:
        repair = "This machine belongs to no cluster. Where it should, SLURM_CONF names the cluster's slurm.conf."
        return [Finding(_GROUP, "Slurm", "its commands are here, a slurm.conf is not", "warning", repair)]
    if found.refused:
        repair = "scontrol ping says more: slurmctld is down, or this machine's SLURM_CONF or munge key is not the cluster's."
        return [Finding(_GROUP, "Slurm", f"{found.version}, the controller does not answer: {found.refused}", "problem", repair)]
    findings = [Finding(_GROUP, "Slurm", f"{found.version}, the controller answers")]
    if found.job:
        findings.append(_allocation(found))
    return findings


def _allocation(found: Slurm) -> Finding:
    count = len(found.nodes)
    value = f"job {found.job} on {count} node{'s'[: count != 1]}"
    # A job on one node meets there.
    if found.unresolved and count > 1:
        repair = "Ranks meet at the first node by its name: put the nodes into DNS or /etc/hosts, or set MASTER_ADDR to its address."
        return Finding(_GROUP, "allocation", f"{value}; {', '.join(found.unresolved)} cannot be resolved", "problem", repair)
    return Finding(_GROUP, "allocation", value)
