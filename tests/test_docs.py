"""Documents and shipped jobs stay true to the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from typer.main import get_command

from pipeline.cli import app
from pipeline.job.read import read_job

ROOT = Path(__file__).parents[1]


def test_the_page_of_job_keys_is_the_code(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_jobs", ROOT / "docs" / "make_jobs.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (ROOT / "docs" / "jobs.md").read_text() == maker.page(), "run: python docs/make_jobs.py"


def test_every_shipped_job_is_valid(tmp_path, monkeypatch):
    (tmp_path / "data" / "e2e").mkdir(parents=True)
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    jobs = sorted((ROOT / "jobs").rglob("*.toml"))
    assert len(jobs) == 5
    for job in jobs:
        read_job(job)
        assert job.read_text().startswith("# "), f"{job} has no header"
        assert re.search(r"^# (Expected|Published)", job.read_text(), re.MULTILINE), f"{job} states no expected score"


def test_the_paper_s_jobs_have_the_paper_s_counts_and_settings(tmp_path, monkeypatch):
    (tmp_path / "data" / "e2e").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, layers, width, published in (("medium", 24, 1024, 393_216), ("large", 36, 1280, 737_280)):
        job = read_job(ROOT / "jobs" / "e2e" / f"gpt2_{name}_lora.toml")
        lora, train = job.methods[0], job.train
        assert layers * len(lora.targets) * 2 * width * lora.rank == published
        assert (lora.alpha, lora.dropout) == (32, 0.1)
        assert (train.batch_examples, train.epochs, train.learning_rate) == (8, 5, 2e-4)
        assert (train.warmup_steps, train.weight_decay, train.label_smoothing, train.schedule) == (500, 0.01, 0.1, "linear")
        assert train.clip_norm == 0


def test_the_readme_names_every_folder_and_the_docs_every_command():
    readme, index = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    rooms = [p.name for p in (ROOT / "pipeline").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(rooms) == 9
    for room in rooms:
        assert f"`pipeline/{room}/`" in readme
    commands = get_command(app).commands
    assert set(commands) == {"check", "train", "evaluate", "score", "merge"}
    for name, command in commands.items():
        assert f"`zlora {name} " in index
        for option in command.params:
            for text in option.opts:
                assert not text.startswith("--") or text in index or text == "--revision", (name, text)
