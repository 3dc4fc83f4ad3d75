"""A delta and its run -> the card of a Hugging Face repository, `README.md`: what the hub's readers parse, and what a person wants to know.

Only what is known is said: no licence, no score and no data set is made up, and a delta without its run has a card that says so. No paths.
Front matter: https://huggingface.co/docs/hub/model-cards (base_model, library_name, tags, datasets, model-index). Its strings are JSON's,
which YAML reads.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any

from pipeline.deltas.library import method_text
from pipeline.deltas.origin import Origin
from pipeline.job.task import Mix, SingleTask, titled
from pipeline.weights.manifest import Manifest

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def hub_id(base: str) -> str | None:
    """The base's name on the hub; None: a folder."""
    return base if _HUB_ID.fullmatch(base) else None


def card(name: str, manifest: Manifest, origin: Origin, data_sets: dict[str, str], made: dict[str, Any]) -> str:
    """The whole file.

    Args:
        name: of the model.
        data_sets: title of a task -> its data set on the hub, where that was trained on.
        made: how it was made from others, as `made.json` says it; empty: it was not.
    """
    base = hub_id(manifest.base) or PurePath(manifest.base).name
    parts = [
        _front(name, manifest, origin, data_sets),
        f"# {name}\n\n{method_text(manifest)} on {base}: {manifest.parameters:,} parameters{_how(manifest, made)}. PEFT loads this folder.",
        _use(manifest, base),
        _table("Base", _base(manifest, base)),
        _table("Made from", _made(made)),
    ]
    if origin.job is None:
        parts.append("## Run\n\nThe run that made it is not known: its data, settings, scores and versions are not in this card.")
        return "\n\n".join(filter(None, parts)) + "\n"
    parts += [
        _table("Data", _data(origin, data_sets)),
        _table("Scores", _scores(origin)) if origin.scores else "## Scores\n\nThe run scored nothing after this step.",
        _table("Method", _settings({f"methods[{place}]": method for place, method in enumerate(manifest.methods)})),
        _table("Training", _settings({"train": origin.job.train.model_dump(mode="json"), "base": {"dtype": manifest.dtype}})),
        _table("Versions", _versions(origin)),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _front(name: str, manifest: Manifest, origin: Origin, data_sets: dict[str, str]) -> str:
    lines = []
    if known := hub_id(manifest.base):
        lines += [f"base_model: {_quoted(known)}"]
    kind = "text-classification" if manifest.head else "text-generation"
    lines += [
        "library_name: peft",
        f"pipeline_tag: {kind}",
        "tags:",
        *(f"- {tag}" for tag in ("lora", "zlora")),
    ]
    if data_sets:
        lines += ["datasets:", *(f"- {_quoted(one)}" for one in dict.fromkeys(data_sets.values()))]
    results = _results(kind, origin, data_sets)
    if results:
        lines += ["model-index:", f"- name: {_quoted(name)}", "  results:", *results]
    return "---\n" + "\n".join(lines) + "\n---"


def _results(kind: str, origin: Origin, data_sets: dict[str, str]) -> list[str]:
    """Of every split, in model-index form."""
    titles = [titled(task) for task in _tasks(origin)]
    lines = []
    for split, metrics in origin.scores.items():
        for title in titles:
            # In a mix a metric is named after its task.
            own = {
                metric.removeprefix(f"{title}/"): value
                for metric, value in metrics.items()
                if len(titles) == 1 or metric.startswith(f"{title}/")
            }
            if own:
                lines += [
                    f"  - task: {{type: {kind}, name: {_quoted(title)}}}",
                    f"    dataset: {{name: {_quoted(title)}, type: {_quoted(data_sets.get(title, title))}, split: {_quoted(split)}}}",
                    "    metrics:",
                    *(
                        f"    - {{type: {_quoted(metric.lower())}, name: {_quoted(metric)}, value: {value!r}}}"
                        for metric, value in own.items()
                    ),
                ]
    return lines


def _tasks(origin: Origin) -> tuple[SingleTask, ...]:
    if origin.job is None:
        return ()
    return origin.job.task.sources if isinstance(origin.job.task, Mix) else (origin.job.task,)


def _use(manifest: Manifest, base: str) -> str:
    if manifest.head:
        labels = manifest.head.labels
        kind, more = "AutoModelForSequenceClassification", f", num_labels={len(labels) if labels else 1}"
    else:
        kind, more = "AutoModelForCausalLM", ""
    text = (
        "## Use\n\n```python\nfrom peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained({_quoted(base)}{more})\nmodel = PeftModel.from_pretrained(base, "this repository or folder")\n```'
    )
    if manifest.head and manifest.head.labels:
        text += f"\n\nClasses, in the order of the outputs: {', '.join(manifest.head.labels)}."
    if manifest.separator is not None:
        text += f"\n\nBetween prompt and completion stands {json.dumps(manifest.separator, ensure_ascii=False)}."
    return text + ("\n\nTrained on conversations in the base's chat template." if manifest.chat else "")


def _how(manifest: Manifest, made: dict[str, Any]) -> str:
    if made:
        return ", made by zlora from what is named below"
    return f", trained by zlora in {manifest.step:,} steps" if manifest.job_digest else ", brought into zlora from another tool"


def _made(made: dict[str, Any]) -> list[tuple[str, str]]:
    """Without paths."""
    sources = [
        (f"source {place}", ", ".join(f"{key} {value}" for key, value in source.items() if key in ("sha256", "digest", "weight")))
        for place, source in enumerate(made.get("from", ()), 1)
    ]
    total = [(f"{key}, Frobenius norms", f"{value:.6g}") for key, value in made.get("total", {}).items()]
    return [("by", f"zlora deltas {made['made_by']} {json.dumps(made['asked'])}"), *sources, *total] if made else []


def _base(manifest: Manifest, base: str) -> list[tuple[str, str]]:
    rows = [("name", base), ("digest", manifest.base_digest)]
    rows += [(f"sha256 of `{file}`", digest) for file, digest in manifest.base_files.items()]
    return [*rows, ("sha256 of the delta's tensors, as trained", manifest.sha256), ("digest of the job", manifest.job_digest or "no job")]


def _data(origin: Origin, data_sets: dict[str, str]) -> list[tuple[str, str]]:
    rows = [(titled(task), data_sets.get(titled(task)) or f"own files ({task.kind})") for task in _tasks(origin)]
    return rows + [
        (f"`{PurePath(one.file).name}`", f"{one.examples:,} examples, sha256 of tokens and what is learnt of them {one.sha256}")
        for one in origin.data
    ]


def _scores(origin: Origin) -> list[tuple[str, str]]:
    rows = [(f"{split} {metric}", f"{value:.6g}") for split, metrics in origin.scores.items() for metric, value in metrics.items()]
    return [*rows, ("chosen", f"the best of its run by {origin.chosen}" if origin.chosen else "the last of its run")]


def _settings(sections: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    return [
        (f"{section}.{key}", json.dumps(value, ensure_ascii=False))
        for section, values in sections.items()
        for key, value in values.items()
        if value is not None and key != "start"
    ]


def _versions(origin: Origin) -> list[tuple[str, str]]:
    found = origin.environment
    packages = found.get("packages") if isinstance(found.get("packages"), dict) else {}
    rows = [("python", found.get("python")), *(packages or {}).items(), ("cuda", found.get("cuda"))]
    rows += [("commit of zlora", found.get("commit")), ("ranks", found.get("ranks")), ("device", found.get("device"))]
    rows += [("seconds of training", origin.result.get("seconds"))]
    return [(str(name), str(value)) for name, value in rows if value is not None]


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    cells = "\n".join(f"| {name} | {value} |".replace("\n", " ") for name, value in ((_cell(name), _cell(value)) for name, value in rows))
    return f"## {title}\n\n| | |\n|---|---|\n{cells}" if rows else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
