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

from pipeline.comparing import as_csv, cells, compare, markdown
from pipeline.job.errors import JobError
from pipeline.watch.status import find_runs
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


def test_runs_are_compared_with_mean_and_spread_over_seeds(study):
    folder, _ = study
    found = compare(find_runs([folder / "runs" / "job"]))
    assert found["keys"] == ["methods[0].rank", "train.seed"]
    assert [row["settings"]["methods[0].rank"] for row in found["runs"]] == [1, 1, 2, 2]
    losses = [row["results"]["loss"] for row in found["runs"]]
    assert losses == [json.loads((Path(row["run"]) / "result.json").read_text())["loss"] for row in found["runs"]]
    for place, group in enumerate(found["groups"]):
        own = losses[2 * place : 2 * place + 2]
        assert group["runs"] == 2
        assert group["mean"]["loss"] == pytest.approx(statistics.mean(own))
        assert group["spread"]["loss"] == pytest.approx(statistics.stdev(own))
    one, two = found["runs"][0]["parameters"], found["runs"][2]["parameters"]
    assert (one, two) == (one, 2 * one)
    names, lines = cells(found)
    assert names[:4] == ["run", "rank", "seed", "loss"]
    assert "train loss" in names or any(name.startswith("train ") for name in names)
    assert len(lines) == 6
    assert [row[0] for row in lines[4:]] == ["mean of 2", "mean of 2"]
    assert " ± " in lines[4][3]
    rows = list(csv.reader(io.StringIO(as_csv(names, lines))))
    assert rows == [names, *lines]
    assert markdown(names, lines).splitlines()[1].startswith("| :--- | ---: |")
    done = zlora(folder, "compare", "runs/job", "--format", "markdown")
    shown, _ = done.communicate(timeout=60)
    assert shown.splitlines()[0] == f"| {' | '.join(names)} |"
    assert len(shown.splitlines()) == 8


def test_what_is_not_a_sweep_or_a_run_is_said(study, tmp_path):
    folder, _ = study
    (folder / "plain.toml").write_text((folder / "job.toml").read_text().partition("[sweep")[0])
    said = zlora(folder, "sweep", "plain.toml")
    assert "plain.toml: has no [sweep]. Add one" in said.communicate(timeout=60)[1]
    said = zlora(folder, "train", "job.toml")
    assert "job.toml: has a [sweep], so it is many runs. Use zlora sweep" in said.communicate(timeout=60)[1]
    (tmp_path / "slurm.jsonl").touch()
    with pytest.raises(JobError, match=r"not a run to compare .* Name runs that have begun"):
        compare([tmp_path])
