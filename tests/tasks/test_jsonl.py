"""Your own data: where a split is, texts taken exactly, and every kind of malformed line by file and number."""

from __future__ import annotations

import json

import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import Pairs
from pipeline.tasks.open import has_split
from tests.tasks.reading import read_examples

GOOD = '{"prompt": "a", "completion": "b"}\n'


def read(file, split="train", **keys):
    return read_examples(Pairs(kind="jsonl", data=str(file), **keys), split)


def refused(file, split="train", **keys):
    with pytest.raises(JobError) as caught:
        read(file, split, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_texts_are_taken_exactly_as_they_are(tmp_path):
    rows = [("  a ", " b\n"), ("", "x"), ("é\u2028", "日本 \t"), ("a", " second reference")]
    file = tmp_path / "own.jsonl"
    lines = [json.dumps({"prompt": p, "completion": c, "note": 1}, ensure_ascii=number % 2 == 0) for number, (p, c) in enumerate(rows)]
    file.write_text("\n\n".join(lines), encoding="utf-8")
    examples = read(file)
    assert [(e.prompt, e.completion) for e in examples] == rows
    assert [e.source for e in examples] == [f"{file}:{number}" for number in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not valid JSON"),
        ('{"prompt": "a"}', '"completion" is missing or not text (has prompt)'),
        ('{"completion": "a"}', '"prompt" is missing or not text (has completion)'),
        ('{"input": "a", "output": "b"}', "has input, output"),
        ('{"prompt": 3, "completion": "b"}', "it is int"),
        ('{"prompt": "a", "completion": null}', "it is NoneType"),
        ('{"prompt": "a", "completion": ""}', '"completion" is empty'),
        ('["a", "b"]', "not an object"),
        ('{"prompt": "a", "completion": "\\ud800"}', '"completion" holds half of a surrogate pair'),
        (GOOD.strip() * 2, "not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, part):
    file = tmp_path / "own.jsonl"
    file.write_text(f"{GOOD}\n{line}\n{GOOD}")
    message = refused(file)
    assert message.startswith(f"{file}:3: ")
    assert part in message


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(GOOD.encode() + b'{"prompt": "\xe9", "completion": "b"}\n')
    assert refused(file).startswith(f"{file}:2: not UTF-8 text")


def test_a_byte_order_mark_does_no_harm(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(GOOD.encode("utf-8-sig"))
    assert read(file)[0].prompt == "a"


def test_an_empty_file_is_refused(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text("\n  \n")
    message = refused(file)
    assert str(file) in message
    assert "the train split has no examples" in message


def test_a_folder_holds_each_split_under_its_name(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split, "completion": "b"}))
    assert [read(tmp_path, split)[0].prompt for split in ("train", "valid")] == ["train", "valid"]
    message = refused(tmp_path, "test")
    assert f"Add {tmp_path}/test.jsonl" in message
    task = Pairs(kind="jsonl", data=str(tmp_path))
    assert [has_split(task, split) for split in ("train", "valid", "test")] == [True, True, False]


def test_a_lone_file_is_the_training_split_and_the_others_are_named_beside_it(tmp_path):
    file, other = tmp_path / "own.jsonl", tmp_path / "held_out.jsonl"
    file.write_text(GOOD)
    other.write_text(GOOD.replace("a", "z"))
    assert read(file, "valid", valid=str(other))[0].prompt == "z"
    assert 'Add test = "FILE"' in refused(file, "test", valid=str(other))
    assert not has_split(Pairs(kind="jsonl", data=str(file)), "valid")


def test_a_split_named_in_the_job_is_read_even_beside_a_folder(tmp_path):
    (tmp_path / "valid.jsonl").write_text(GOOD)
    other = tmp_path / "other.jsonl"
    other.write_text(GOOD.replace("a", "z"))
    assert read(tmp_path, "valid", valid=str(other))[0].prompt == "z"


def test_a_split_may_be_a_folder_of_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a/z", "a/c"):
        file = tmp_path / "train" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(GOOD.replace("a", name))
    (tmp_path / "train" / "notes.md").write_text("not data")
    assert [e.prompt for e in read(tmp_path)] == ["a/c", "a/z", "b"]
    assert [e.prompt for e in read(tmp_path / "train" / "b.jsonl", "test", test=str(tmp_path / "train"))] == ["a/c", "a/z", "b"]


def test_a_split_may_be_numbered_parts(tmp_path):
    for number in (1, 0):
        (tmp_path / f"train-0000{number}-of-00002.jsonl").write_text(GOOD.replace("a", str(number)))
    assert [e.prompt for e in read(tmp_path)] == ["0", "1"]


def test_two_files_that_could_be_the_split_are_refused(tmp_path):
    (tmp_path / "valid.jsonl").write_text(GOOD)
    (tmp_path / "dev.jsonl").write_text(GOOD)
    assert "dev.jsonl and valid.jsonl could both be the valid split" in refused(tmp_path, "valid")


def test_an_empty_folder_in_a_splits_place_is_refused_by_name(tmp_path):
    file, empty = tmp_path / "own.jsonl", tmp_path / "empty"
    file.write_text(GOOD)
    empty.mkdir()
    assert "there is no test split" in refused(file, "test", test=str(empty))
