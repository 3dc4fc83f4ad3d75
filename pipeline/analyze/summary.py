"""The rows of an analysis, many layers for each role -> each role's mean over its layers, with the layers that are least and most."""

from __future__ import annotations

from typing import Any

from pipeline.analyze.walk import BASES

Row = dict[str, Any]


def summary_of(rows: list[Row]) -> list[dict[str, Any]]:
    """One entry for each role, in the order in which they come."""
    return [_role(role, [row for row in rows if row["role"] == role]) for role in dict.fromkeys(row["role"] for row in rows)]


def _role(role: str, rows: list[Row]) -> dict[str, Any]:
    count = len(rows[0]["deltas"])
    return {
        "role": role,
        "layers": len(rows),
        "w_norm": _over({row["layer"]: row["w"]["norm"] for row in rows if row["w"]}),
        "deltas": [_delta({row["layer"]: row["deltas"][place] for row in rows if row["deltas"][place]}) for place in range(count)],
        "similarity": _similarity({row["layer"]: row["similarity"] for row in rows if row["similarity"]}),
    }


def _delta(found: dict[int, Row]) -> dict[str, Any]:
    """By layer."""
    projected = {layer: row["amplification"] for layer, row in found.items() if row["amplification"]}
    similar = {layer: row["w_similarity"] for layer, row in found.items() if row["w_similarity"]}
    return {
        "ranks": sorted({row["rank"] for row in found.values() if row["rank"] is not None}),
        **{
            key: _over({layer: row[key] for layer, row in found.items()})
            for key in ("norm", "effective_rank", "stable_rank", "directions_for_90_percent")
        },
        **{
            key: _over({layer: row[key] for layer, row in projected.items()})
            for key in ("directions", "w_in_dw", "w_in_w", "w_in_random", "factor")
        },
        "top_of_w": {which: _over({layer: _of_four(row[which]) for layer, row in similar.items()}) for which in ("right", "random")},
    }


def _of_four(phi: list[list[float]]) -> float:
    """The first four directions of dW within the top tenth of W's: section H.3 finds 0.2 at most."""
    return phi[-1][min(4, len(phi[-1])) - 1]


def _similarity(found: dict[int, Row]) -> dict[str, Any] | None:
    """phi of the first directions, and of as many as both have."""
    if not found:
        return None
    told = {}
    for which in (*BASES, "random"):
        phi = {layer: row[which] for layer, row in found.items() if row[which]}
        told[which] = {
            "first": _over({layer: values[0][0] for layer, values in phi.items()}),
            "all": _over({layer: _common(values) for layer, values in phi.items()}),
        }
    return told


def _common(phi: list[list[float]]) -> float:
    """At i = j, as far as both go."""
    last = min(len(phi), len(phi[0])) - 1
    return phi[last][last]


def _over(by_layer: dict[int, float | None]) -> dict[str, float | int] | None:
    values = {layer: value for layer, value in by_layer.items() if value is not None}
    if not values:
        return None
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return {
        "mean": sum(values.values()) / len(values),
        "least": values[least],
        "least_layer": least,
        "most": values[most],
        "most_layer": most,
    }
