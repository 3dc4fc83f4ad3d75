"""Several sources trained on together: weights, one order, each scored by itself, the same again after a stop."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from tests.training import delta_bytes, read_run, train_until, trained

JOB = """
[base]
model = "{base}"
dtype = "fp32"
[[methods]]
kind = "lora"
rank = 3
[task]
kind = "mix"
[[task.sources]]
kind = "e2e"
data = "{folder}/e2e"
weight = 2.0
[[task.sources]]
kind = "jsonl"
title = "own"
data = "{folder}/own"
separator = " ->"
weight = 0.5
[train]
batch_examples = 4
epochs = 2.0
learning_rate = 0.01
save_every_steps = 3
[evaluate]
max_new_tokens = 5
every_steps = 4
best_metric = "own/BLEU"
"""
MEANINGS = ["name[The Eagle]", "name[The Mill], area[riverside]", "food[French]"]


@pytest.fixture
def job(tmp_path, gpt2_base):
    (tmp_path / "e2e").mkdir()
    (tmp_path / "own").mkdir()
    lines = ["mr,ref", *(f'"{meaning}",It is {number} .' for number, meaning in enumerate(MEANINGS))]
    for name in ("trainset.csv", "devset.csv"):
        (tmp_path / "e2e" / name).write_text("\n".join(lines) + "\n")
    own = [json.dumps({"prompt": f"Blue {n}", "completion": f" Spice {n}"}) for n in range(10)]
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / "own" / name).write_text("\n".join(own) + "\n")
    file = tmp_path / "job.toml"
    file.write_text(JOB.format(base=gpt2_base, folder=tmp_path))
    return file


def seen(pool, job):
    """The source of every example, in the order of training."""
    return pool.run(sources_of_course, str(job))[0]


def sources_of_course(ranks, job):
    import io
    from pathlib import Path

    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.train.loop import Course

    session = open_session(read_job(Path(job)), ranks, Screen(io.StringIO(), shown=False))
    data = session.training_set()
    course = Course(data.sequences, data.stream, session.job.train)
    return [data.sequences.source(index) for step in range(course.steps) for index in course.examples(step)]


def test_weights_say_how_often_each_sources_examples_come(job, ranks2):
    places = seen(ranks2, job)
    assert len(places) == 2 * (3 * 2 + 5)
    first, second = Counter(places[:11]), Counter(places[11:])
    for epoch in (first, second):
        assert sorted(count for place, count in epoch.items() if "trainset.csv" in place) == [2, 2, 2]
    own = [{place for place in epoch if "train.jsonl" in place} for epoch in (first, second)]
    assert [len(part) for part in own] == [5, 5]
    assert len(own[0] | own[1]) == 10, "the other half in the next epoch"


def test_each_source_is_scored_by_its_own_metrics_and_the_loss_is_of_all(job, ranks2, tmp_path):
    ours = trained(ranks2, job, tmp_path / "run")
    assert len(ours.losses) == 6
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    valid = result["valid"]
    assert {"e2e/NIST", "e2e/loss", "own/BLEU", "own/exact_match", "own/perplexity", "loss"} <= valid.keys()
    assert "perplexity" not in valid
    counts = ranks2.run(targets_of, str(job))[0]
    mean = sum(valid[f"{title}/loss"] * count for title, count in counts.items()) / sum(counts.values())
    assert valid["loss"] == pytest.approx(mean, rel=1e-9)
    assert result["best"]["metric"] == "own/BLEU"
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "valid-000006.jsonl").read_text().splitlines()]
    assert Counter(row["task"] for row in rows) == {"e2e": 3, "own": 10}
    manifest = json.loads((tmp_path / "run" / "delta" / "manifest.json").read_text())
    assert manifest["separator"] is None, "there are two"


def targets_of(ranks, job):
    import io
    from pathlib import Path

    from pipeline.runs.session import open_session
    from pipeline.screen import Screen

    session = open_session(read_job(Path(job)), ranks, Screen(io.StringIO(), shown=False))
    return {data.title: sum(s.targets for s in data.sequences) for data in session.evaluation("valid")}


def test_a_mix_goes_on_exactly_on_other_ranks(job, ranks1, ranks2, tmp_path):
    whole = trained(ranks2, job, tmp_path / "whole")
    ranks2.run(train_until, str(job), str(tmp_path / "part"), (), 4)
    trained(ranks2, job, tmp_path / "part")
    assert delta_bytes(tmp_path / "part") == delta_bytes(tmp_path / "whole")
    ranks2.run(train_until, str(job), str(tmp_path / "other"), (), 2)
    trained(ranks1, job, tmp_path / "other")
    np.testing.assert_allclose(read_run(tmp_path / "other").losses, whole.losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('title = "own"\n', "", None),
        ('kind = "e2e"\n', 'kind = "e2e"\ntitle = "own"\n', 'two sources are called "own"'),
        ('title = "own"', 'title = "a/b"', "task.sources[1].title"),
        ('best_metric = "own/BLEU"', 'best_metric = "BLEU"', "own/BLEU, own/exact_match, own/loss, own/perplexity, loss"),
        ('kind = "jsonl"', 'kind = "regression"', "task.sources: their labels differ, or only some have any"),
        ("/own", "/absent", "task.sources[1].data"),
        ("weight = 0.5", "weights = 0.5", 'task.sources[1].weights: unknown key. Did you mean "weight"?'),
    ],
)
def test_what_cannot_be_mixed_is_refused(job, old, new, said):
    text = job.read_text()
    assert old in text
    text = text.replace(old, new)
    if said is None:
        text = text.replace("own/BLEU", "jsonl/BLEU")
    job.write_text(text)
    if said is None:
        read_job(job)
        return
    with pytest.raises(JobError) as caught:
        read_job(job)
    assert said in str(caught.value)


def test_a_weight_without_a_mix_is_refused(job):
    text = job.read_text()
    start, end = text.index("[task]"), text.index("[train]")
    job.write_text(text[:start] + f'[task]\nkind = "jsonl"\ndata = "{job.parent}/own"\nweight = 2.0\n' + text[end:].replace("own/", ""))
    with pytest.raises(JobError, match=r"task.weight: only sources of a mix have one"):
        read_job(job)
