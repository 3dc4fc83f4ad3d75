"""`zlora methods`: what each method trains on a base, counted from its shape; the paper's bases and figures, or any base. No torch.

Out: one object for programs, tables for people.
"""

from __future__ import annotations

from typing import Any

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
    methods: tuple[Method, ...] = (
        Lora(kind="lora"),
        Full(kind="full"),
        FullTop(kind="full_top", layers=min(2, shape.layers)),
        BitFit(kind="bitfit"),
        PrefixEmbed(kind="prefix_embed"),
        PrefixLayer(kind="prefix_layer"),
        Adapter(kind="adapter", placement="houlsby"),
        Adapter(kind="adapter", placement="lin"),
        Adapter(kind="adapter", placement="pfeiffer"),
    )
    return methods if shape.layers == 1 else (*methods, Adapter(kind="adapter", placement="drop", first_layer=shape.layers // 2))


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
    count = trained(shape, *row.methods)
    return {
        "name": row.name,
        "sections": [method.model_dump(mode="json", exclude={"start"}) for method in row.methods],
        "settings": " + ".join(filter(None, map(settings_text, row.methods))),
        "trained_parameters": count,
        "share_of_base": count / shape.parameters,
        "ours_millions": row.as_printed(count),
        "printed_millions": row.printed,
        "note": row.note,
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
        notes = list(dict.fromkeys(row["note"] for row in base["methods"] if row["note"]))
        beside = any(row["printed_millions"] for row in base["methods"])
        lines = []
        for row in base["methods"]:
            line = [row["name"], row["settings"], f"{row['trained_parameters']:,}", f"{100 * row['share_of_base']:.3g} %"]
            if beside:
                ours, printed = row["ours_millions"], row["printed_millions"]
                note = f"[{notes.index(row['note']) + 1}]" if row["note"] else ""
                line += [f"{ours} M", f"{printed} M", f"{' ' if ours == printed else '≠'} {note}"]
            lines.append(line)
        screen.columns(title, ["method", "settings", "trained", "of the base", *(["ours", "paper", ""] if beside else [])], lines)
        for number, note in enumerate(notes, 1):
            screen.print(f"  [{number}] {note}")
        screen.print()
