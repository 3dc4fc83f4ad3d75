"""SAMSum: the published counts, both forms of the files, and what is said about malformed ones."""

from __future__ import annotations

import json

import pytest

from pipeline.job.task import SamSum
from pipeline.tasks.open import separator_text
from tests.tasks.reading import pairs, read_examples, refused, stub_hub

# Gliwa et al. 2019, table 2.
ROWS = {"train": ("train", 14_732), "valid": ("validation", 818), "test": ("test", 819)}
ROW = {"id": "1", "dialogue": "Ada: Tea?\r\nBo: Gladly :)", "summary": "Bo takes tea. "}


def task(folder, **keys):
    return SamSum(kind="samsum", data=str(folder), **keys)


@pytest.mark.parametrize("split", ROWS)
def test_the_published_rows_are_read_whole_and_in_order(shared_data, split):
    name, count = ROWS[split]
    examples = read_examples(task(shared_data / "samsum"), split)
    assert len(examples) == count
    rows = [json.loads(line) for line in (shared_data / "samsum" / f"{name}.jsonl").open(encoding="utf-8")]
    assert [example.completion for example in examples] == [row["summary"].strip() for row in rows]
    assert [example.prompt.split() for example in examples] == [row["dialogue"].split() for row in rows]
    assert not any("\r" in example.prompt for example in examples)


def test_the_one_empty_dialogue_of_the_training_split_is_kept(shared_data):
    empty = [example.source.rpartition(":")[2] for example in read_examples(task(shared_data / "samsum"), "train") if not example.prompt]
    assert len(empty) == 1


def test_a_dialogue_is_a_turn_a_line_and_the_paper_puts_a_blank_line_after_it(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW))
    assert pairs(read_examples(task(tmp_path), "train")) == [("Ada: Tea?\nBo: Gladly :)", "Bo takes tea.")]
    assert separator_text(task(tmp_path), "<end>") == "\n\n"
    assert separator_text(task(tmp_path, separator=" TL;DR:"), "<end>") == " TL;DR:"


def test_the_official_lists_give_the_same_as_json_lines(tmp_path):
    rows = [ROW, {**ROW, "id": "2", "summary": "Tea."}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from_lines = read_examples(task(tmp_path), "train")
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    from_list = read_examples(task(tmp_path), "train")
    assert pairs(from_list) == pairs(from_lines)
    assert [example.source for example in from_list] == [f"{tmp_path}/train.json:{line}" for line in (2, 7)]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    assert len(read_examples(task(tmp_path), "valid")) == 2


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"summary": " "}, "the summary is empty"),
        ({"summary": None}, '"summary" is missing or not text (it is NoneType'),
        ({"dialogue": ["Ada: Tea?"]}, '"dialogue" is missing or not text (it is list'),
        ({"id": 1}, '"id" is missing or not text'),
        ({"id": "1"}, 'the dialogue "1" is there twice; the first is at'),
    ],
)
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_a_malformed_row_is_named(tmp_path, name, changed, part):
    rows = [ROW, {**ROW, "id": "2", **changed}]
    text = "[" + ",\n".join(map(json.dumps, rows)) + "]" if name == "train.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / name).write_text(text)
    message = refused(task(tmp_path))
    assert f"{name}:2: {part}" in message


def test_a_missing_field_is_named_with_those_there(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"id": "1", "text": "a", "summary": "b"}))
    assert 'test.jsonl:1: "dialogue" is missing or not text (has id, summary, text)' in refused(task(tmp_path), "test")


def test_the_hubs_copy_gives_the_same_examples_as_the_files(monkeypatch, tmp_path):
    asked = stub_hub(monkeypatch, [ROW, {"id": "2", "dialogue": None, "summary": "Nothing."}])
    (tmp_path / "validation.jsonl").write_text(json.dumps(ROW))
    first, second = pairs(read_examples(SamSum(kind="samsum"), "valid"))
    assert [first] == pairs(read_examples(task(tmp_path), "valid"))
    assert second == ("", "Nothing.")
    assert asked == {"name": "knkarthick/samsum", "revision": None, "split": "validation"}
