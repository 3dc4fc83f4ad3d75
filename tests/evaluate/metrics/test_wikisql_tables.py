"""WikiSQL's execution accuracy: what the official evaluate.py and its engine make of each query, on tables in both official forms."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from pipeline.evaluate.metrics.choose import metrics_of
from pipeline.job.errors import JobError

TABLE = {
    "id": "1-100-1",
    "header": ["Country", "City Name", "Max Height", "Height"],
    "types": ["text", "text", "real", "real"],
    "rows": [["Italy", "Rome", 1990, 1], ["Italy", "Turin", 2000, 2], ["France", "Paris", 2000, 3], ["Peru", 7, -4.5, None]],
}


@pytest.fixture(params=["tables.jsonl", "folder", "db"])
def tables(request, tmp_path):
    if request.param != "db":
        (tmp_path / "test.tables.jsonl").write_text(json.dumps(TABLE) + "\n")
        return tmp_path if request.param == "folder" else tmp_path / "test.tables.jsonl"
    with closing(sqlite3.connect(tmp_path / "test.db")) as connection, connection:
        connection.execute("CREATE TABLE table_1_100_1 (col0 text, col1 text, col2 real, col3 real)")
        rows = [[cell.lower() if isinstance(cell, str) else cell for cell in row] for row in TABLE["rows"]]
        connection.executemany("INSERT INTO table_1_100_1 VALUES (?, ?, ?, ?)", rows)
    return tmp_path / "test.db"


def official(column, aggregate, conditions):
    return json.dumps({"query": {"sel": column, "agg": aggregate, "conds": conditions}})


def reference(column, aggregate, conditions):
    query = {"sel": column, "agg": aggregate, "conds": conditions}
    return json.dumps({"phase": 1, "table_id": "1-100-1", "question": "?", "sql": query})


ITALIAN = reference(1, 3, [[0, 0, "Italy"]])


@pytest.mark.parametrize(
    ("prediction", "wanted", "same", "equal"),
    [
        (official(1, 3, [[0, 0, "ITALY"]]), ITALIAN, 1, 1),
        (official(0, 3, [[0, 0, "italy"]]), ITALIAN, 0, 1),  # another column, as many rows
        (official(1, 3, [[2, 1, "1,995"]]), ITALIAN, 0, 1),  # a number by its digits: 1995, not 1
        (official(1, 3, [[2, 0, "2000 metres"]]), ITALIAN, 0, 1),  # or the first number in the text
        (official(1, 3, [[2, 2, -4.5]]), ITALIAN, 0, 0),
        (official(1, 3, [[2, 0, "tall"]]), ITALIAN, 0, 0),
        (official(1, 3, [[0, 3, "italy"]]), ITALIAN, 0, 0),
        (official(9, 3, [[0, 0, "italy"]]), ITALIAN, 0, 0),
        (official(1, 6, [[0, 0, "italy"]]), ITALIAN, 0, 0),
        ('{"error": "no idea"}', ITALIAN, 0, 0),
        ("SELECT", ITALIAN, 0, 0),
        (official(1, 0, [[0, 0, "Italy"]]), reference(1, 0, [[3, 2, 3]]), 0, 1),
        (official(1, 0, []), reference(1, 0, [[0, 0, "Italy"]]), 0, 0),
        (official(1, 0, [[0, 0, "Spain"]]), reference(0, 0, [[0, 0, "Chile"]]), 0, 1),  # nothing is nothing
        (official(3, 1, [[0, 0, "Peru"]]), reference(2, 1, [[0, 0, "Spain"]]), 0, 1),  # the most of no number
        # The engine keeps one value a column: 2 < height < 2 for both, so neither has rows.
        (official(1, 0, [[3, 1, 0], [3, 2, 2]]), reference(1, 0, [[0, 0, "Spain"]]), 0, 1),
        (official(1, 0, [[1, 0, 7]]), reference(1, 0, [[1, 0, "7"]]), 1, 1),
    ],
)
def test_each_query_is_judged_as_the_official_engine_judges_it(prediction, wanted, same, equal, tables):
    assert metrics_of("wikisql", [prediction], [[wanted]], tables=tables) == ({"lf_accuracy": same, "ex_accuracy": equal}, [])


def test_sql_text_finds_columns_by_their_names(tmp_path):
    (tmp_path / "test.tables.jsonl").write_text(json.dumps(TABLE) + "\n")
    wanted = " SELECT COUNT City Name FROM 1-100-1 WHERE Country = 'Italy' AND Max Height > 1500"
    for prediction, same, equal in [
        (wanted, 1, 1),
        ("SELECT COUNT(country) FROM x WHERE max height > 1,000 AND country = 'italy'", 0, 1),
        (official(1, 3, [[2, 1, 1500], [0, 0, "Italy"]]), 1, 1),
        ("SELECT COUNT Town FROM 1-100-1", 0, 0),
    ]:
        metrics, _ = metrics_of("wikisql", [prediction], [[wanted]], tables=tmp_path)
        assert metrics == {"lf_accuracy": same, "ex_accuracy": equal}, prediction
    # "Max Height" is a column, "MAX Country" is not.
    ours, theirs = "SELECT Max Height FROM 1-100-1 WHERE Height = 1", reference(2, 0, [[3, 0, 1]])
    assert metrics_of("wikisql", [ours], [[theirs]], tables=tmp_path)[0] == {"lf_accuracy": 1, "ex_accuracy": 1}
    ours, theirs = "SELECT MAX Country FROM 1-100-1", reference(0, 1, [])
    assert metrics_of("wikisql", [ours], [[theirs]], tables=tmp_path)[0] == {"lf_accuracy": 1, "ex_accuracy": 1}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (reference(1, 3, [[0, 0, "Italy"]]).replace("1-100-1", "1-7-1"), "has no table table_1_7_1, which reference 1 asks"),
        ('{"sel": 1, "agg": 3, "conds": []}', 'number 1 is no WikiSQL query with its table: JSON with "table_id"'),
        ("SELECT Town FROM 1-100-1", "number 1 has no answer in table_1_100_1"),
    ],
)
def test_a_reference_without_an_answer_is_refused(wanted, message, tables):
    with pytest.raises(JobError, match=message):
        metrics_of("wikisql", [ITALIAN], [[wanted]], tables=tables)


def test_wrong_tables_are_refused(tmp_path):
    (tmp_path / "bad.db").write_text("no database, but text that is long enough to be one" * 9)
    (tmp_path / "bad.tables.jsonl").write_text(json.dumps({**TABLE, "types": ["text"]}) + "\n")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("bad.db", "cannot be read"),
        ("bad.tables.jsonl", "bad.tables.jsonl:1: id, header, types and rows do not fit"),
        ("empty", "holds neither"),
        ("gone.db", "there is no such file"),
    ]:
        with pytest.raises(JobError, match=message):
            metrics_of("wikisql", [ITALIAN], [[ITALIAN]], tables=tmp_path / name)


def test_score_gives_both_accuracies_with_tables_and_a_note_without(tmp_path):
    (tmp_path / "test.tables.jsonl").write_text(json.dumps(TABLE) + "\n")
    (tmp_path / "found").write_text(official(0, 3, [[0, 0, "Italy"]]) + "\n" + official(1, 3, [[0, 0, "Italy"]]) + "\n")
    (tmp_path / "test.jsonl").write_text(2 * (ITALIAN + "\n"))

    def score(task, *arguments):
        files = ["--predictions", str(tmp_path / "found"), "--references", str(tmp_path / "test.jsonl")]
        command = [sys.executable, "-m", "pipeline", "score", "--task", task, *files, "--json", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with_tables, without = score("wikisql", "--tables", str(tmp_path)), score("wikisql")
    assert json.loads(with_tables.stdout)["metrics"] == {"lf_accuracy": 0.5, "ex_accuracy": 1.0}
    assert json.loads(without.stdout)["metrics"] == {"lf_accuracy": 0.5}
    assert json.loads(without.stdout)["notes"][0].startswith("ex_accuracy: left out: it needs the tables. Use zlora score --tables")
    other = score("e2e", "--tables", str(tmp_path))
    assert (other.returncode, other.stderr.count("only wikisql has tables")) == (2, 1)
