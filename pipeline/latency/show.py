"""Latency as a table for people, and as heat maps (the paper's figure 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.latency.variants import AGAIN, BASE
from pipeline.screen import Screen


def show_latency(screen: Screen, report: dict[str, Any]) -> None:
    """A row for each batch and length: ms, and what a variant costs over the base."""
    names, host = report["order"], report["host"]
    lines = []
    for row in report["rows"]:
        cells = [f"{row['batch']}", f"{row['sequence']}", f"{row['rounds']}"]
        lines.append([*cells, *(_cell(name, row["times"][name]) for name in names)])
    title = f"{report['base']}, {report['dtype']}, one forward pass on {report['device']}: median ms ± half the interquartile range"
    screen.columns(title, ["batch", "tokens", "rounds", *names], lines)
    trained = [f"{one['name']} {one['trained_parameters'] / 1e6:.2f} M" for one in report["variants"] if one["trained_parameters"]]
    middle = [f"{name} {_percent(value)}" for name, value in report["over_base"].items() if name != BASE]
    rows = [("trained", ", ".join(trained)), ("over the base", f"{', '.join(middle)}: median of the rows")]
    if AGAIN in names:
        rows.append(("", "again is the base a second time: what it differs by is noise"))
    apart = {pair.replace("_", " "): value for pair, value in report["certificate"].items() if value is not None}
    if apart:
        rows.append(("logits differ", ", ".join(f"{pair} {value:.2g}" for pair, value in apart.items()) + " at most"))
    where = f"{host['threads']} threads, {host['cores']} cores with a load of {host['load'][0]:.1f} before"
    rows.append(("measured", f"torch {report['versions']['torch']}, {where}; weights are drawn"))
    screen.table("", rows)


def draw(report: dict[str, Any], file: Path) -> None:
    """Writes heat maps, one for each variant: percent over the base, batch by length."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.use("agg")
    names = [name for name in report["order"] if name != BASE]
    rows = {(row["batch"], row["sequence"]): row["times"] for row in report["rows"]}
    batches, lengths = (list(dict.fromkeys(key[place] for key in rows)) for place in (0, 1))
    wide = min(3, len(names))
    high = -(-len(names) // wide)
    figure = Figure(figsize=(1.5 + wide * (1.6 + 0.65 * len(batches)), high * (1.5 + 0.5 * len(lengths))), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    percents = {name: [[100 * rows[batch, length][name]["over_base"] for batch in batches] for length in lengths] for name in names}
    most = max(10.0, *(abs(value) for grid in percents.values() for line in grid for value in line))
    for panel, name in zip(panels, names, strict=False):
        image = panel.imshow(percents[name], cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        for y, line in enumerate(percents[name]):
            for x, value in enumerate(line):
                colour = "white" if abs(value) > 0.6 * most else "black"
                panel.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour)
        panel.set(title=name, xlabel="batch", ylabel="tokens", xticks=range(len(batches)), yticks=range(len(lengths)))
        panel.set_xticklabels(batches)
        panel.set_yticklabels(lengths)
    for panel in panels[len(names) :]:
        panel.axis("off")
    figure.colorbar(image, ax=panels, label="% over the base")
    figure.suptitle(f"{report['base']}, {report['dtype']}, {report['device']}: one forward pass")
    figure.savefig(file, dpi=110)


def _cell(name: str, time: dict[str, Any]) -> str:
    low, high = time["quartiles_ms"]
    text = f"{time['median_ms']:.1f} ±{(high - low) / 2:.1f}"
    return text if name == BASE else f"{text} {_percent(time['over_base'])}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"
