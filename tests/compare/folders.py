"""Run folders as training leaves them, written by the same writers, without training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

from pipeline.job.read import job_toml, read_job
from pipeline.runs.folder import SCORES
from pipeline.screen import finite, json_text
from pipeline.weights.atomic import write_json, write_text
from pipeline.weights.manifest import MANIFEST, TENSORS, Manifest

LORA = 'methods=[{kind="lora", targets=["q", "v"], rank=4, alpha=8}]'
ADAPTER = 'methods=[{kind="adapter", placement="lin", rank=6}]'
JOB = '[base]\nmodel = "gpt2"\n[[methods]]\nkind = "lora"\n[task]\nkind = "{task}"\n[train]\nsteps = 400\n'
CARD, CPU = {"name": "V100", "memory_bytes": 1 << 35}, {"name": "a CPU", "threads": 2}


def write_run(
    run: Path,
    *overrides: str,
    task: str = "e2e",
    more: str = "",
    scores: dict[str, float] | None = None,
    parameters: int = 1000,
    seconds: float = 1800.0,
    devices: tuple[dict, ...] = (CARD, CARD),
    finished: bool = True,
) -> Path:
    """A run after 400 steps, whose loss goes from 3 to 1 on a straight line."""
    run.mkdir(parents=True)
    asked = run / "asked.toml"
    asked.write_text(JOB.format(task=task) + more)
    write_text(run / "job.toml", job_toml(read_job(asked, overrides)))
    asked.unlink()
    write_json(run / "environment.json", {"ranks": len(devices), "hosts": [{"host": "one", "devices": list(devices)}]})
    steps = 400 if finished else 100
    rows = [{"step": step, "loss": 3.0 - 2.0 * step / 400, "step_s": 0.5, "tokens": 9} for step in range(1, steps + 1)]
    scores = scores or {}
    rows += [{"step": step, "split": "valid", **{name: value * step / 400 for name, value in scores.items()}} for step in (100, 200, 400)]
    write_text(run / "metrics.jsonl", "".join(json_text(row) + "\n" for row in rows if row["step"] <= steps))
    write_delta(run, parameters)
    if finished:
        end = {"steps": 400, "loss": 1.0, "seconds": seconds, "peak_memory_bytes": 3 << 30, "valid": finite(scores)}
        write_json(run / "result.json", {"schema_version": 1, "job_digest": "of it", **end})
    return run


def write_delta(run: Path, parameters: int, sha256: str = "first", name: str = "delta") -> None:
    (run / name).mkdir(exist_ok=True)
    (run / name / TENSORS).write_bytes(bytes(4 * parameters))
    write_json(run / name / MANIFEST, asdict(Manifest("gpt2", "base", {}, "job", 400, parameters, (), sha256)))


def evaluated(run: Path, delta: str = "last", sha256: str = "first", changed: dict | None = None, **metrics: float) -> None:
    """As `zlora evaluate` leaves it."""
    row = {"schema_version": 1, "split": "test", "delta": delta, "delta_sha256": sha256, "changed": changed or {}, "step": 400}
    with (run / SCORES).open("a") as stream:
        stream.write(json_text({**row, "metrics": metrics}) + "\n")


def ended_with(run: Path, code: int) -> None:
    (run / "logs").mkdir()
    place = {"rank": 0, "host": "one", "step": 100, "steps": 400, "phase": f"ended with exit code {code}", "since": 0.0}
    (run / "logs" / "rank0.json").write_text(json.dumps(place))


def spread_of(*values: float) -> float:
    """Of a sample, by its definition."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
