"""A machine: `doctor`. Heavy imports are inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands import options
from pipeline.job.errors import JobError

if TYPE_CHECKING:
    from pipeline.screen import Screen
    from pipeline.train.engine import Ranks

_PATIENCE_S = 30.0


def doctor(
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="Where runs are to be written; runs/ when absent.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Inside an allocation: also measure the network of so many.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Can this machine run it? Libraries, GPUs, disks, limits, Slurm, and three steps on two ranks as proof; each problem with its repair.

    Exit code 2 where there is a problem. With --nodes, in a batch script, an salloc shell or on the ranks of torchrun or srun:
    rendezvous, bandwidth within and between nodes against what zlora plan assumes, clocks, and whether the nodes share the run folder.

    Example: zlora doctor --nodes 2
    """
    from pipeline.cluster.launch import inside_ranks, started_here

    if inside_ranks():
        _on_a_rank(run, nodes, as_json, proof=started_here())
    from pipeline.doctor.examine import examine
    from pipeline.doctor.finding import has_problem, report
    from pipeline.doctor.show import show
    from pipeline.screen import Screen, json_text

    findings, network = examine(run, nodes)
    if as_json:
        print(json_text(report(findings, network)))
    else:
        show(findings, Screen(sys.stdout))
    if has_problem(findings):
        sys.exit(2)


def _on_a_rank(run: Path | None, nodes: int | None, as_json: bool, proof: bool) -> None:
    """Ends the process. The ranks of the proof were started by the doctor itself."""
    from pipeline.rank import as_rank

    if not proof and nodes is None:
        if os.environ["RANK"] != "0":
            sys.exit(2)
        raise JobError("zlora doctor starts its own ranks, and these are ranks already. Run it once for each node, or give --nodes.")

    def steps(ranks: Ranks, screen: Screen) -> dict[str, Any]:
        from pipeline.doctor.steps import take_steps

        assert run
        return take_steps(ranks, run)

    def network(ranks: Ranks, screen: Screen) -> None:
        import platform

        from pipeline.doctor.finding import has_problem, report
        from pipeline.doctor.links import measure
        from pipeline.doctor.network import judge_network, network_of
        from pipeline.doctor.show import show
        from pipeline.train.engine import leave_ranks

        # The batch system's name for it: several of its nodes may be on one machine.
        facts = measure(ranks, os.environ.get("SLURMD_NODENAME") or platform.node(), run or Path("runs"))
        findings = judge_network(network_of(facts), nodes or 1)
        if as_json:
            screen.say(report(findings, facts))
        else:
            show(findings, screen)
        leave_ranks()
        if ranks.first and has_problem(findings):
            sys.exit(2)

    as_rank(None, steps if proof else network, as_json=as_json or proof, patience_s=_PATIENCE_S)
