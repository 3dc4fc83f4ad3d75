"""A short valid job in a folder of its own, for tests that change one thing about it."""

from __future__ import annotations

from pathlib import Path

SHORT = """
[base]
model = "base"
[[methods]]
kind = "lora"
[task]
kind = "jsonl"
data = "train.jsonl"
"""


def write_job(folder: Path, text: str = SHORT) -> Path:
    """Writes `job.toml` beside the base folder and the data file that it names, relative to `folder`."""
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job = folder / "job.toml"
    job.write_text(text)
    return job
