"""The report of `zlora data` for people: tables, bars of lengths, and examples with the learnt tokens marked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.text import Text

from pipeline.screen import Screen

_BAR = 30
_HEAD, _TAIL = 240, 80
"""Tokens of a long example that are shown."""
_EIGHTHS = " ▏▎▍▌▋▊▉"
_RULES = {"truncate": "truncated", "drop": "left out", "refuse": "refused"}


def show_data(screen: Screen, report: dict[str, Any]) -> None:
    """Args:
    report: as `look` gives it."""
    several = len({row["source"] for row in report["splits"]}) > 1
    for row in report["splits"]:
        screen.table(_title(row, several), _split_rows(row))
    for row in report["absent"]:
        screen.table(_title(row, several), [("not usable", row["reason"])])
    if report["training"]:
        screen.table("training", _training_rows(report["training"]))
    if report["examples"]:
        how = "learnt green, special reversed, every second token underlined" if screen.coloured else "⟦learnt tokens⟧"
        shown = [line for example in report["examples"] for line in _example_rows(example, several, screen.coloured)]
        screen.table(f"training examples: {how}", shown)


def _title(row: dict[str, Any], several: bool) -> str:
    return f"{row['split']}: {row['source']}" if several else str(row["split"])


def _split_rows(row: dict[str, Any]) -> list[tuple[str, str | Text]]:
    lengths, labels, left = row["lengths"], row["labels"], row["left"]
    learnt = f"{row['targets']:,} of them learnt ({100 * row['targets'] / row['tokens']:.1f} %)"
    if labels:
        learnt = f"learnt is a label of {row['targets']:,} texts"
    rows: list[tuple[str, str | Text]] = [
        ("examples", f"{row['examples']:,} of {_files([file['file'] for file in row['files']])}"),
        ("tokens", f"{row['tokens']:,}, {learnt}"),
        ("lengths", " · ".join(f"{name} {value:,.10g}" for name, value in lengths.items())),
    ]
    most = max(part["examples"] for part in row["histogram"])
    widest = len(f"{row['histogram'][-1]['to']:,}")
    for part in row["histogram"]:
        span = f"{part['from']:>{widest},} – {part['to']:>{widest},}"
        rows.append(("", f"{span}  {_bar(part['examples'] / most)} {part['examples']:,}"))
    if labels and "classes" in labels:
        rows.append(("labels", " · ".join(f"{name} {_share(many, row['examples'])}" for name, many in labels["classes"].items() if many)))
        if none := [name for name, many in labels["classes"].items() if not many and labels["withheld"] < row["examples"]]:
            rows.append(("no example of", ", ".join(none)))
    elif labels and labels["numbers"]:
        rows.append(("numbers", " · ".join(f"{name} {value:g}" for name, value in labels["numbers"].items())))
    if labels and labels["withheld"]:
        rows.append(("withheld", f"the labels of {labels['withheld']:,} texts"))
    rows.append(("too long", _too_long(row["too_long"])))
    if left and left["tokens"] < row["tokens"]:
        rows.append(("left", f"{left['examples']:,} examples of {left['tokens']:,} tokens, {left['targets']:,} learnt"))
    return rows + [("left out", f"{part['examples']:,} x {part['reason']} (the first: {part['first']})") for part in row["dropped"]]


def _files(files: list[str]) -> str:
    if len(files) == 1:
        return files[0]
    common = os.path.commonpath([Path(file).parent for file in files])
    return f"{len(files)} files of {common}" if common else f"{len(files)} files"


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8) or (share > 0)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _share(many: int, of: int) -> str:
    return f"{many:,} ({100 * many / of:.1f} %)"


def _too_long(found: dict[str, Any]) -> str:
    if not found["examples"]:
        return f"none: {found['limit_tokens']:,} tokens fit"
    said = f"{found['examples']:,} of more than {found['limit_tokens']:,} tokens: {_RULES[found['rule']]}"
    return f"{said}. {found['refusal']}" if found["refusal"] else said


def _training_rows(training: dict[str, Any]) -> list[tuple[str, str | Text]]:
    batch, sources = training["batch_examples"], training["sources"]
    rows: list[tuple[str, str | Text]] = [
        ("an epoch", f"{training['epoch_examples']:,} examples: {training['epoch_steps']:,.10g} steps of {batch}")
    ]
    if len(sources) > 1:
        rows += [
            (f"  {part['source']}", f"{part['epoch_examples']:,}, of {part['examples']:,} with weight {part['weight']:g}")
            for part in sources
        ]
    return [*rows, ("the run", f"{training['steps']:,} steps: {training['epochs']:,.10g} epoch{'s'[: training['epochs'] != 1]}")]


def _example_rows(example: dict[str, Any], several: bool, coloured: bool) -> list[tuple[str, str | Text]]:
    tokens = example["tokens"]
    learnt = sum(token["learnt"] for token in tokens)
    what = f"{learnt:,} learnt" if learnt else f"label {'withheld' if example['label'] is None else example['label']}"
    name = f"{example['source']}, " if several else ""
    head = Text(f"{name}{example['place']}: {len(tokens):,} tokens, {what}", style="dim" if coloured else "")
    return [("", head), ("", _marked(tokens, coloured))]


def _marked(tokens: list[dict[str, Any]], coloured: bool) -> Text:
    text, within = Text(), False
    hidden = len(tokens) - _HEAD - _TAIL
    for place, token in enumerate(tokens):
        if hidden > 0 and _HEAD <= place < _HEAD + hidden:
            if place == _HEAD:
                text.append(f" ⋯ {hidden:,} tokens ⋯ ", style="dim" if coloured else "")
            continue
        if not coloured and token["learnt"] != within:
            text.append("⟦" if token["learnt"] else "⟧")
        within = token["learnt"]
        style = " ".join(("bold green" * token["learnt"], "reverse" * token["special"], "underline" * (place % 2))) if coloured else ""
        text.append(_visible(token["text"]), style=style)
    if within and not coloured:
        text.append("⟧")
    if text.plain.endswith("\n"):
        text.right_crop(1)
    return text


def _visible(text: str) -> str:
    """Line ends are shown and end a line; what cannot be printed is written as Python does, so that data cannot steer a terminal."""
    return "".join(c if c.isprintable() else "↵\n" if c == "\n" else c.encode("unicode_escape").decode() for c in text)
