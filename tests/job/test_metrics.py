"""What a job may ask of its scores: scripts and metrics of its task, said when it is read."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.job.metrics import better, shown
from pipeline.job.read import read_job
from tests.jobs import SHORT, write_job

E2E = SHORT.replace('kind = "jsonl"\ndata = "train.jsonl"', 'kind = "e2e"')


def refused(folder, text, *overrides):
    with pytest.raises(JobError) as caught:
        read_job(write_job(folder, text), overrides)
    return str(caught.value).partition("job.toml: ")[2]


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_what_the_task_does_not_have_is_refused_with_what_it_has(tmp_path):
    assert refused(tmp_path, E2E, "evaluate.script=challenge") == (
        'evaluate.script = "challenge": e2e has mteval or pymteval. Correct or leave it out.'
    )
    assert refused(tmp_path, SHORT, "evaluate.script=mteval") == (
        'evaluate.script = "mteval": jsonl has one script only. Correct or leave it out.'
    )
    assert refused(tmp_path, E2E, "evaluate.best_metric=bleu") == (
        'evaluate.best_metric = "bleu": is not a metric of e2e. It has BLEU, NIST, METEOR, ROUGE_L, CIDEr, loss, perplexity.'
    )
    assert refused(tmp_path, SHORT, "evaluate.best_metric=TER").endswith("It has BLEU, exact_match, loss, perplexity.")


def test_patience_needs_a_metric_and_scorings(tmp_path):
    said = refused(tmp_path, SHORT, "evaluate.patience=3", "evaluate.every_steps=5")
    assert said == "evaluate.patience = 3: needs evaluate.best_metric. Set it, or leave patience out."
    said = refused(tmp_path, SHORT, "evaluate.patience=3", "evaluate.best_metric=BLEU")
    assert said == "evaluate.patience = 3: needs evaluate.every_steps. Set it, or leave patience out."
    asked = read_job(write_job(tmp_path), ("evaluate.patience=3", "evaluate.best_metric=BLEU", "evaluate.every_steps=5"))
    assert (asked.evaluate.patience, asked.evaluate.best_metric) == (3, "BLEU")


def test_less_is_better_of_losses_and_errors_only():
    lower = {
        metric
        for metric in ("BLEU", "TER", "loss", "perplexity", "ROUGE_L", "exact_match", "matthews", "rmse", "films/TER")
        if better(metric, 0.1, 0.2)
    }
    assert lower == {"TER", "loss", "perplexity", "rmse", "films/TER"}
    assert not any(better(metric, 0.2, 0.2) for metric in ("BLEU", "TER"))


def test_digits_follow_the_scale():
    assert [shown("e2e", name, 0.682051) for name in ("BLEU", "CIDEr")] == ["0.6821", "0.6821"]
    assert [shown("webnlg", name, 46.712) for name in ("BLEU", "TER")] == ["46.71", "46.7120"]
    assert (shown("texts", "perplexity", 3.14159), shown("texts", "loss", None)) == ("3.14", "not finite")
