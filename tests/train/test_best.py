"""The best delta by a named metric and the end of patience: as the scores say, and the same however often the run was ended."""

from __future__ import annotations

import json
import math
import random
import shutil
import time

import numpy as np
import pytest

from pipeline.evaluate.best import BestDelta
from pipeline.job.errors import JobError
from pipeline.job.spec import Evaluate
from pipeline.weights.state import newest_state
from tests.lives import Life
from tests.training import LORA_DROPOUT, WORDS, folder_bytes, rows, train_here, train_until, trained, write_job
from tests.whole.test_kill import steps_done, wait_until

COURSE = (
    "train.steps=30",
    'train.schedule="constant"',
    "train.learning_rate=0.1",
    LORA_DROPOUT,
    "train.save_every_steps=5",
    "train.keep_states=9",
)
"""Too fast on few examples: the perplexity of others falls, wavers, and rises again."""
BEST = 'evaluate.best_metric="perplexity"'
PATIENT = (*COURSE, BEST, "evaluate.patience=3")


@pytest.fixture(scope="module")
def job(gpt2_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    job, rng = write_job(folder, gpt2_base), np.random.default_rng(7)
    texts = [[WORDS[i] for i in rng.integers(0, len(WORDS), 3 + n)] for n in range(8)]
    (folder / "valid.jsonl").write_text("".join(json.dumps({"prompt": t[0], "completion": " " + " ".join(t)}) + "\n" for t in texts))
    task = f'valid = "{folder / "valid.jsonl"}"\n'
    job.write_text(job.read_text().replace("[train]", f"{task}[train]") + "[evaluate]\nevery_steps = 1\nmax_new_tokens = 4\n")
    return job


@pytest.fixture(scope="module")
def ended(job, ranks2, tmp_path_factory):
    """A run that came to its end early, and what the screen showed."""
    run = tmp_path_factory.mktemp("ended") / "run"
    shown = ranks2.run(train_here, str(job), str(run), PATIENT)[0]
    return run, shown


def scores(run):
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "split" in row]


def result(run):
    return json.loads((run / "result.json").read_text())


def test_training_ends_where_the_scores_say(ended):
    run, shown = ended
    found = [row["perplexity"] for row in scores(run)]
    since, best = 0, math.inf
    for step, value in enumerate(found, 1):
        since, best = (0, value) if value < best else (since + 1, best)
        assert (since == 3) == (step == len(found)), "as soon as three in a row were no better"
    told = result(run)
    assert (told["stopped_early"], told["steps"]) == (True, len(found))
    assert 4 < len(found) < 30
    assert told["best"] == {"metric": "perplexity", "split": "valid", "step": found.index(best) + 1, "value": best}
    assert told["valid"]["perplexity"] == found[-1]
    assert f"after step {len(found)}: 3 scorings in a row no better by perplexity" in shown
    assert f"best: perplexity {best:.2f} after step {found.index(best) + 1}" in shown


def test_the_best_delta_is_that_of_its_step(ended, job, ranks2, tmp_path):
    run, _ = ended
    step = result(run)["best"]["step"]
    trained(ranks2, job, tmp_path / "short", *COURSE, f"train.steps={step}")
    name = "adapter_model.safetensors"
    assert (run / "best" / name).read_bytes() == (tmp_path / "short" / "delta" / name).read_bytes()
    assert (run / "best" / name).read_bytes() != (run / "delta" / name).read_bytes()
    assert json.loads((run / "best" / "manifest.json").read_text())["step"] == step
    assert json.loads((run / "best" / "score.json").read_text()) == {"schema_version": 1, **result(run)["best"]}
    assert {p.name for p in (run / "best").iterdir()} == {p.name for p in (run / "delta").iterdir()} | {"score.json"}


def test_the_same_command_says_that_it_is_finished(ended, job, ranks2):
    run, _ = ended
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shown = ranks2.run(train_here, str(job), str(run), PATIENT)[0]
    assert "this run is finished: set evaluate.patience higher to go on" in shown
    assert {path: path.read_bytes() for path in before} == before


def test_more_patience_goes_on_as_if_it_had_been_there(ended, job, ranks2, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ended[0], run)
    more = (*PATIENT[:-1], "evaluate.patience=5")
    shown = ranks2.run(train_here, str(job), str(run), more)[0]
    assert "evaluate.patience 3 -> 5" in shown
    trained(ranks2, job, tmp_path / "whole", *more)
    same(run, tmp_path / "whole")


def same(run, whole):
    """The same decisions, scores and bytes."""
    assert rows(run) == rows(whole)
    assert scores(run) == scores(whole)
    assert folder_bytes(run / "best") == folder_bytes(whole / "best")
    assert folder_bytes(run / "delta") == folder_bytes(whole / "delta")
    ours, theirs = (newest_state(folder / "state", print) for folder in (run, whole))
    assert ours.record.best == theirs.record.best
    for key in ("steps", "stopped_early", "best", "valid"):
        assert result(run)[key] == result(whole)[key]


@pytest.mark.parametrize("step", [5, 9])
def test_stopped_and_gone_on_it_decides_the_same(step, ended, job, ranks2, tmp_path):
    ranks2.run(train_until, str(job), str(tmp_path / "run"), PATIENT, step)
    ranks2.run(train_here, str(job), str(tmp_path / "run"), PATIENT)
    same(tmp_path / "run", ended[0])


class Killed(Exception):
    pass


def killed(ranks, job, run, overrides, step, moment):
    """Ends as a killed process would: nothing more is written once the scores of `step` are."""
    from pipeline.runs.writer import Writer

    real = Writer._take

    def take(self, number, metrics):
        if number == step and moment == "before best":
            raise Killed
        real(self, number, metrics)
        if number == step:
            self._saver.finish()
            raise Killed

    Writer._take = take
    try:
        train_here(ranks, job, run, overrides)
    except Killed:
        return
    finally:
        Writer._take = real
    raise AssertionError("it was not killed")


@pytest.mark.parametrize(
    ("where", "moment"),
    [("at the best", "before best"), ("at the best", "after best"), ("at a state", "before best"), ("at the last", "after best")],
)
def test_killed_after_the_scores_were_written_down(where, moment, ended, job, ranks2, tmp_path):
    run, told = tmp_path / "run", result(ended[0])
    step = {"at the best": told["best"]["step"], "at a state": 5, "at the last": told["steps"]}[where]
    ranks2.run(killed, str(job), str(run), PATIENT, step, moment)
    assert not (run / "result.json").exists()
    ranks2.run(train_here, str(job), str(run), PATIENT)
    same(run, ended[0])


def test_from_an_older_state_the_best_is_that_states(ended, job, ranks2, ranks1, tmp_path):
    run, told = tmp_path / "run", result(ended[0])
    shutil.copytree(ended[0], run)
    for path in sorted((run / "state").iterdir())[1:]:
        shutil.rmtree(path)
    assert [p.name for p in (run / "state").iterdir()] == ["step-00000005"]
    assert told["best"]["step"] > 5, "what lies in best/ is of a later step"
    # On another number of ranks no score is the same to the last bit; what there is belongs together all the same.
    other = tmp_path / "other"
    shutil.copytree(run, other)
    ranks2.run(train_here, str(job), str(run), PATIENT)
    same(run, ended[0])
    ranks1.run(train_here, str(job), str(other), PATIENT)
    told, found = result(other), {row["step"]: row["perplexity"] for row in scores(other)}
    assert told["best"]["value"] == min(found.values()) == found[told["best"]["step"]]
    assert json.loads((other / "best" / "manifest.json").read_text())["step"] == told["best"]["step"]


def test_a_best_delta_that_is_gone_or_too_new_is_written_from_the_state(ended, job, ranks2, tmp_path):
    """The best of a state is older than the state, and none later is better: its weights are nowhere else."""
    whole, run = ended[0], tmp_path / "run"
    shutil.copytree(whole, run)
    assert newest_state(run / "state", print).record.progress.step > result(run)["best"]["step"]
    shutil.rmtree(run / "best")
    ranks2.run(train_here, str(job), str(run), PATIENT)
    same(run, whole)
    (run / "result.json").unlink()
    shutil.rmtree(run / "best")
    shutil.copytree(run / "delta", run / "best")
    ranks2.run(train_here, str(job), str(run), PATIENT)
    same(run, whole)


def test_a_chain_of_kills_decides_the_same(ended, job, tmp_path):
    run, rng = tmp_path / "run", random.Random(4)
    last = result(ended[0])["steps"]
    for _ in range(4):
        life = Life(job, run, PATIENT, slow_disk_s=0.01)
        goal = min(last, steps_done(run) + rng.randint(1, 4))
        wait_until(lambda goal=goal: steps_done(run) >= goal, life)
        time.sleep(rng.uniform(0.0, 0.1))
        life.kill(rng.randrange(2))
        life.end(timeout_s=4)
    final = Life(job, run, PATIENT)
    assert final.end(timeout_s=120) == [0, 0], final.said.read_text()
    same(run, ended[0])


def refused(ranks, job, run, overrides):
    try:
        train_here(ranks, job, run, overrides)
    except JobError as error:
        return str(error)
    raise AssertionError("it was not refused")


@pytest.mark.parametrize("changed", ['evaluate.best_metric="BLEU"', "evaluate.max_prompts=3", 'evaluate.split="train"'])
def test_what_the_best_was_chosen_by_changes_only_if_it_is_meant(changed, ended, job, ranks1, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ended[0], run)
    assert f"another course: {changed.partition('=')[0]} " in ranks1.run(refused, str(job), str(run), (*PATIENT, changed))[0]
    shown = ranks1.run(accepting, str(job), str(run), (*PATIENT, changed))[0]
    assert "the best delta so far is given up and chosen anew" in shown
    asked = json.loads(json.dumps(newest_state(run / "state", print).record.job))["evaluate"]
    told, step = result(run), result(ended[0])["steps"]
    later = [row for row in scores(run) if row["split"] == asked["split"] and row["step"] >= step]
    if changed == "evaluate.max_prompts=3":
        later = later[1:]
        assert [row["step"] for row in later][:1] == [step], "scored again, as it is asked for now"
    best = (max if asked["best_metric"] == "BLEU" else min)(row[asked["best_metric"]] for row in later)
    first = next(row["step"] for row in later if row[asked["best_metric"]] == best)
    assert told["best"] == {"metric": asked["best_metric"], "split": asked["split"], "step": first, "value": best}


def accepting(ranks, job, run, overrides):
    return train_here(ranks, job, run, overrides, accept_changes=True)


def test_without_a_split_or_java_it_is_refused_before_anything_is_loaded(gpt2_base, ranks1, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    said = ranks1.run(refused, str(job), str(tmp_path / "run"), (BEST,))[0]
    assert said.startswith('evaluate.best_metric = "perplexity": there is no valid split to score. Name its file')
    e2e = tmp_path / "e2e.toml"
    e2e.write_text(f'[base]\nmodel = "{gpt2_base}"\n[[methods]]\nkind = "lora"\n[task]\nkind = "e2e"\n')
    said = ranks1.run(without_java, str(e2e), str(tmp_path / "run"), ('evaluate.best_metric="METEOR"',))[0]
    assert said.startswith('evaluate.best_metric = "METEOR": it needs Java 8 or later')


def without_java(ranks, job, run, overrides):
    from pipeline.evaluate.metrics import meteor

    real, meteor.shutil.which = meteor.shutil.which, lambda _: None
    try:
        return refused(ranks, job, run, overrides)
    finally:
        meteor.shutil.which = real


def test_what_has_no_value_is_no_better_and_each_scoring_counts_once():
    best = BestDelta(Evaluate(best_metric="BLEU", patience=2, every_steps=1), None, None)
    taken = []
    for step, value in [(1, math.nan), (2, 1.0), (2, 5.0), (3, 1.0), (4, 2.0), (5, None)]:
        best.take(step, {"BLEU": value}, lambda step=step: taken.append(step) or {})
    best.take(6, {"loss": 9.0}, dict)
    assert taken == [2, 4]
    assert (best.best.step, best.best.value, best.best.scored_step, best.best.scorings_since) == (4, 2.0, 6, 2)
    assert best.patience_is_over
    error = BestDelta(Evaluate(best_metric="TER"), None, None)
    for step, value in enumerate([0.5, 0.6, 0.4]):
        error.take(step, {"TER": value}, dict)
    assert (error.best.step, error.patience_is_over) == (2, False)
