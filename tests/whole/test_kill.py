"""kill -9 of any rank at any moment loses at most `save_every_steps` steps and those of one write, and changes nothing else."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.bases import make_gpt2
from tests.lives import Life
from tests.training import rows, trained, write_job

KILLS = 24
SAVE_EVERY = 6
SETTINGS = ("train.steps=360", "methods.0.dropout=0.1", f"train.save_every_steps={SAVE_EVERY}")


def steps_done(run):
    """The last step whose row is whole."""
    try:
        rows = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for row in reversed(rows):
        try:
            return json.loads(row)["step"]
        except ValueError:
            continue
    return 0


def wait_until(condition, life, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert life.alive, life.said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_chain_of_kills_ends_where_an_uninterrupted_run_does(ranks2, tmp_path):
    # Of one layer: what is killed here is the writing.
    job, run = write_job(tmp_path, make_gpt2(tmp_path / "base", n_layer=1)), tmp_path / "run"
    rng = random.Random(20)
    lost, moments = [], {"starting": 0, "training": 0, "writing": 0}
    for kill in range(KILLS):
        before = steps_done(run)
        # A slow disk: a good part of the time something is being written.
        life = Life(job, run, SETTINGS, slow_disk_s=0.004)
        match kill % 4:
            case 0:
                time.sleep(rng.uniform(0.0, 1.5))
            case 1:
                wait_until(lambda: list((run / "state").glob(".step-*")), life)
                time.sleep(rng.uniform(0.0, 0.02))
            case _:
                goal = steps_done(run) + rng.randint(1, 25)
                wait_until(lambda goal=goal: steps_done(run) >= goal, life)
                time.sleep(rng.uniform(0.0, 0.03))
        writing = bool(list((run / "state").glob(".step-*")))
        life.kill(rng.randrange(2))
        # One whose peer never came to the meeting point waits there until somebody ends it, as the launcher does.
        codes = life.end(timeout_s=4)
        assert -9 in codes
        moments["writing" if writing else "training" if steps_done(run) > before else "starting"] += 1
        reached = max(steps_done(run), before)
        states = sorted(int(p.name[5:]) for p in (run / "state").glob("step-*"))
        lost.append(reached - (states[-1] if states else 0))
        assert steps_done(run) < 360, "the chain must not reach the end by itself"
    assert len(lost) == KILLS
    assert min(moments.values()) >= 1, moments
    # What one write takes is bounded by the next save, which waits for it.
    assert max(lost) <= 2 * SAVE_EVERY, lost
    final = Life(job, run, SETTINGS)
    assert final.end(timeout_s=120) == [0, 0], final.said.read_text()
    whole = tmp_path / "whole"
    trained(ranks2, job, whole, *SETTINGS)
    assert rows(run) == rows(whole)
    for file in (whole / "delta").iterdir():
        assert (run / "delta" / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in (run / "state").iterdir()) == sorted(p.name for p in (whole / "state").iterdir())
    assert not list(run.glob(".delta.*"))
    print(f"{KILLS} kills {moments}; steps lost each: {lost}")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_ends_by_itself_and_may_be_run_again(rank, gpt2_base, tmp_path):
    job, run = write_job(tmp_path, gpt2_base), tmp_path / "run"
    life = Life(job, run, ("train.steps=100000",))
    wait_until(lambda: steps_done(run) > 2, life)
    life.kill(rank)
    codes = life.end(timeout_s=20)
    assert codes[rank] == -9
    assert codes[1 - rank] == 76
    assert f"rank {1 - rank} lost the other ranks (step " in life.said.read_text()
