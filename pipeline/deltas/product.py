"""A delta that is made from others: its pairs, what it takes over as it is, and a report of how it was made, as a folder like any."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.deltas.lowrank import blocks_of
from pipeline.weights.delta import StoredDelta, head_key, keys_of, write_delta
from pipeline.weights.manifest import Manifest, Module
from pipeline.weights.parse import read_json
from pipeline.weights.peft import peft_config

REPORT = "made.json"
"""In the delta's folder: from what it was made, and what that cost."""
Pairs = dict[str, tuple[Module, torch.Tensor, torch.Tensor]]
"""By module: A [R, K], B [D, R]."""


def write_product(out: Path, stored: StoredDelta, pairs: Pairs, report: dict[str, Any]) -> None:
    """Writes it.

    Args:
        stored: what the rest is taken from; its manifest says what the result is of.
        pairs: all of the result's.
    """
    tensors: dict[str, torch.Tensor] = {}
    trained = 0
    for name, (_, a, b) in pairs.items():
        a_key, b_key = keys_of(name)
        tensors[a_key], tensors[b_key] = a, b
        trained += sum(len(block.columns) * (a.shape[1] + len(block.rows)) for block in blocks_of(b))
    rest = {head_key(name): tensor for name, tensor in stored.head.items()} | stored.replaced | stored.other | stored.added
    tensors |= rest
    modules = tuple(module for module, _, _ in pairs.values())
    manifest = replace(
        stored.manifest,
        job_digest="",
        parameters=trained + sum(tensor.numel() for tensor in rest.values()),
        modules=modules,
        # No job has trained such pairs: their ranks are the modules'.
        methods=tuple(method for method in stored.manifest.methods if method.get("kind") != "lora"),
    )
    config = None if manifest.replaced or manifest.added or manifest.other else peft_config(modules, manifest.base, manifest.head)
    write_delta(out, tensors, config, _without_digest(manifest), {REPORT: report})


def made_of(folder: Path) -> dict[str, Any]:
    """The report of a delta that was made from others; empty where it was not, or where the report cannot be read."""
    try:
        report = read_json(folder / REPORT)
        sound = all(isinstance(value, int | float) for value in report["total"].values()) and all(dict(one) for one in report["from"])
        return report if sound and {"made_by", "asked"} <= set(report) else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _without_digest(manifest: Manifest) -> dict[str, Any]:
    known = {"sha256", "schema_version"}
    return {field.name: getattr(manifest, field.name) for field in fields(manifest) if field.name not in known}
