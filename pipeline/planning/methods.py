"""`zlora methods`: what each method trains on a base, counted from its shape; the paper's bases and figures, or any base. No torch.

Out: one object for programs, tables for people.
"""

from __future__ import annotations

from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.files import BASES
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Lora, Method, PrefixEmbed, PrefixLayer
from pipeline.plan.families import read_shape
from pipeline.plan.published import Row, rows
from pipeline.plan.shapes import Shape
from pipeline.plan.trained import trained
from pipeline.screen import Screen
from pipeline.weights.hub import local_config

SCHEMA_VERSION = 1


def make_counts(base: str | None) -> dict[str, Any]:
    """Every method on a base, or without one the paper's list; ready for JSON.

    Args:
        base: a folder with a config.json, one of the paper's bases, or a hub id.

    Raises:
        JobError: an unknown base or architecture.
    """
    if base is None:
        names = dict.fromkeys(row.base for row in rows())
        found = [_counted(name, read_shape(BASES / name), [row for row in rows() if row.base == name]) for name in names]
    else:
        shape = read_shape(local_config(base, None))
        found = [_counted(base, shape, [Row(base, method.kind, (method,)) for method in by_default(shape)])]
    return {"schema_version": SCHEMA_VERSION, "bases": found}


def by_default(shape: Shape) -> tuple[Method, ...]:
    """Each method with the settings that a job may leave out; dropped adapters on the upper half."""
    return (
        Lora(kind="lora"),
        Full(kind="full"),
        FullTop(kind="full_top"),
        BitFit(kind="bitfit"),
        PrefixEmbed(kind="prefix_embed"),
        PrefixLayer(kind="prefix_layer"),
        Adapter(kind="adapter", placement="houlsby"),
        Adapter(kind="adapter", placement="lin"),
        Adapter(kind="adapter", placement="pfeiffer"),
        Adapter(kind="adapter", placement="drop", first_layer=max(1, shape.layers // 2)),
    )


def _counted(name: str, shape: Shape, asked: list[Row]) -> dict[str, Any]:
    return {
        "base": name,
        "family": shape.family,
        "layers": shape.layers,
        "width": shape.width,
        "parameters": shape.parameters,
        "methods": [_method(shape, row) for row in asked],
    }


def _method(shape: Shape, row: Row) -> dict[str, Any]:
    try:
        count, refused = trained(shape, *row.methods), None
    except JobError as error:
        count, refused = None, str(error)
    return {
        "name": row.name,
        "sections": [method.model_dump(mode="json", exclude={"start"}) for method in row.methods],
        "settings": " + ".join(filter(None, map(settings_text, row.methods))),
        "trained_parameters": count,
        "share_of_base": None if count is None else count / shape.parameters,
        "ours_millions": None if count is None else row.as_printed(count),
        "printed_millions": row.printed,
        "note": refused or row.note,
    }


def settings_text(method: Method) -> str:
    """What decides how much is trained, for people."""
    match method:
        case Lora():
            return f"{' '.join(method.targets)}, rank {method.rank}"
        case FullTop():
            return f"{method.layers} layer{'s' if method.layers > 1 else ''}"
        case PrefixEmbed() | PrefixLayer():
            return f"{method.prefix_tokens} prefix, {method.infix_tokens} infix"
        case Adapter():
            first = f" from layer {method.first_layer} on" if method.first_layer else ""
            norms = (", LayerNorm" if method.placement == "lin" else ", layers' norms") if method.layernorm else ""
            return f"{method.placement}{first}, rank {method.rank}{norms}"
        case Full() | BitFit():
            return ""


def show_counts(counts: dict[str, Any], screen: Screen) -> None:
    """Tables for people; numbered notes beneath."""
    for base in counts["bases"]:
        title = f"{base['base']}: {base['parameters']:,} parameters, {base['layers']} layers of width {base['width']:,}"
        notes = list(dict.fromkeys(method["note"] for method in base["methods"] if method["note"]))
        beside = any(method["printed_millions"] for method in base["methods"])
        lines = []
        for method in base["methods"]:
            count, ours, printed = method["trained_parameters"], method["ours_millions"], method["printed_millions"]
            line = [method["name"], method["settings"]]
            line += ["none", ""] if count is None else [f"{count:,}", f"{100 * method['share_of_base']:.3g} %"]
            mark = f"[{notes.index(method['note']) + 1}]" if method["note"] else ""
            lines.append([*line, *([f"{ours} M", f"{printed} M", f"{' ' if ours == printed else '≠'} {mark}"] if beside else [mark])])
        screen.columns(title, ["method", "settings", "trained", "of the base", *(["ours", "paper"] if beside else []), ""], lines)
        for number, note in enumerate(notes, 1):
            screen.print(f"  [{number}] {note}")
        screen.print()
