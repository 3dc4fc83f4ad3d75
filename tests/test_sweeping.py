"""`zlora sweep` and `zlora compare`: many small trainings on this machine, through the front door."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.compare.collect import collect
from pipeline.compare.group import compare
from tests.training import write_job

ROOT = Path(__file__).parents[1]
SWEEP = '[sweep.grid]\n"methods.0.rank" = [1, 2]\n"train.seed" = [1, 2]\n'


def zlora(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def study(gpt2_base, tmp_path_factory):
    """A sweep whose second member fails, ended in its third, then run to its end."""
    folder = tmp_path_factory.mktemp("study")
    job = write_job(folder, gpt2_base)
    job.write_text(f'{job.read_text()}[evaluate]\nsplit = "train"\nmax_new_tokens = 1\n{SWEEP}')
    spoiled = folder / "runs" / "job" / "rank=1,seed=2"
    spoiled.mkdir(parents=True)
    (spoiled / "result.json").write_text("{}")
    first = zlora(folder, "sweep", "job.toml", "--ranks", "1")
    third = folder / "runs" / "job" / "rank=2,seed=1"
    while not third.exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said = [(*first.communicate(timeout=120), first.returncode)]
    (folder / "job-of-another.toml").write_text(job.read_text())
    second = zlora(folder, "sweep", "job.toml", "--ranks", "1")
    said.append((*second.communicate(timeout=200), second.returncode))
    (spoiled / "result.json").unlink()
    last = zlora(folder, "sweep", "job.toml", "--ranks", "1")
    said.append((*last.communicate(timeout=200), last.returncode))
    return folder, said


def test_members_are_trained_one_after_another_and_failed_ones_again(study):
    folder, ((first, _, stopped), (second, errors, failed), (last, _, done)) = study
    assert (stopped, failed, done) == (75, 2, 0)
    assert "Stopped in rank=2,seed=1. The same command again goes on." in first
    assert "1 of 4: rank=1,seed=1: is finished" in second
    assert "is not a run folder, but has a result.json" in errors
    assert "rank=1,seed=2  failed with exit code 2" in second
    assert last.count("is finished") == 3
    for rank in (1, 2):
        for seed in (1, 2):
            run = folder / "runs" / "job" / f"rank={rank},seed={seed}"
            text = (run / "job.toml").read_text()
            assert f"rank = {rank}\n" in text
            assert f"seed = {seed}\n" in text
            assert (run / "result.json").is_file()


def test_its_runs_are_compared_with_mean_and_spread_over_seeds(study):
    folder, _ = study
    found = compare(collect([folder / "runs" / "job"]))
    assert found.differ == ("methods[0].rank", "train.seed")
    assert found.left_out == {}
    results = [[json.loads((run.folder / "result.json").read_text()) for run in row.runs] for row in found.rows]
    for row, own in zip(found.rows, results, strict=True):
        losses = [each["loss"] for each in own]
        assert row.cells["loss"].mean == pytest.approx(statistics.mean(losses))
        assert row.cells["loss"].std == pytest.approx(statistics.stdev(losses))
        assert row.cells["train BLEU"].values == tuple(each["train"]["BLEU"] for each in own)
        assert all((run.ranks, run.gpu, run.seconds) == (1, False, each["seconds"]) for run, each in zip(row.runs, own, strict=True))
    one, two = (row.parameters for row in found.rows)
    assert two == 2 * one
    assert 0 < 4 * one < found.rows[0].runs[0].delta_bytes
    picture = folder / "scores.png"
    done = zlora(folder, "compare", "runs/job", "--format", "csv", "--metric", "BLEU", "--plot", picture)
    shown, errors = done.communicate(timeout=60)
    assert done.returncode == 0, errors
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert [float(row["train BLEU mean"]) for row in rows] == [row.cells["train BLEU"].mean for row in found.rows]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_member_that_failed_before_it_wrote_anything_is_named(study, tmp_path):
    folder, _ = study
    (tmp_path / "study").symlink_to(folder / "runs" / "job")
    gone = folder / "runs" / "job" / "rank=1,seed=2"
    gone.rename(tmp_path / "elsewhere")
    try:
        found = compare(collect([tmp_path / "study"]))
    finally:
        (tmp_path / "elsewhere").rename(gone)
    assert found.left_out == {str(tmp_path / "study" / "rank=1,seed=2"): "not begun"}
    assert [len(row.runs) for row in found.rows] == [1, 2]


def test_what_is_not_a_sweep_or_a_run_is_said(study, tmp_path):
    folder, _ = study
    (folder / "plain.toml").write_text((folder / "job.toml").read_text().partition("[sweep")[0])
    said = zlora(folder, "sweep", "plain.toml")
    assert "plain.toml: has no [sweep]. Add one" in said.communicate(timeout=60)[1]
    said = zlora(folder, "train", "job.toml")
    assert "job.toml: has a [sweep], so it is many runs. Use zlora sweep" in said.communicate(timeout=60)[1]
    (tmp_path / "slurm.jsonl").touch()
    for words, message in {
        ("runs/job", "--plot", "a.jpg"): "a.jpg: the name of a picture ends in .png",
        ("runs/job", "--metric", "BLUE"): "--metric BLUE: no run here has it",
        (tmp_path,): "not a run to compare",
    }.items():
        done = zlora(folder, "compare", *words)
        assert message in done.communicate(timeout=60)[1]
        assert done.returncode == 2
