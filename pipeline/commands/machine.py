"""A machine: `doctor`, `latency`. Heavy imports are inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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


def latency(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Folder with a config.json, or hub id; no weights are read.")],
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Which to time; the base always is.")
    ] = "base,merged,lora,adapter-l,adapter-h,again",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Texts of a pass.")] = "1,4,16",
    sequence: Annotated[str, typer.Option(metavar="N,N", help="Tokens of each text.")] = "128,256",
    rank: Annotated[int, typer.Option(min=1, help="LoRA's, on q and v.")] = 4,
    bottleneck: Annotated[str, typer.Option(metavar="N,N", help="Widths of the adapters.")] = "16",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="Of the base and of what is put on.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=3, help="Timed passes of each, in turns.")] = 20,
    row_seconds: Annotated[float, typer.Option(min=0, help="Begin no round of a batch and length after so long; 3 at least.")] = 20.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the percentages as heat maps, a PNG.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """How long a forward pass takes: the base, LoRA merged and not, adapters; in turns, on the GPU or on this machine's cores.

    Example: zlora latency gpt2-medium --batch 1,16,32 --sequence 128,512 --bottleneck 112
    """
    from pipeline.latency.measure import Asked, measure
    from pipeline.latency.show import draw, show_latency
    from pipeline.screen import Screen, json_text

    screen = Screen(sys.stderr if as_json else sys.stdout)
    sizes = {name: _numbers(name, text) for name, text in (("batch", batch), ("sequence", sequence), ("bottleneck", bottleneck))}
    names = tuple(name.strip() for name in methods.split(","))
    if plot and not plot.parent.is_dir():
        raise JobError(f"--plot {plot}: there is no folder {plot.parent}. Make it first.")
    asked = Asked(base, names, sizes["batch"], sizes["sequence"], rank, sizes["bottleneck"], dtype, rounds, row_seconds)
    report = measure(asked, screen)
    if plot:
        draw(report, plot)
    if as_json:
        print(json_text(report))
    else:
        show_latency(screen, report)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Raises:
    JobError: not whole numbers with commas between."""
    parts = [part.strip() for part in text.split(",")]
    if bad := [part for part in parts if not part.isdecimal() or int(part) == 0]:
        raise JobError(f'--{option} {text}: "{bad[0]}" is no number of 1 or more. Give some, with commas between: 1,4,16.')
    return tuple(dict.fromkeys(map(int, parts)))


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
