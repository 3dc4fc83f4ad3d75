"""Your own rows in every format: the same texts give the same examples, and whatever is wrong is named, refused or counted."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.job.errors import JobError
from pipeline.job.task import Classification, Conversations, Pairs, PlainText, Regression
from pipeline.tasks.example import Reason
from pipeline.tasks.open import open_split
from tests.tasks.reading import all_examples, read_examples, refused

TEXTS = [
    ("  a ", " b\n"),
    ("two\nlines, of \"quoted\" text\r\nand 'more'", "\tx"),
    ("", "x"),
    ("é\u2028\u0085日本", "\\n \t"),
    ("a,b;c", '""'),
    ("1", "2"),
]
KINDS = {"jsonl": "jsonl", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


def write(file, rows):
    """Named values in the format of the file's name."""
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            file.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        case _:
            with file.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
    return file


def own(kind, data, **keys):
    return {"text": PlainText, "chat": Conversations, "classification": Classification, "regression": Regression}.get(kind, Pairs)(
        kind=kind, data=str(data), **keys
    )


def dropped_of(task):
    examples, reasons = all_examples(open_split(task, "train"), "train")
    return [example.source.rpartition(":")[2] for example in examples], reasons


@pytest.mark.parametrize("ending", KINDS)
def test_the_same_texts_give_the_same_pairs_in_every_format(tmp_path, ending):
    file = write(tmp_path / f"train.{ending}", [{"note": n, "prompt": p, "completion": c} for n, (p, c) in enumerate(TEXTS)])
    for data in (file, tmp_path):
        examples = read_examples(own(KINDS[ending], data), "train")
        assert [(e.prompt, e.completion) for e in examples] == TEXTS
    places = [1, 2, 3, 4, 5, 6] if ending in ("jsonl", "parquet") else [2, 4, 7, 8, 9, 10]
    assert [example.source for example in examples] == [f"{file}:{place}" for place in places]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_the_same_labels_give_the_same_examples_in_every_format(tmp_path, ending):
    rows = [{"a": "x", "b": "y, z", "grade": "1.5", "class": "no"}, {"a": "u", "b": "", "grade": "-2", "class": "yes"}]
    file = write(tmp_path / f"train.{ending}", rows)
    classes = read_examples(own("classification", file, text="a", text_pair="b", label="class", labels=("yes", "no")), "train")
    assert [(e.texts, e.label) for e in classes] == [(("x", "y, z"), 1.0), (("u", ""), 0.0)]
    numbers = read_examples(own("regression", file, text="a", label="grade"), "train")
    assert [(e.texts, e.label) for e in numbers] == [(("x",), 1.5), (("u",), -2.0)]
    texts = read_examples(own("text", file, text="a"), "train")
    assert [e.text for e in texts] == ["x", "u"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_conversations_are_the_same_in_every_format(tmp_path, ending):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}]
    file = write(tmp_path / f"train.{ending}", [{"messages": turns}, {"messages": [{"role": "system", "content": ""}, *turns]}])
    chats = read_examples(own("chat", file), "train")
    assert [[(m.role, m.content) for m in chat.messages] for chat in chats] == [
        [("user", "a"), ("assistant", "b\n")],
        [("system", ""), ("user", "a"), ("assistant", "b\n")],
    ]


def test_labels_may_be_numbers_where_the_format_has_them(tmp_path):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    for ending in ("jsonl", "csv", "parquet"):
        file = write(tmp_path / f"{ending}.{ending}", rows)
        assert [e.label for e in read_examples(own("classification", file, labels=("0", "1")), "train")] == [1.0, 0.0]
        assert [e.label for e in read_examples(own("regression", file), "train")] == [1.0, 0.0]


def test_conversations_do_not_come_in_tables(tmp_path):
    assert '".csv" is not the end' in refused(own("chat", write(tmp_path / "train.csv", [{"messages": "a"}])))


def test_a_folder_of_several_formats_is_read_in_the_order_of_names(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("b.csv", "c.parquet", "a.jsonl"):
        write(folder / name, [{"text": name}])
    (folder / "d.txt").write_text("d")
    assert [e.text for e in read_examples(own("text", tmp_path), "train")] == ["a.jsonl", "b.csv", "c.parquet", "d"]


def test_a_parquet_file_is_read_over_row_groups_and_batches(tmp_path):
    rows = [{"prompt": str(number), "completion": "x"} for number in range(700)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=300)
    examples = read_examples(own("parquet", tmp_path), "train")
    assert [e.prompt for e in examples] == [row["prompt"] for row in rows]
    assert examples[699].source == f"{tmp_path}/train.parquet:700"


def test_other_string_types_of_arrow_are_texts_too(tmp_path):
    for number, kind in enumerate((pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        column = pa.array(["a", "b"]).cast(kind)
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": column}), file)
        assert [e.text for e in read_examples(own("text", file), "train")] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"", ":1: no header"),
        ("a.csv", b"\n", ":1: no header"),
        ("a.csv", b"prompt,answer\na,b\n", ':1: no column "completion"; there are prompt, answer. Say in [task]'),
        ("a.csv", b"prompt,completion,x,x\na,b,c,d\n", ':1: names a column twice ("x")'),
        ("a.csv", b"pr\xe9mpt,completion\na,b\n", ":1: not UTF-8 text (byte 0xe9 at column 3)"),
        ("a.csv", b'prompt,completion\na,"b\nc"\na\n', ":4: 1 columns, but the header has 2"),
        ("a.csv", b"prompt,completion\na,b,c\n", ":2: 3 columns, but the header has 2 (prompt, completion)"),
        ("a.csv", b'prompt,completion\na,b\n"a\nc,d\ne,f\n', ":3: not valid CSV (unexpected end of data)"),
        ("a.csv", b'prompt,completion\na,"b"c\n', ":2: not valid CSV"),
        ("a.csv", b'prompt,completion\na,"b\n\xff"\n', ":3: not UTF-8 text (byte 0xff at column 1)"),
        ("a.csv", b"prompt,completion\na,\n", ':2: "completion" is empty'),
        ("a.tsv", b"prompt,completion\na,b\n", ':1: no column "prompt"; there are prompt,completion'),
    ],
)
def test_a_table_that_is_wrong_is_named_by_its_line(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    assert refused(own("csv", tmp_path / name)).startswith(f"{tmp_path}/{name}{part}")


def test_a_byte_order_mark_and_other_line_ends_do_no_harm(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"prompt",completion\r\n"a\r\nb",c\r\n\r\nd,e')
    examples = read_examples(own("csv", tmp_path / "a.csv"), "train")
    assert [(e.prompt, e.completion, e.source[-2:]) for e in examples] == [("a\r\nb", "c", ":2"), ("d", "e", ":5")]


def test_carriage_returns_alone_end_no_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\ra,b\r")
    assert "a.csv:1: not valid CSV" in (said := refused(own("csv", tmp_path / "a.csv")))
    assert said.endswith("End lines with a line feed.")


def test_a_quotation_mark_left_open_does_not_take_the_memory(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,completion\na,b\n"a' + b"line of text\n" * 2_000_000)
    assert ":3: not valid CSV (field larger" in refused(own("csv", tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"prompt": ["a"], "answer": ["b"]}, ': no column "completion"; there are prompt, answer'),
        ({"prompt": ["a", "b"], "completion": ["x", None]}, ':2: "completion" is missing or not text (it is NoneType'),
        ({"prompt": ["a"], "completion": [3]}, ':1: "completion" is missing or not text (it is int'),
        ({"prompt": ["a"], "completion": [b"x"]}, ':1: "completion" is missing or not text (it is bytes'),
    ],
)
def test_a_parquet_file_that_is_wrong_is_named_by_its_row(tmp_path, columns, part):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file)
    assert refused(own("parquet", file)).startswith(f"{file}{part}")


def test_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    file = tmp_path / "a.parquet"
    bad = pa.StringArray.from_buffers(2, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": bad}), file)
    assert refused(own("text", file)) == f"{file}:2: not UTF-8 text. Write the column as UTF-8."
    assert dropped_of(own("text", file, bad_rows="drop")) == (["1"], (Reason("not UTF-8 text", 1, f"{file}:2"),))


@pytest.mark.parametrize("size", [0, 10, -10, -3000])
def test_a_parquet_file_cut_short_is_refused_by_name(tmp_path, size):
    whole = write(tmp_path / "whole.parquet", [{"text": f"{number} " * 50} for number in range(500)])
    file = tmp_path / "a.parquet"
    file.write_bytes(whole.read_bytes()[: size or 0])
    assert refused(own("text", file)).startswith(f"{file}: not readable as Parquet after row 0 (")


def test_parquet_pages_that_are_damaged_are_refused_by_name(tmp_path):
    file = tmp_path / "a.parquet"
    rows = [{"text": f"{number * 7919} " * 20} for number in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=500, use_dictionary=False, compression="zstd")
    raw = bytearray(file.read_bytes())
    place = pq.ParquetFile(file).metadata.row_group(2).column(0).data_page_offset
    raw[place : place + 40] = b"\xff" * 40
    file.write_bytes(bytes(raw))
    assert refused(own("text", file)).startswith(f"{file}: not readable as Parquet after row 768 (")


def test_the_wanted_columns_of_a_parquet_file_are_all_that_is_read(tmp_path):
    file = tmp_path / "a.parquet"
    blobs = pa.StringArray.from_buffers(1, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": ["a"], "other": blobs}), file)
    assert [e.text for e in read_examples(own("text", file), "train")] == ["a"]


GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("ending", "content", "kept", "reasons"),
    [
        (
            "jsonl",
            GOOD.encode() + b'{\n\n[1]\n{"prompt": 3}\n{"prompt": "a", "completion": ""}\n"\xff"\n{"prompt": 4}\n' + GOOD.encode(),
            ["1", "9"],
            [
                ("not valid JSON", 1, 2),
                ("list, not an object of named fields", 1, 4),
                ('"prompt" is missing or not text', 2, 5),
                ('"completion" is empty', 1, 6),
                ("not UTF-8 text", 1, 7),
            ],
        ),
        (
            "csv",
            b'prompt,completion\na,b\na\na,b,c\na,"b\n\xff"\na,\n"a"b,c\na,b\n',
            ["2", "9"],
            [
                ("1 columns, but the header has 2", 1, 3),
                ("3 columns, but the header has 2", 1, 4),
                ("not UTF-8 text", 1, 5),
                ('"completion" is empty', 1, 7),
                ("not valid CSV", 1, 8),
            ],
        ),
    ],
)
def test_bad_rows_are_left_out_and_counted_by_reason_where_the_job_says_so(tmp_path, ending, content, kept, reasons):
    file = tmp_path / f"a.{ending}"
    file.write_bytes(content)
    assert refused(own(ending, file)).startswith(f"{file}:{reasons[0][2]}: {reasons[0][0]}")
    found, why = dropped_of(own(ending, file, bad_rows="drop"))
    assert found == kept
    assert why == tuple(Reason(reason, count, f"{file}:{line}") for reason, count, line in reasons)


def test_unknown_labels_are_one_reason_whatever_they_are(tmp_path):
    rows = [{"text": "a", "label": label} for label in ("yes", "a (b): c. d", "no", "maybe", "")]
    file = write(tmp_path / "a.csv", rows)
    task = own("classification", file, labels=("yes", "no"))
    assert refused(task).startswith(f'{file}:3: "label" is not one of task.labels ("a (b): c. d", not yes, no)')
    kept, why = dropped_of(own("classification", file, labels=("yes", "no"), bad_rows="drop"))
    assert (kept, why) == (["2", "4"], (Reason('"label" is not one of task.labels', 3, f"{file}:3"),))


def test_names_with_marks_in_them_stay_whole_in_a_reason(tmp_path):
    file = write(tmp_path / "a: b (c).jsonl", [{"text (en): 1. x": 3}, {"text (en): 1. x": "a"}])
    kept, why = dropped_of(own("text", file, text="text (en): 1. x", bad_rows="drop"))
    assert (kept, why) == (["2"], (Reason('"text (en): 1. x" is missing or not text', 1, f"{file}:1"),))


@pytest.mark.parametrize("text", ["inf", "nan", "", "high", "1e999", "1e39", "-1e39"])
def test_a_number_that_is_none_is_named(tmp_path, text):
    file = write(tmp_path / "a.csv", [{"text": "a", "label": text}])
    assert refused(own("regression", file)).startswith(f'{file}:2: "label" is missing or not a number (it is "{text}")')


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        ([], 'no turn has the role "assistant"'),
        ([{"role": "user", "content": "a"}], 'no turn has the role "assistant"'),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}], "an answer of the assistant's is empty"),
        ([{"role": "user", "content": None}], '"content" is missing or not text'),
        ([{"from": "human", "value": "a"}], '"role" is missing or not text (has from, value)'),
        (["a"], "str, not an object of named fields"),
        ("a", '"messages" is missing or not a list'),
    ],
)
def test_a_conversation_that_is_none_is_named(tmp_path, turns, part):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    assert refused(own("chat", file)).startswith(f"{file}:1: {part}")


def test_nothing_left_says_what_was_left_out(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{\n{\n")
    message = refused(own("jsonl", file, bad_rows="drop"))
    assert f"has no examples (left out: 2 x not valid JSON (the first: {file}:1))" in message


def test_an_unknown_ending_is_named_before_anything_is_read(tmp_path):
    file = tmp_path / "a.xlsx"
    file.write_text("")
    with pytest.raises(JobError, match=r'a\.xlsx: "\.xlsx" is not the end of a known format'):
        open_split(own("text", file), "train")


def test_a_parquet_file_that_is_one_row_group_is_read_in_little_memory(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(map(chr, rng.integers(97, 123, 4000))) for _ in range(5000)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), file, use_dictionary=False)
    before, most = pa.total_allocated_bytes(), 0
    for found, text in zip(open_split(own("text", file), "train").read(), texts, strict=True):
        assert found.text == text
        most = max(most, pa.total_allocated_bytes())
    assert most - before < 8e6


def test_an_element_of_a_list_that_is_no_object_is_left_out_where_the_job_says_so(tmp_path):
    file = tmp_path / "train.json"
    file.write_text('[{"text": "one"},\n3,\n{"text": "two"}]')
    found, why = dropped_of(own("text", file, bad_rows="drop"))
    assert len(found) == 2
    assert why == (Reason("int, not an object of named fields", 1, f"{file}:2"),)
    assert refused(own("text", file)).startswith(f"{file}:2: int, not an object")
