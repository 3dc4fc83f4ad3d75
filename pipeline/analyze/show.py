"""An analysis as tables for people: a line for each role, the mean over its layers with the least and the most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.analyze.walk import BASES
from pipeline.screen import Screen

_SHOWN = 4


def show_analysis(screen: Screen, report: dict[str, Any], out: Path | None) -> None:
    """Spectra of each delta; W within their directions where the base is known; how two deltas overlap; what was left out."""
    two, summary = len(report["deltas"]) > 1, report["summary"]
    for place, told in enumerate(report["deltas"]):
        found = [(entry, entry["deltas"][place]) for entry in summary if entry["deltas"][place]["norm"]]
        title = f"{f'delta {place + 1}: ' if two else ''}{told['delta']}"
        spectra = [
            (
                entry["role"],
                str(entry["layers"]),
                ", ".join(map(str, one["ranks"])) or "-",
                _mean(one["norm"]),
                _spread(one["effective_rank"]),
                _mean(one["stable_rank"]),
                _mean(one["directions_for_90_percent"]),
            )
            for entry, one in found
        ]
        screen.columns(f"{title}: spectra of dW", ("", "layers", "rank", "||dW||", "effective rank", "stable rank", "for 90 %"), spectra)
        if report["base"]:
            norms = [
                (
                    entry["role"],
                    _mean(entry["w_norm"]),
                    _mean(one["norm"]),
                    _mean(one["w_in_dw"]),
                    _mean(one["w_in_w"]),
                    _mean(one["w_in_random"]),
                    _spread(one["factor"]),
                    f"{_mean(one['top_of_w']['right'])} ({_mean(one['top_of_w']['random'])})",
                )
                for entry, one in found
            ]
            heads = ("", "||W||", "||dW||", "in dW's", "in W's", "in random", "amplification", "phi(W, dW) (random)")
            screen.columns(f"{title}: ||U' W V|| with the directions of dW, of W, and random ones", heads, norms)
    if two:
        both = [(entry["role"], entry["similarity"]) for entry in summary if entry["similarity"]]
        phis = [
            (role, *(f"{_mean(phi[which]['first'])} / {_mean(phi[which]['all'])}" for which in BASES), _mean(phi["random"]["all"]))
            for role, phi in both
        ]
        names = ("", "A", "B", "dW's right", "dW's left", "random")
        screen.columns("phi of the two: the first direction / all that both have", names, phis)
    _show_left(screen, report)
    if out:
        screen.table("written", [("report", str(out / "analysis.json")), ("TensorBoard", f"tensorboard --logdir {out}")])


def _show_left(screen: Screen, report: dict[str, Any]) -> None:
    if not report["base"]:
        screen.print("without --base: what needs W is left out (amplification, W beside dW)")
    for told in report["deltas"]:
        whys: dict[str, list[str]] = {}
        for one in told["left_out"]:
            whys.setdefault(one["why"], []).append(one["name"])
        for why, names in whys.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            screen.print(f"left out of {told['delta']}: {', '.join(names[:_SHOWN])}{more} ({why})")


def _mean(found: dict[str, Any] | None) -> str:
    return "-" if found is None else f"{found['mean']:.3g}"


def _spread(found: dict[str, Any] | None) -> str:
    """The mean, and the layers at the ends."""
    if found is None:
        return "-"
    return f"{found['mean']:.3g} ({found['least']:.3g} in {found['least_layer']} ... {found['most']:.3g} in {found['most_layer']})"
