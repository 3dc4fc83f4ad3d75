"""Writes docs/jobs.md from the job's own types and docstrings: `python docs/make_jobs.py`. A test keeps the two equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.job.cluster import Cluster
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Lora, PrefixEmbed, PrefixLayer
from pipeline.job.section import Section
from pipeline.job.spec import Base, Evaluate, Memory, Published, Train
from pipeline.job.sweep import Sweep
from pipeline.job.task import E2E, Classification, Conversations, Dart, Glue, Mix, Pairs, PlainText, Regression, SamSum, WebNlg, WikiSql

TARGET = Path(__file__).parent / "jobs.md"
SECTIONS: list[tuple[str, type[Section]]] = [
    ("[base]", Base),
    ('[[methods]] kind = "lora"', Lora),
    ('[[methods]] kind = "full"', Full),
    ('[[methods]] kind = "full_top"', FullTop),
    ('[[methods]] kind = "bitfit"', BitFit),
    ('[[methods]] kind = "prefix_embed"', PrefixEmbed),
    ('[[methods]] kind = "prefix_layer"', PrefixLayer),
    ('[[methods]] kind = "adapter"', Adapter),
    ('[task] kind = "e2e"', E2E),
    ('[task] kind = "webnlg"', WebNlg),
    ('[task] kind = "dart"', Dart),
    ('[task] kind = "samsum"', SamSum),
    ('[task] kind = "wikisql"', WikiSql),
    ('[task] kind = "glue"', Glue),
    ('[task] kind = "jsonl" | "csv" | "parquet"', Pairs),
    ('[task] kind = "chat"', Conversations),
    ('[task] kind = "classification"', Classification),
    ('[task] kind = "regression"', Regression),
    ('[task] kind = "text"', PlainText),
    ('[task] kind = "mix"', Mix),
    ("[train]", Train),
    ("[evaluate]", Evaluate),
    ("[memory]", Memory),
    ("[cluster]", Cluster),
    ("[sweep]", Sweep),
    ("[published]", Published),
]
HEAD = """# Jobs

A job is one TOML file. `base.model`, a method and a task are enough; every other key has a default. Unknown keys are refused. Several
methods make a combination. Paths are relative to the folder the command runs in. `zlora check JOB` prints a job with everything filled in;
`--set train.steps=20` changes a key for one run (`--set methods.0.rank=16` for a method).

`extends = "other.toml"` as a file's first line lays it over another, named from its own folder; `extends = ["task.toml", "method.toml"]`
over several, a later one over an earlier one. A section's keys are laid over one by one; lists (`[[methods]]` too), `[published]` and
sections of another `kind` take the place of the whole. The resolved job in a run folder stands alone. The paper's
[jobs](../jobs/README.md) are built so.

This page is made from the program's own types by `docs/make_jobs.py`.
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for title, section in SECTIONS:
        parts.append(f"\n## `{title}`\n")
        if section.__doc__:
            parts.append(f"{section.__doc__.strip()}\n")
        parts.append("| key | type | default | |\n|---|---|---|---|")
        schema = section.model_json_schema()
        needed = schema.get("required", [])
        parts += [row(name, field, name in needed) for name, field in schema["properties"].items() if name != "kind"]
        parts.append("")
    return "\n".join(parts)


def row(name: str, schema: dict[str, Any], needed: bool) -> str:
    meaning = " ".join(schema.get("description", "").split())
    default = "**needed**" if needed else "" if schema["default"] is None else f"`{json.dumps(schema['default'])}`"
    return f"| `{name}` | {kind(schema)} | {default} | {meaning} |"


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    schema = next((option for option in schema.get("anyOf", []) if option.get("type") != "null"), schema)
    if "enum" in schema:
        return ", ".join(f'`"{choice}"`' for choice in schema["enum"])
    if "$ref" in schema:
        return "value"
    if "discriminator" in schema:
        return "[task]"
    if schema["type"] == "object":
        return f"table of {kind(schema['additionalProperties']).removesuffix('s')}s"
    if schema["type"] == "array":
        item = schema["items"] if "items" in schema else schema["prefixItems"][0]
        return f"list of {kind(item).removesuffix('s')}s"
    return {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}[schema["type"]]


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
