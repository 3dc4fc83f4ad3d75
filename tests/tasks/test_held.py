"""Examples held back are found once: the cache gives them again, whatever kind they are and wherever the files lie today."""

from __future__ import annotations

import json

import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import Classification, Conversations, Pairs, PlainText
from pipeline.tasks import prepare
from pipeline.tasks.example import Dropped
from tests.bases import make_tokenizer
from tests.tasks.making import encoder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def task_of(kind, file):
    rows = {
        "jsonl": [{"prompt": f"p {n}", "completion": f"é {n}\u2028"} for n in range(60)],
        "chat": [{"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]} for n in range(60)],
        "classification": [{"text": f"t {n}", "pair": "x", "label": "ab"[n % 2]} for n in range(60)],
        "text": [{"text": f"some text {n}"} for n in range(60)],
    }[kind]
    lines = list(map(json.dumps, rows))
    lines[7] = "{"
    file.write_text("\n".join(lines) + "\n")
    common = {"kind": kind, "data": str(file), "dev_fraction": 0.3, "bad_rows": "drop"}
    match kind:
        case "jsonl":
            return Pairs(**common)
        case "chat":
            return Conversations(**common)
        case "classification":
            return Classification(**common, labels=("a", "b"), text_pair="pair")
        case _:
            return PlainText(**common)


@pytest.mark.parametrize("kind", ["jsonl", "chat", "classification", "text"])
def test_the_same_examples_come_from_the_cache_under_todays_name(kind, tmp_path, monkeypatch):
    file, moved = tmp_path / "own.jsonl", tmp_path / "moved.jsonl"
    make_tokenizer(tmp_path)
    task, made = task_of(kind, file), encoder(tmp_path)
    source = prepare.open_split(task, "valid")
    fresh = list(source.read())
    assert 5 < len(fresh) < 40
    monkeypatch.setattr(type(made), "usable", lambda self, found: found)
    assert list(prepare.source_of(task, "valid", made).read()) == fresh
    file.rename(moved)
    again = prepare.source_of(task.model_copy(update={"data": str(moved)}), "valid", made)
    # The reader of the files is not asked any more.
    monkeypatch.setattr("pipeline.tasks.own.rows", lambda *asked: pytest.fail("read again"))
    found = list(again.read())
    assert [example.source.replace("moved", "own") for example in found] == [example.source for example in fresh]
    assert all("moved" in example.source for example in found)


def test_other_content_or_another_share_is_looked_for_anew(tmp_path):
    file = tmp_path / "own.jsonl"
    make_tokenizer(tmp_path)
    task, made = task_of("jsonl", file), encoder(tmp_path)
    first = list(prepare.source_of(task, "valid", made).read())
    more = list(prepare.source_of(task.model_copy(update={"dev_fraction": 0.6}), "valid", made).read())
    other = list(prepare.source_of(task.model_copy(update={"dev_seed": 9}), "valid", made).read())
    assert len(more) > len(first)
    assert other != first
    file.write_text(file.read_text().replace("p ", "q "))
    assert all(isinstance(example, Dropped) or example.prompt.startswith("q") for example in prepare.source_of(task, "valid", made).read())


def test_without_a_cache_they_are_found_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    make_tokenizer(tmp_path)
    task = task_of("jsonl", tmp_path / "own.jsonl")
    assert list(prepare.source_of(task, "valid", encoder(tmp_path)).read()) == list(prepare.open_split(task, "valid").read())


def test_a_share_beside_a_validation_split_is_refused(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    task = Pairs(kind="jsonl", data=str(tmp_path), dev_fraction=0.5)
    for split in ("train", "valid"):
        with pytest.raises(JobError, match=r"task.dev_fraction = 0.5: there is a validation split already, .*valid.jsonl"):
            prepare.open_split(task, split)
