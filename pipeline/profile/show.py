"""A profile as tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.screen import Screen, size_text

_MODULES = 8


def show_profile(screen: Screen, report: dict[str, Any], folder: Path) -> None:
    """What bounds the step first; then where its time and memory go."""
    speed, time, moved, held = report["speed"], report["time"], report["gathers"], report["memory"]
    screen.table("what it says", [(str(place), text) for place, text in enumerate(report["says"], 1)])
    rate = speed["utilisation"] if speed["utilisation"] is not None else speed["share_of_matrix_products"]
    of = "the maker's peak" if speed["utilisation"] is not None else "what matrix products alone reach here"
    screen.table(
        f"{report['environment']['ranks']} x {report['environment']['device']}",
        [
            ("a step", f"{speed['step_s']['median']:.3g} s; the plan says {speed['step_s']['predicted']:.3g} s"),
            ("examples", f"{speed['examples_per_s']:,.1f} a second"),
            ("tokens", f"{speed['tokens_per_s']:,.0f} a second, {speed['target_tokens_per_s']:,.0f} of them targets"),
            ("computes", f"{speed['model_flops_per_s'] / 1e12:.3g} TFLOP/s (frozen weights count 4 N a token), {100 * rate:.0f} % of {of}"),
            ("first step", f"{report['start_s']['first step']:.2f} s, after {_start(report)}"),
        ],
    )
    rows = [
        (name, f"{1e3 * seconds:,.1f} ms", f"{100 * time['shares'][name]:.1f} %", _most(time["split_most_s"].get(name)))
        for name, seconds in time["split_s"].items()
    ]
    screen.columns("a step's time", ("", "mean of the ranks", "share", "slowest rank"), rows)
    if moved["calls"]:
        screen.table(
            "gathers of a step, on each rank",
            [
                ("calls", f"{moved['calls']:,.0f}"),
                ("gathered", f"{size_text(moved['gathered_bytes'])}, of which {size_text(moved['received_bytes'])} from other ranks"),
                ("planned", size_text(moved["predicted_gathered_bytes"])),
                ("exchanged", f"{size_text(moved['exchanged_bytes'])} instead of the vocabulary's tables"),
                ("broken traces", str(moved["trace_invalidations"])),
            ],
        )
    parts = [
        (_words(name), size_text(part["measured"]), size_text(part["predicted"]), _ratio(part)) for name, part in held["parts"].items()
    ]
    screen.columns("memory of the first rank", ("", "measured", "planned", "planned / measured"), parts)
    modules = [(row["module"], f"{1e3 * row['forward_s']:,.1f} ms", f"{1e3 * row['backward_s']:,.1f} ms") for row in report["modules"]]
    screen.columns("slowest modules of a step, by their own work", ("", "forward", "backward"), modules[:_MODULES])
    costs = ", ".join(f"{name} {cost:.2f}" for name, cost in report["cost_of_looking"].items())
    screen.table(
        "written",
        [
            ("report", str(folder / "profile.json")),
            ("picture", str(folder / "profile.png")),
            ("trace", f"{folder / 'trace.json.gz'} (open it in https://ui.perfetto.dev or chrome://tracing)"),
            ("TensorBoard", f"tensorboard --logdir {folder.parent}"),
            ("looking cost", f"{costs} times a step's time; speed is of steps without"),
        ],
    )


def _start(report: dict[str, Any]) -> str:
    others = {name: seconds for name, seconds in report["start_s"].items() if name != "first step"}
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in others.items() if seconds >= 0.05) or "nothing worth a word"


def _most(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def _ratio(part: dict[str, int]) -> str:
    return f"{part['predicted'] / part['measured']:.3f}" if part["measured"] else "-"


def _words(name: str) -> str:
    more = {"kept": "kept for backward", "forward": "most, forward", "backward": "most of the step"}
    return more.get(name, name.replace("_", " "))
