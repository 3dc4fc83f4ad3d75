"""WikiSQL: small files in the official form, the text that another project made of the real ones, and malformed files."""

from __future__ import annotations

import json
import re

import pytest

from pipeline.job.task import WikiSql
from pipeline.tasks.open import separator_text
from tests.tasks.reading import pairs, read_examples, refused, stub_hub

TABLE = {
    "id": "1-7-1",
    "header": ["Inn", "Rooms", "Town/City"],
    "types": ["text", "real", "text"],
    "rows": [["Harbour", 12, "Kiel"]],
    "name": "table_7_1",
}
QUESTION = {
    "phase": 1,
    "table_id": "1-7-1",
    "question": "How many inns of Kiel have more than 10 rooms?",
    "sql": {"sel": 0, "agg": 3, "conds": [[2, 0, "Kiel"], [1, 1, 10]]},
}
PROMPT = "table: 1-7-1\ncolumns: Inn, Rooms, Town/City\nQ: How many inns of Kiel have more than 10 rooms?"
QUERY = " SELECT COUNT Inn FROM 1-7-1 WHERE Town/City = 'Kiel' AND Rooms > 10"


def task(folder):
    return WikiSql(kind="wikisql", data=str(folder))


def write(folder, questions, tables=(TABLE,), name="train"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / f"{name}.tables.jsonl").write_text("".join(json.dumps(table) + "\n" for table in tables))


def test_a_question_becomes_its_tables_columns_and_the_query_in_words(tmp_path):
    plain = {**QUESTION, "question": "Which inns? ", "sql": {"sel": 0, "agg": 0, "conds": []}}
    write(tmp_path, [QUESTION, plain], name="dev")
    examples = read_examples(task(tmp_path), "valid")
    assert pairs(examples) == [
        (PROMPT, QUERY),
        ("table: 1-7-1\ncolumns: Inn, Rooms, Town/City\nQ: Which inns? ", " SELECT Inn FROM 1-7-1"),
    ]
    assert [example.source for example in examples] == [f"{tmp_path}/dev.jsonl:{number}" for number in (1, 2)]
    assert separator_text(task(tmp_path), "<end>") == "\nA:"


def test_real_questions_give_the_text_that_mlx_examples_made_of_them(shared_data, tmp_path):
    """Its texts, taken apart by its column names into the official form, come out as they were."""
    expected, questions, tables = [], [], {}
    for name in ("train", "valid", "test"):
        for line in (shared_data / "wikisql" / "mlx_subset" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            text = json.loads(line)["text"]
            table, columns, question, answer = re.fullmatch(r"table: (.*)\ncolumns: (.*)\nQ: (.*)\nA: (.*)", text, re.DOTALL).groups()
            header = columns.split(", ")
            tables.setdefault(table, {"id": table, "header": header, "types": ["real"] * len(header)})
            column = "|".join(map(re.escape, header))
            asked = re.fullmatch(rf"SELECT (?:(MAX|MIN|COUNT|SUM|AVG) )?({column}) FROM {re.escape(table)}(?: WHERE (.*))?", answer)
            tests = [
                re.fullmatch(rf"({column}) ([=<>]) ('?)(.*)\3", part) for part in re.split(" AND ", (asked and asked[3]) or "") if part
            ]
            if asked is None or None in tests:  # a comma in a column's name, an AND in a value
                continue
            for test in tests:
                tables[table]["types"][header.index(test[1])] = "text" if test[3] else "real"
            aggregate = ["", "MAX", "MIN", "COUNT", "SUM", "AVG"].index(asked[1] or "")
            conditions = [[header.index(test[1]), "=><".index(test[2]), test[4]] for test in tests]
            questions.append(
                {"table_id": table, "question": question, "sql": {"sel": header.index(asked[2]), "agg": aggregate, "conds": conditions}}
            )
            expected.append(text)
    assert len(expected) > 1_100
    write(tmp_path, questions, tables.values())
    assert [example.prompt + "\nA:" + example.completion for example in read_examples(task(tmp_path), "train")] == expected


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"table_id": "1-8-1"}, 'the table "1-8-1" is not among the 1 of'),
        ({"table_id": None}, '"table_id" is missing or not text'),
        ({"question": ""}, "the question is empty"),
        ({"sql": "SELECT"}, '"sql" is missing or not an object'),
        ({"sql": {"sel": 0, "agg": 0}}, '"conds" is missing or not a list (has agg, sel)'),
        ({"sql": {"sel": 3, "agg": 0, "conds": []}}, 'does not exist; the table "1-7-1" has 3 columns'),
        ({"sql": {"sel": -1, "agg": 0, "conds": []}}, "does not exist"),
        ({"sql": {"sel": 0, "agg": 6, "conds": []}}, "does not exist"),
        ({"sql": {"sel": 0, "agg": True, "conds": []}}, '"agg" is missing or not a whole number'),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 4, "a"]]}}, "does not exist"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 0]]}}, "[0, 0] is not a condition of column, operator and value"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [[0, 0, None]]}}, "is not a condition"),
        ({"sql": {"sel": 0, "agg": 0, "conds": [["0", 0, "a"]]}}, "is not a condition"),
    ],
)
def test_a_malformed_question_is_named(tmp_path, changed, part):
    write(tmp_path, [QUESTION, {**QUESTION, **changed}])
    message = refused(task(tmp_path))
    assert message.startswith(f"{tmp_path}/train.jsonl:2: ")
    assert part in message


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"id": "1-7-1"}, 'the table "1-7-1" is there twice; the first is at'),
        ({"id": 7}, '"id" is missing or not text'),
        ({"types": ["text"]}, "3 names of columns and 1 types"),
        ({"header": [], "types": []}, "0 names of columns"),
        ({"header": ["Inn", 3, "Town"]}, '"header" is missing or not text (it is int'),
        ({"types": None}, '"types" is missing or not a list'),
    ],
)
def test_a_malformed_table_is_named(tmp_path, changed, part):
    write(tmp_path, [QUESTION], [TABLE, {**TABLE, "id": "1-7-2", **changed}])
    message = refused(task(tmp_path))
    assert message.startswith(f"{tmp_path}/train.tables.jsonl:2: ")
    assert part in message


def test_a_split_without_its_tables_is_told_which_file_to_put_there(tmp_path):
    assert "Put test.jsonl there" in refused(task(tmp_path), "test")
    (tmp_path / "test.jsonl").write_text(json.dumps(QUESTION))
    assert "Put test.tables.jsonl there" in refused(task(tmp_path), "test")


def test_the_hubs_copy_gives_the_same_examples_as_the_files(monkeypatch, tmp_path):
    conditions = {"column_index": [2, 1], "operator_index": [0, 1], "condition": ["Kiel", "10"]}
    table = {key: TABLE[key] for key in ("id", "header", "types", "name")}
    row = {"phase": 1, "question": QUESTION["question"], "table": table, "sql": {"sel": 0, "agg": 3, "conds": conditions}}
    asked = stub_hub(monkeypatch, [row])
    write(tmp_path, [QUESTION])
    assert pairs(read_examples(WikiSql(kind="wikisql"), "train")) == pairs(read_examples(task(tmp_path), "train"))
    assert asked == {"name": "Salesforce/wikisql", "revision": "refs/convert/parquet", "split": "train"}
