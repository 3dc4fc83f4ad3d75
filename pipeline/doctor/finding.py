"""One line of the doctor's answer: what was looked at, what it is, whether that is good, and if not how to repair it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["good", "warning", "problem"]
"""A problem stops a run or spoils it; a warning costs time, or is somebody else's to judge."""
Group = Literal["Python and libraries", "GPUs", "Disks", "Limits", "Slurm", "Ranks and network", "Proof"]


@dataclass(frozen=True)
class Finding:
    group: Group
    name: str
    value: str
    state: State = "good"
    repair: str = ""
    """Empty where all is good."""


def report(findings: Sequence[Finding], network: dict[str, Any] | None = None) -> dict[str, Any]:
    """For `--json`.

    Args:
        network: what was measured with `--nodes`, in numbers.
    """
    listed = [asdict(finding) for finding in findings]
    return {"schema_version": 1, "good": not has_problem(findings), "findings": listed, "network": network}


def has_problem(findings: Sequence[Finding]) -> bool:
    return any(finding.state == "problem" for finding in findings)
