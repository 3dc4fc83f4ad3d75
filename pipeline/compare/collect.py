"""Run folders -> what each was asked, what it reached and what it cost; and how those stand that have not ended well. No torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.job.changes import flat
from pipeline.job.errors import JobError
from pipeline.job.read import read_resolved
from pipeline.runs.folder import SCORES, read_rows
from pipeline.sweeping import JOBS
from pipeline.watch.status import find_runs, is_finished, statuses
from pipeline.weights.manifest import MANIFEST, TENSORS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FINISHED = "finished"
_NOT_SETTINGS = ("cluster", "sweep", "published")
_DELTAS = {"last": "delta", "best": "best"}
_SPLITS = ("valid", "test", "train")
Keys = dict[str, Any]
Points = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True)
class Run:
    """None: not known."""

    folder: Path
    state: str
    """`FINISHED`, or in words why it does not count."""
    settings: Keys
    """Key of the job -> value, but for where it runs. Empty where there is no job yet."""
    published: Keys | None
    results: dict[str, float | None]
    """Column -> value: "loss" of the last step, "valid BLEU" after it, "best valid BLEU" of the best delta; and of `zlora evaluate`."""
    steps: int | None
    parameters: int | None
    seconds: float | None
    """Of training, scoring not counted."""
    ranks: int | None
    gpu: bool | None
    """Whether its ranks had one each."""
    peak_memory_bytes: int | None
    """Of the first rank."""
    delta_bytes: int | None

    @property
    def finished(self) -> bool:
        return self.state == FINISHED


def collect(given: Sequence[Path]) -> list[Run]:
    """The runs of these folders, of sweeps every member, in the order of their names.

    Raises:
        JobError: there is none, or none has begun.
    """
    folders = find_runs(given)
    waiting = [folder for folder in folders if not is_finished(folder)]
    words = {Path(status.run): status.words for status in statuses(waiting)[0]}
    runs = [_run(folder, folder / "job.toml", words.get(folder)) for folder in folders]
    # Members of a sweep that have left nothing yet.
    parents = dict.fromkeys(folder.parent for folder in folders if any(other in folder.parents for other in given or (Path("runs"),)))
    jobs = [file for parent in parents for file in sorted((parent / JOBS).glob("*.toml"))]
    runs += [_run(file.parent.parent / file.stem, file, "not begun") for file in jobs if file.parent.parent / file.stem not in folders]
    if not any(run.settings for run in runs):
        raise JobError(f"{runs[0].folder}: not a run to compare: it has no job that can be read. Name runs that have begun.")
    return runs


def _run(folder: Path, job: Path, words: str | None) -> Run:
    """Args:
    words: how it stands; None: it has a result."""
    asked, result = _job(job), _object(folder / "result.json") if words is None else {}
    environment, manifest = _object(folder / "environment.json"), _object(folder / _DELTAS["last"] / MANIFEST)
    state = words or (FINISHED if result and asked else "its job.toml or result.json cannot be read")
    delta = folder / _DELTAS["last"] / TENSORS
    return Run(
        folder=folder,
        state=state,
        settings={key: value for key, value in flat("", asked).items() if key.partition(".")[0] not in _NOT_SETTINGS and value is not None},
        published=asked.get("published"),
        results={**_of_result(result), **_of_scores(folder)} if state == FINISHED else {},
        steps=result.get("steps"),
        parameters=manifest.get("parameters"),
        seconds=result.get("seconds"),
        ranks=environment.get("ranks"),
        gpu=_on_gpus(environment),
        peak_memory_bytes=result.get("peak_memory_bytes"),
        delta_bytes=delta.stat().st_size if delta.is_file() else None,
    )


def _of_result(result: Keys) -> dict[str, float | None]:
    scores = {f"{split} {name}": value for split in _SPLITS for name, value in result.get(split, {}).items()}
    if best := result.get("best"):
        scores[f"best {best['split']} {best['metric']}"] = best["value"]
    return {"loss": result.get("loss"), **scores}


def _of_scores(folder: Path) -> dict[str, float | None]:
    """By `zlora evaluate`, of the deltas that are there now; a later call counts."""
    now = {which: _object(folder / name / MANIFEST).get("sha256") for which, name in _DELTAS.items()}
    found: dict[str, float | None] = {}
    for row in read_rows(folder / SCORES):
        if row.get("delta_sha256") and row["delta_sha256"] == now.get(row.get("delta", "")):
            changed = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row.get("changed", {}).items())
            which = "best " if row["delta"] == "best" else ""
            found |= {f"{which}{row['split']} {name}{f' ({changed})' if changed else ''}": value for name, value in row["metrics"].items()}
    return found


def metric_of(column: str) -> str:
    """BLEU of "best test BLEU (max_prompts=100)"."""
    return column.partition(" (")[0].rpartition(" ")[2]


def curves(folder: Path) -> tuple[Points, dict[str, Points]]:
    """The loss of every step, and what was scored in training, by column. What is not finite is left out."""
    losses, scores = Points(), dict[str, Points]()
    for row in read_rows(folder / "metrics.jsonl"):
        if "split" in row:
            for name, value in row.items():
                if name not in ("step", "split") and isinstance(value, int | float):
                    scores.setdefault(f"{row['split']} {name}", []).append((row["step"], value))
        elif isinstance(row.get("loss"), int | float):
            losses.append((row["step"], row["loss"]))
    return losses, scores


def _on_gpus(environment: Keys) -> bool | None:
    devices = [device for host in environment.get("hosts", ()) for device in host.get("devices", ())]
    # A rank on a CPU says its threads instead.
    return all("memory_bytes" in device for device in devices) if devices else None


def _job(file: Path) -> Keys:
    """With the defaults of keys that it was written without; as it stands where another version's keys are not known."""
    if job := read_resolved(file):
        return job.model_dump(mode="json")
    with suppress(OSError, ValueError):
        return tomllib.loads(file.read_text(encoding="utf-8"))
    return {}


def _object(file: Path) -> Keys:
    with suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
