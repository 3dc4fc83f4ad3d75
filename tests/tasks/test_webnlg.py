"""WebNLG 2017: the official XML as published, equal to the paper's own JSON, and what is said about malformed files."""

from __future__ import annotations

import json

import pytest

from pipeline.job.task import WebNlg
from pipeline.tasks.example import grouped
from pipeline.tasks.open import has_split
from tests.tasks.reading import pairs, read_examples, refused, stub_hub

# Gardent et al. 2017 (INLG), table 1, and the released files: all texts; those that the annotators marked good.
TEXTS = {"train": (18_102, 18_025), "valid": (2_268, 2_258), "test": (4_928, 4_928)}
TEST_PROMPTS = {"all": 1_862, "seen": 971, "unseen": 891}
ENTRY = """<entry category="Building" eid="Id{number}" size="2">
<originaltripleset><otriple>ignored | is | this</otriple></originaltripleset>
<modifiedtripleset>
<mtriple>Harbour_Inn | openingYear | 1911</mtriple>
<mtriple>Harbour_Inn | location | "Kiel, Germany"</mtriple>
</modifiedtripleset>
<lex comment="good" lid="Id1">The Harbour Inn in Kiel opened in 1911.</lex>
<lex comment="toFix" lid="Id2">Harbour Inn &amp; Kiel 1911.</lex>
</entry>
"""
PROMPT = 'Harbour_Inn : openingYear : 1911 | Harbour_Inn : location : "Kiel, Germany"'


def task(folder, **keys):
    return WebNlg(kind="webnlg", data=str(folder), **keys)


def write(folder, *entries, name="train/1triples/a.xml"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("<benchmark>\n<entries>\n" + "".join(entries) + "</entries>\n</benchmark>\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("split", TEXTS)
def test_the_official_files_have_the_published_counts(shared_data, split):
    folder = shared_data / "webnlg" / "xml"
    assert len(read_examples(task(folder, texts="all"), split)) == TEXTS[split][0]
    assert len(read_examples(task(folder), split)) == TEXTS[split][1]


@pytest.mark.parametrize("categories", TEST_PROMPTS)
def test_the_test_split_is_chosen_by_category(shared_data, categories):
    examples = read_examples(task(shared_data / "webnlg" / "xml", test_categories=categories), "test")
    assert len(grouped(examples)) == TEST_PROMPTS[categories]


def test_the_choice_of_test_categories_leaves_training_alone(shared_data):
    folder = shared_data / "webnlg" / "xml"
    assert len(read_examples(task(folder, test_categories="unseen"), "valid")) == TEXTS["valid"][1]


def test_the_xml_gives_the_texts_of_the_papers_json(shared_data):
    """As the authors' converter writes them: context and completion of every text marked good."""
    entries = json.loads((shared_data / "webnlg" / "lora_json" / "dev.json").read_text(encoding="utf-8"))["entries"]
    expected = []
    for number, entry in enumerate(entries, 1):
        fields = entry[str(number)]
        context = " | ".join(f"{t['subject']} : {t['property']} : {t['object']}" for t in fields["modifiedtripleset"])
        expected += [(context, " " + lex["lex"]) for lex in fields["lexicalisations"] if lex["comment"] == "good"]
    assert len(expected) == 2_258
    assert pairs(read_examples(task(shared_data / "webnlg" / "xml"), "valid")) == expected
    assert pairs(read_examples(task(shared_data / "webnlg" / "lora_json"), "valid")) == expected


def test_an_entry_becomes_an_example_a_text_with_its_line(tmp_path):
    write(tmp_path, ENTRY.format(number=1), name="train/2triples/b.xml")
    file = write(tmp_path, ENTRY.format(number=1), name="train/1triples/a.xml")
    first, second = read_examples(task(tmp_path), "train")
    assert (first.prompt, first.completion) == (PROMPT, " The Harbour Inn in Kiel opened in 1911.")
    assert first.source == f"{file}:9"
    assert second.source.endswith("b.xml:9")
    every = read_examples(task(tmp_path, texts="all"), "train")
    assert every[1].completion == " Harbour Inn & Kiel 1911."
    assert every[1].source == f"{file}:10"


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("| openingYear | 1911", "| openingYear", ':6: ["Harbour_Inn", "openingYear"] is not a triple'),
        ("| openingYear | 1911", "| openingYear | 19 | 11", ":6: "),
        ("| openingYear | 1911", "|  | 1911", ":6: "),
        ("The Harbour Inn in Kiel opened in 1911.", " ", ":9: the text is empty"),
        ('<lex comment="good"', "<lex", ':9: <lex> has no attribute "comment"'),
        ('category="Building" ', "", ':3: <entry> has no attribute "category"'),
        ('eid="Id1" ', "", ':3: <entry> has no attribute "eid"'),
        ("The Harbour Inn", "<text>The</text> Harbour Inn", ":9: <lex> holds <text>, not text alone"),
        ("</modifiedtripleset>", "", ":11: not valid XML: mismatched tag"),
        ("&amp;", "&", ":10: not valid XML"),
        ("mtriple>", "triple>", ":3: the entry has no triples"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path, old, new, part):
    file = write(tmp_path, ENTRY.format(number=1).replace(old, new))
    message = refused(task(tmp_path))
    assert message.startswith(f"{file}:")
    assert part in message


def test_an_entry_without_texts_is_refused(tmp_path):
    lines = [line for line in ENTRY.format(number=1).splitlines(keepends=True) if "<lex" not in line]
    write(tmp_path, *lines)
    assert "a.xml:3: the entry has no text" in refused(task(tmp_path))


def test_an_entry_twice_in_a_file_is_refused_but_not_in_two_files(tmp_path):
    write(tmp_path, ENTRY.format(number=1), name="train/2triples/b.xml")
    write(tmp_path, ENTRY.format(number=1))
    assert len(read_examples(task(tmp_path), "train")) == 2
    write(tmp_path, ENTRY.format(number=1), ENTRY.format(number=1))
    assert 'a.xml:12: the entry "Id1" is there twice; the first is at line 3' in refused(task(tmp_path))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "a.xml:1: not valid XML: no element found"),
        ("<benchmark>\n<entries>\n", "a.xml:3: not valid XML"),
        ("<benchmark/>", "a.xml:1: no <entry> in it"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>\n<benchmark>&b;</benchmark>', "a.xml:1: a document type"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, text, part):
    write(tmp_path).write_text(text)
    assert part in refused(task(tmp_path))


def test_a_choice_that_leaves_nothing_names_itself(tmp_path):
    write(tmp_path, ENTRY.format(number=1).replace("good", "toFix"))
    message = refused(task(tmp_path))
    assert "none of its 1 entries" in message
    assert 'task.texts = "good"' in message
    write(tmp_path, ENTRY.format(number=1), name="test/testdata_with_lex.xml")
    assert 'task.test_categories = "unseen"' in refused(task(tmp_path, test_categories="unseen"), "test")


def test_a_folder_without_the_split_is_told_what_to_put_there(tmp_path):
    assert "Put dev or dev.json there" in refused(task(tmp_path), "valid")
    (tmp_path / "dev").mkdir()
    assert "dev: no XML file in it" in refused(task(tmp_path), "valid")
    assert "is a file. Name the folder" in refused(task(write(tmp_path)), "valid")


def test_the_papers_json_is_checked_too(tmp_path):
    good = {
        "category": "Building",
        "lexicalisations": [{"comment": "good", "lex": "It opened in 1911."}],
        "modifiedtripleset": [{"subject": "Inn", "property": "opened", "object": "1911"}],
    }

    def message(*entries):
        (tmp_path / "train.json").write_text(json.dumps({"entries": list(entries)}, indent=1))
        return refused(task(tmp_path))

    assert 'train.json:3: "category" is missing or not text' in message({"1": {**good, "category": 3}})
    assert '"lexicalisations" is missing or not a list' in message({"1": {**good, "lexicalisations": {}}})
    assert "the entry has no text" in message({"1": {**good, "lexicalisations": []}})
    assert "the text is empty" in message({"1": {**good, "lexicalisations": [{"comment": "good", "lex": ""}]}})
    assert '"object" is missing' in message({"1": {**good, "modifiedtripleset": [{"subject": "a", "property": "b"}]}})
    assert 'the entry "1" is there twice' in message({"1": good}, {"1": good})
    assert "2 named entries in one" in message({"1": good, "2": good})
    assert "train.json:3: int, not an object" in message(3)


def test_the_hubs_copy_is_the_official_test_file_once(monkeypatch):
    def row(category, which, texts):
        return {
            "category": category,
            "eid": "Id1",
            "modified_triple_sets": {"mtriple_set": [["Inn | opened | 1911", "Inn | in | Kiel"]]},
            "lex": {"comment": ["good"] * len(texts), "lid": ["Id1"] * len(texts), "text": texts},
            "test_category": which,
        }

    rows = [
        row("Building", "testdata_no_lex", []),
        row("Artist", "testdata_unseen_with_lex", ["It opened."]),
        row("Building", "testdata_with_lex", ["It opened.", "In 1911."]),
        row("Artist", "testdata_with_lex", ["It opened."]),
    ]
    asked = stub_hub(monkeypatch, rows)
    examples = read_examples(WebNlg(kind="webnlg"), "test")
    prompt = "Inn : opened : 1911 | Inn : in : Kiel"
    assert pairs(examples) == [(prompt, " It opened."), (prompt, " In 1911."), (prompt, " It opened.")]
    assert [example.source for example in examples] == [f"webnlg-challenge/web_nlg/test:{number}" for number in (3, 3, 4)]
    assert asked == {
        "name": "webnlg-challenge/web_nlg",
        "revision": "refs/convert/parquet",
        "split": "test",
        "data_files": {"test": "webnlg_challenge_2017/test/*.parquet"},
    }
    assert len(read_examples(WebNlg(kind="webnlg", test_categories="unseen"), "test")) == 1
    assert has_split(WebNlg(kind="webnlg"), "valid")


def test_a_hubs_copy_with_other_columns_is_named(monkeypatch):
    stub_hub(monkeypatch, [{"category": "a", "text": "b"}])
    message = refused(WebNlg(kind="webnlg"))
    assert "webnlg-challenge/web_nlg/train:1: not the columns expected" in message
    assert "it has category, text" in message
