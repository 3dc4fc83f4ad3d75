"""What a method is called in a table and on a line of a plot, from its keys in a resolved job. Pure."""

from __future__ import annotations

import re
from typing import Any

NAMED = {"kind", "targets", "rank", "placement", "first_layer", "prefix_tokens", "infix_tokens", "layers"}
"""Keys that the name says."""
_KEY = re.compile(r"methods\[(\d+)\]\.(\w+)(?:\.(\w+))?")


def method_name(settings: dict[str, Any]) -> str:
    """lora q+v r=8; of several, joined."""
    return " + ".join(map(_name, _methods(settings))) or "unknown"


def family(settings: dict[str, Any]) -> str:
    """The same whatever its size: a line of a plot."""
    methods = _methods(settings)
    return " + ".join(f"adapter {method.get('placement')}" if method["kind"] == "adapter" else method["kind"] for method in methods)


def _methods(settings: dict[str, Any]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for key, value in settings.items():
        if parts := _KEY.fullmatch(key):
            method = found.setdefault(int(parts[1]), {})
            if parts[3]:
                # rank = { q = 4, v = 8 }
                method.setdefault(parts[2], {})[parts[3]] = value
            else:
                method[parts[2]] = value
    return [method for _, method in sorted(found.items()) if "kind" in method]


def _name(method: dict[str, Any]) -> str:
    match method:
        case {"kind": "lora", "targets": targets, "rank": dict(ranks)}:
            return f"lora {'+'.join(targets)} r={','.join(str(ranks.get(target)) for target in targets)}"
        case {"kind": "lora", "targets": targets, "rank": rank}:
            return f"lora {'+'.join(targets)} r={rank}"
        case {"kind": "adapter", "placement": placement, "rank": rank}:
            above = f" from layer {method['first_layer']}" if "first_layer" in method else ""
            return f"adapter {placement} r={rank}{above}"
        case {"kind": kind, "prefix_tokens": before, "infix_tokens": behind}:
            return f"{kind} {before}+{behind}"
        case {"kind": "full_top", "layers": layers}:
            return f"full_top {layers}"
        case _:
            return str(method["kind"])
