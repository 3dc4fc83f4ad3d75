"""What every task says of a file that is broken as a whole: not UTF-8, cut short, empty, with a line of a megabyte."""

from __future__ import annotations

import json
import time
from functools import partial

import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import E2E, Conversations, Dart, Glue, Pairs, PlainText, Regression, SamSum, WebNlg, WikiSql
from pipeline.tasks.example import Chat, Document, Labelled, Pair
from pipeline.tasks.json_rows import json_array
from pipeline.tasks.sequences import fit
from tests.tasks.making import Listed, learnt_from
from tests.tasks.reading import read_examples, refused

TABLE = json.dumps({"id": "1", "header": ["a"], "types": ["text"]})
# The kind of task, its training file, and that file with two good examples; the second on its second line.
FILES = {
    "csv": (E2E, "trainset.csv", "mr,ref\nname[a],TEXT"),
    "text": (E2E, "train.txt", "name : a||A place .\nname : a||TEXT"),
    "xml": (
        WebNlg,
        "train/a.xml",
        '<entries><entry eid="1" category="City"><modifiedtripleset><mtriple>a | b | c</mtriple></modifiedtripleset>\n'
        '<lex comment="good">TEXT</lex></entry></entries>',
    ),
    "list in an object": (
        WebNlg,
        "train.json",
        '{"entries": [\n{"1": {"category": "City", "modifiedtripleset": [{"subject": "a", "property": "b", "object": "c"}], '
        '"lexicalisations": [{"comment": "good", "lex": "TEXT"}]}}]}',
    ),
    "list": (Dart, "dart-v1.1.1-full-train.json", '[\n{"tripleset": [["a", "b", "c"]], "annotations": [{"text": "TEXT"}]}]'),
    "lines": (SamSum, "train.jsonl", '\n{"id": "1", "dialogue": "a", "summary": "TEXT"}'),
    "questions": (WikiSql, "train.jsonl", '\n{"table_id": "1", "question": "TEXT", "sql": {"sel": 0, "agg": 0, "conds": []}}'),
    "tabs": (partial(Glue, name="sst2"), "train.tsv", "sentence\tlabel\nTEXT\t1"),
    "own": (partial(Pairs, kind="jsonl"), "train.jsonl", '\n{"prompt": "a", "completion": "TEXT"}'),
    "own table": (partial(Pairs, kind="csv"), "train.csv", "prompt,completion\na,TEXT"),
    "own texts": (PlainText, "train.json", '[\n{"text": "TEXT"}]'),
    "own labels": (Regression, "train.tsv", "label\ttext\n1\tTEXT"),
    "own conversations": (
        Conversations,
        "train.jsonl",
        '\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "TEXT"}]}',
    ),
    "own plain text": (partial(PlainText, document="line"), "train.txt", "\nTEXT"),
}


@pytest.fixture(params=FILES)
def broken(request, tmp_path):
    """Writes the task's training file with a text, or cut; gives the task and the file."""
    kind, name, whole = FILES[request.param]
    (tmp_path / "train.tables.jsonl").write_text(TABLE)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)

    def make(text=b"A place .", cut=0):
        content = whole.encode().replace(b"TEXT", text)
        file.write_bytes(content[: len(content) - cut])
        section, given = (kind.func, kind.keywords) if isinstance(kind, partial) else (kind, {})
        return kind(**{"kind": section.model_fields["kind"].annotation.__args__[0], "data": str(tmp_path)} | given), file

    return make


def test_a_good_file_is_read(broken):
    task, file = broken()
    assert read_examples(task, "train")[-1].source == f"{file}:2"


def test_what_is_not_utf8_is_named_by_its_line(broken):
    task, file = broken("Ein Café".encode("latin-1"))
    message = refused(task)
    assert message.startswith(f"{file}:2: not UTF-8 text (byte 0xe9")


def test_utf16_is_named(broken):
    task, file = broken()
    file.write_bytes(file.read_text().encode("utf-16"))
    assert refused(task).startswith(f"{file}:1: not UTF-8 text (byte 0xff at column 1)")


def test_a_file_cut_short_is_named_by_its_line_or_read_whole(broken):
    task, file = broken(cut=3)
    if file.suffix in (".csv", ".txt") or isinstance(task, Regression):  # a shorter text is a text
        assert _texts(read_examples(task, "train")[-1])[-1].endswith("A plac")
    else:
        assert refused(task).startswith(f"{file}:2: {'1 columns, expected 2' if file.suffix == '.tsv' else 'not'}")


def test_an_empty_file_is_named(broken):
    task, file = broken()
    file.write_bytes(b"")
    assert str(file.parent if file.suffix in (".jsonl", ".txt", ".tsv") else file) in refused(task)


def test_a_line_of_a_megabyte_is_read_at_once_and_named_by_its_tokens(broken):
    task, file = broken(b"a place " * 131_072)
    begin = time.monotonic()
    examples = read_examples(task, "train")
    assert time.monotonic() - begin < 5
    sequences = [learnt_from((0,) * sum(map(len, _texts(example))), 1) for example in examples]
    with pytest.raises(JobError) as caught:
        fit(Listed(sequences, [example.source for example in examples]), 1024, "refuse")
    assert str(caught.value).startswith(f"{file}:2: 1")
    assert "1 of" in str(caught.value)


def _texts(example):
    match example:
        case Labelled(texts=texts):
            return texts
        case Chat(messages=messages):
            return [message.content for message in messages]
        case Document(text=text):
            return [text]
        case Pair(prompt=prompt, completion=completion):
            return prompt, completion


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "1: not a JSON list as expected: the end of the file where [ belongs"),
        ("\n{}", '2: not a JSON list as expected: "{}" where [ belongs'),
        ("[{},\n{}\n{}]", '3: not a JSON list as expected: "{}]" where , belongs'),
        ("[{},\n]", "2: not valid JSON: Expecting value at column 1"),
        ('[{},\n{"a":\n1,}]', "3: not valid JSON"),
        ("[{},\n\n3]", "3: int, not an object of named fields"),
        ("[{}]\n[{}]", "2: text after the end of the list"),
        ("[" + "[" * 100_000, "1: not readable JSON"),
        ("[\n" + "9" * 5000 + "]", "2: not readable JSON"),
    ],
)
def test_a_list_that_is_none_is_named_by_its_line(tmp_path, text, part):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(JobError) as caught:
        list(json_array(file))
    assert str(caught.value).startswith(f"{file}:{part}")


def test_a_list_gives_each_object_with_the_line_where_it_begins(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{ "all":\r\n [ {"a":\r\n1} , {},\r\n\r\n{"b": "\xe2\x80\xa8"}\r\n]\r\n}\r\n')
    assert list(json_array(file, "all")) == [({"a": 1}, f"{file}:2"), ({}, f"{file}:3"), ({"b": "\u2028"}, f"{file}:5")]
    file.write_text(" [ ] ")
    assert list(json_array(file)) == []
