"""DART: the official JSON and XML as published, the paper's form of triples, and what is said about malformed files."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from pipeline.job.task import Dart
from tests.tasks.reading import pairs, read_examples, refused, stub_hub

TRAIN, DEV, TEST = (f"dart-v1.1.1-full-{name}" for name in ("train", "dev", "test"))
SET = {
    "tripleset": [["Harbour Inn", "OPENED", "1911"], ["[TABLECONTEXT]", "[TITLE]", "Inns of Kiel"]],
    "subtree_was_extended": False,
    "annotations": [{"source": "mine", "text": "The Harbour Inn opened in 1911."}, {"source": "mine", "text": " It opened. "}],
}
PROMPT = "Harbour Inn : opened : 1911 | [TABLECONTEXT] : [title] : Inns of Kiel"


def task(folder, **keys):
    return Dart(kind="dart", data=str(folder), **keys)


def write(folder, *sets):
    file = folder / f"{TRAIN}.json"
    file.write_text(json.dumps(list(sets), indent=2))
    return file


@pytest.mark.parametrize("folder", ["upstream_head", "lora_version"])
def test_the_development_file_is_read_whole_and_as_the_papers_converter_writes_it(shared_data, folder):
    """6,980 texts of 2,768 sets, as released; only the predicate is in lower case."""
    sets = json.loads((shared_data / "dart" / folder / f"{DEV}.json").read_text(encoding="utf-8"))
    expected = [
        (" | ".join(f"{s} : {p.lower()} : {o}" for s, p, o in one["tripleset"]), " " + annotation["text"].strip())
        for one in sets
        for annotation in one["annotations"]
    ]
    assert (len(sets), len(expected)) == (2_768, 6_980)
    assert pairs(read_examples(task(shared_data / "dart" / folder), "valid")) == expected


def test_the_test_file_is_read_whole_but_for_its_one_empty_text(shared_data):
    """12,552 texts of 5,097 sets, as released."""
    folder = shared_data / "dart" / "upstream_head"
    entries = list(ElementTree.parse(folder / f"{TEST}.xml").iter("entry"))
    texts = [lex.text or "" for entry in entries for lex in entry.iter("lex")]
    assert (len(entries), len(texts)) == (5_097, 12_552)
    examples = read_examples(task(folder, empty_texts="drop"), "test")
    assert [example.completion for example in examples] == [" " + text.strip() for text in texts if text]
    assert len(examples) == 12_551
    message = refused(task(folder), "test")
    assert f"{TEST}.xml:888: the text is empty" in message
    assert 'task.empty_texts = "drop"' in message


def test_json_and_xml_give_the_same_examples(tmp_path):
    file = write(tmp_path, SET)
    from_json = read_examples(task(tmp_path), "train")
    assert pairs(from_json) == [(PROMPT, " The Harbour Inn opened in 1911."), (PROMPT, " It opened.")]
    assert from_json[0].source == f"{file}:2"
    file.unlink()
    triples = "".join(f"<mtriple>{' | '.join(triple)}</mtriple>" for triple in SET["tripleset"])
    texts = "".join(f'\n<lex comment="{a["source"]}" lid="Id1">{a["text"]}</lex>' for a in SET["annotations"])
    (tmp_path / f"{TRAIN}.xml").write_text(
        f'<benchmark><entries><entry category="MISC" eid="Id1"><modifiedtripleset>{triples}</modifiedtripleset>{texts}</entry>'
        "</entries></benchmark>"
    )
    from_xml = read_examples(task(tmp_path), "train")
    assert pairs(from_xml) == pairs(from_json)
    assert [example.source.rpartition(":")[2] for example in from_xml] == ["2", "3"]


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"tripleset": [["a", "b"]]}, '["a", "b"] is not a triple'),
        ({"tripleset": [["a", "b", "c", "d"]]}, "is not a triple"),
        ({"tripleset": [["a", "", "c"]]}, "is not a triple"),
        ({"tripleset": [["a", 1, "c"]]}, '"tripleset" is missing or not text (it is int'),
        ({"tripleset": ["a | b | c"]}, '"tripleset" is missing or not a list'),
        ({"tripleset": []}, "the entry has no triples"),
        ({"tripleset": None}, '"tripleset" is missing or not a list (it is NoneType'),
        ({"annotations": []}, "the entry has no text"),
        ({"annotations": ["a"]}, "str, not an object"),
        ({"annotations": [{"source": "a"}]}, '"text" is missing or not text (has source)'),
        ({"annotations": [{"text": "\t"}]}, "the text is empty"),
        ({"annotations": [{"text": "\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_a_malformed_set_is_named_by_the_line_where_it_begins(tmp_path, changed, part):
    file = write(tmp_path, SET, {**SET, **changed})
    line = file.read_text().split("\n").index("  {", 2) + 1
    message = refused(task(tmp_path))
    assert message.startswith(f"{file}:{line}: ")
    assert part in message


def test_nothing_but_empty_texts_is_refused_even_where_they_may_be_dropped(tmp_path):
    write(tmp_path, {**SET, "annotations": [{"text": ""}]})
    assert "the train split has no examples" in refused(task(tmp_path, empty_texts="drop"))


def test_a_folder_without_the_split_is_told_which_files_to_put_there(tmp_path):
    assert f"Put {TRAIN}.json or {TRAIN}.xml there" in refused(task(tmp_path))


def test_the_hubs_copy_gives_the_same_examples_as_the_files(monkeypatch, tmp_path):
    annotations = {key: [annotation[key] for annotation in SET["annotations"]] for key in ("source", "text")}
    asked = stub_hub(monkeypatch, [{**SET, "annotations": annotations}])
    write(tmp_path, SET)
    assert pairs(read_examples(Dart(kind="dart"), "train")) == pairs(read_examples(task(tmp_path), "train"))
    assert asked == {"name": "Yale-LILY/dart", "revision": "refs/convert/parquet", "split": "train"}
    stub_hub(monkeypatch, [{**SET, "annotations": {"source": ["a"], "text": [""]}}])
    assert "Yale-LILY/dart/valid:1: the text is empty" in refused(Dart(kind="dart"), "valid")
