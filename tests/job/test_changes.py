"""Which keys of a job may differ when a run goes on. Every key has a verdict on purpose: a new one fails here until it is decided."""

from __future__ import annotations

from typing import get_args

import pytest

from pipeline.job.changes import Verdict, _verdict, changes, flat, measured_otherwise, refuse_changes, scored_otherwise
from pipeline.job.cluster import Cluster
from pipeline.job.errors import JobError
from pipeline.job.method import Method
from pipeline.job.read import job_digest
from pipeline.job.spec import Job
from pipeline.job.task import Task

FREE = {
    "base.model", "base.revision", "task.data", "task.valid", "task.test", "task.test_categories", "task.section", "task.title",
    *(f"task.sources[0].{key}" for key in ("data", "valid", "test", "title")),
    "train.micro_batch_tokens", "train.packing", "train.epochs", "train.steps", "train.save_every_steps", "train.keep_states",
    "train.stop_signals", "train.stop_after_bad_steps", "train.timeout_s",
    "evaluate.split", "evaluate.at_start", "evaluate.every_steps", "evaluate.max_prompts", "evaluate.max_new_tokens",
    "evaluate.batch_tokens", "evaluate.gather", "evaluate.beams", "evaluate.length_penalty", "evaluate.early_stopping",
    "evaluate.no_repeat_ngram", "evaluate.ngram_scope", "evaluate.eos_tokens", "evaluate.temperature", "evaluate.top_k", "evaluate.top_p",
    "evaluate.seed", "evaluate.script", "evaluate.best_metric", "evaluate.patience",
    "memory.config", "memory.nvme_path", "memory.gradient_checkpointing",
    *(f"cluster.{key}" for key in Cluster.model_fields if key != "environment"), "cluster.environment.NAME",
    "sweep", "published",
}  # fmt: skip
DELIBERATE = {
    "base.dtype", "methods[0].dropout", "train.learning_rate", "train.schedule", "train.warmup_steps", "train.warmup_ratio",
    "train.weight_decay", "train.adam_betas", "train.adam_eps", "train.clip_norm", "train.label_smoothing", "train.dropout",
    "train.classifier_dropout", "memory.int8_gathers",
}  # fmt: skip
NEVER = {
    "base.added_tokens",
    "methods[0].kind", "methods[0].targets", "methods[0].rank", "methods[0].alpha", "methods[0].scaling", "methods[0].init",
    "methods[0].start", "methods[0].layers", "methods[0].prefix_tokens", "methods[0].infix_tokens", "methods[0].placement",
    "methods[0].nonlinearity", "methods[0].train_layernorm", "methods[0].first_layer",
    "task.kind", "task.name", "task.form",
    "task.separator",
    "task.too_long", "task.texts", "task.empty_texts", "train.batch_examples", "train.max_tokens", "train.seed",
    "task.train_examples", "task.train_examples_seed", "task.weight", "task.dev_fraction", "task.dev_seed", "task.bad_rows",
    "task.prompt", "task.completion", "task.messages", "task.text", "task.text_pair", "task.label", "task.labels", "task.document",
    *(f"task.sources[0].{key}" for key in (
        "kind", "separator", "too_long", "train_examples", "train_examples_seed", "weight", "dev_fraction", "dev_seed", "bad_rows",
        "prompt", "completion",
    )),
}  # fmt: skip


def job(**changed):
    sections = {"base": {"model": "gpt2"}, "methods": [{"kind": "lora"}], "task": {"kind": "jsonl", "data": "d"}, "train": {}}
    sections["cluster"] = {"environment": {"NAME": "value"}}
    for path, value in changed.items():
        section, _, key = path.partition("__")
        if not key:
            sections[section] = value
            continue
        place = sections[section][0] if section == "methods" else sections.setdefault(section, {})
        place[key] = value
    return Job.model_validate(sections)


def test_every_key_has_the_verdict_it_was_given():
    own = {"jsonl": {}, "chat": {}, "classification": {"labels": ["a", "b"]}, "regression": {}, "text": {}}
    tasks = (
        *({"kind": kind} for kind in ("e2e", "webnlg", "dart", "samsum", "wikisql")),
        *({"kind": kind, "data": "d", **keys} for kind, keys in own.items()),
        {"kind": "glue", "name": "mnli"},
        {"kind": "mix", "sources": [{"kind": "jsonl", "data": "d"}]},
    )
    assert len(tasks) == len(get_args(get_args(Task)[0]))
    keys = {key for task in tasks for key in flat("", job(task=task).model_dump(mode="json"))}
    kinds = ("full", "full_top", "bitfit", "prefix_embed", "prefix_layer", "adapter")
    assert 1 + len(kinds) == len(get_args(get_args(Method)[0]))
    keys |= {key for kind in kinds for key in flat("", job(methods=[{"kind": kind}]).model_dump(mode="json"))}
    assert keys == FREE | DELIBERATE | NEVER
    for verdict, group in ((Verdict.FREE, FREE), (Verdict.DELIBERATE, DELIBERATE), (Verdict.NEVER, NEVER)):
        assert {key for key in keys if _verdict(key) is verdict} == group
    assert _verdict("a.key.of.tomorrow") is Verdict.NEVER


def test_equal_jobs_have_no_changes():
    assert changes(job(), job()) == []


def test_free_changes_are_listed_and_allowed():
    found = changes(job(train__epochs=2.0), job(train__epochs=3.0, evaluate__every_steps=5))
    assert [str(change) for change in found] == ["train.epochs 2.0 -> 3.0", "evaluate.every_steps (absent) -> 5"]
    refuse_changes(found, "runs/x", accept=False)


def test_a_change_of_course_must_be_meant():
    found = changes(job(), job(train__learning_rate=1.0, train__steps=5))
    with pytest.raises(JobError, match=r"^runs/x: .*: train.learning_rate 0.0002 -> 1.0\. .*--accept-changes"):
        refuse_changes(found, "runs/x", accept=False)
    refuse_changes(found, "runs/x", accept=True)


def test_what_the_best_delta_was_chosen_by_must_be_meant():
    begun = job(evaluate__best_metric="BLEU", evaluate__every_steps=5)
    for key, value in {"best_metric": "loss", "beams": 4, "max_prompts": 9, "split": "test"}.items():
        asked = {"evaluate__best_metric": "BLEU", "evaluate__every_steps": 5, f"evaluate__{key}": value}
        found = changes(begun, job(**asked))
        with pytest.raises(JobError, match=rf"evaluate.{key} .*--accept-changes"):
            refuse_changes(found, "runs/x", accept=False)
        assert measured_otherwise(found) == (key != "best_metric")
    free = {"evaluate__best_metric": "BLEU", "evaluate__every_steps": 3, "evaluate__patience": 2, "evaluate__gather": "once"}
    refuse_changes(changes(begun, job(**free)), "runs/x", accept=False)
    refuse_changes(changes(job(), job(evaluate__best_metric="BLEU", evaluate__beams=4)), "runs/x", accept=False)


def test_another_methods_state_does_not_fit_whatever_is_accepted():
    found = changes(job(), job(methods__rank=4, methods__dropout=0.5, train__seed=9))
    with pytest.raises(JobError, match=r"methods\[0\].rank 8 -> 4; train.seed 1 -> 9\. .*--fresh"):
        refuse_changes(found, "runs/x", accept=True)


def test_a_method_more_is_a_change():
    two = job().model_copy(update={"methods": job().methods * 2})
    assert {change.key for change in changes(job(), two)} >= {"methods[1].kind", "methods[1].rank"}


def test_a_scoring_says_in_what_it_is_another_than_the_run_s():
    asked = job(evaluate__max_prompts=9, evaluate__batch_tokens=64, evaluate__split="test", memory__gradient_checkpointing=True)
    task = asked.task.model_copy(update={"data": "elsewhere"})
    assert scored_otherwise(job(), asked.model_copy(update={"task": task})) == {"evaluate.max_prompts": 9, "task.data": "elsewhere"}


def test_what_others_report_makes_no_other_job():
    told = job(published={"source": "a table", "scores": {"test BLEU": 0.7}})
    assert job_digest(told) == job_digest(job())
    refuse_changes(changes(job(), told), "runs/x", accept=False)
