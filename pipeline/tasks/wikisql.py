"""WikiSQL (Zhong et al. 2017): a question about a table -> the SQL query that answers it.

In: the official files (`train.jsonl` beside `train.tables.jsonl`, and so on), or the hub's copy.
Out: prompt: the table's name, its columns and the question, a line each; completion ` SELECT ...`. The paper gives no form but
{schema, query} -> SQL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.job.section import Split
from pipeline.job.task import WikiSql
from pipeline.tasks.example import Pair, Source
from pipeline.tasks.files import split_path
from pipeline.tasks.hub import HubCopy, from_hub
from pipeline.tasks.json_rows import Row, field, json_lines, texts

_STEM = {"train": "train", "valid": "dev", "test": "test"}
HUB = HubCopy("Salesforce/wikisql", "the official train.jsonl, train.tables.jsonl and so on")
_AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
_OPERATORS = ("=", ">", "<", "OP")


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[str, ...]
    types: tuple[str, ...]
    """Of each column: "text", whose values are quoted, or "real"."""


def open_wikisql(task: WikiSql, split: Split) -> Source:
    """A split of the task.

    Raises:
        JobError: a file is not there; later, that one is malformed, or a question's table or column does not exist.
    """
    if task.data is None:
        return from_hub(HUB, split, _hub_examples)
    questions = split_path(Path(task.data), (f"{_STEM[split]}.jsonl",), f"WikiSQL {split}")
    file = split_path(Path(task.data), (f"{_STEM[split]}.tables.jsonl",), f"WikiSQL {split} tables")
    return Source((questions, file), lambda: _read(questions, file))


def _read(questions: Path, file: Path) -> Iterator[Pair]:
    tables = _tables(file)
    for row, where in json_lines(questions):
        name = field(row, "table_id", str, where)
        if name not in tables:
            raise JobError(f'{where}: the table "{name}" is not among the {len(tables)} of {file}. Fetch both files again.')
        query = field(row, "sql", dict, where)
        conditions = field(query, "conds", list, where)
        yield _example(tables[name], row, query, conditions, where)


def prompt_text(table: Table, question: str) -> str:
    """What the model sees before the separator."""
    return f"table: {table.name}\ncolumns: {', '.join(table.columns)}\nQ: {question}"


def query_text(table: Table, column: int, aggregate: int, conditions: list[tuple[int, int, str]]) -> str:
    """A query in words.

    Raises:
        IndexError: a column, aggregate or operator that does not exist.
    """
    selected = f"{_AGGREGATES[aggregate]} {table.columns[column]}".strip()
    tests = [f"{table.columns[c]} {_OPERATORS[o]} " + (f"'{value}'" if table.types[c] == "text" else value) for c, o, value in conditions]
    return f"SELECT {selected} FROM {table.name}" + (f" WHERE {' AND '.join(tests)}" if tests else "")


def _tables(file: Path) -> dict[str, Table]:
    tables: dict[str, Table] = {}
    places: dict[str, str] = {}
    for row, where in json_lines(file):
        table = _table(row, where)
        if table.name in tables:
            raise JobError(f'{where}: the table "{table.name}" is there twice; the first is at {places[table.name]}. Remove one.')
        tables[table.name], places[table.name] = table, where
    return tables


def _table(row: Row, where: str) -> Table:
    table = Table(field(row, "id", str, where), tuple(texts(row, "header", where)), tuple(texts(row, "types", where)))
    if not table.columns or len(table.columns) != len(table.types):
        raise JobError(f"{where}: {len(table.columns)} names of columns and {len(table.types)} types. Mend the line.")
    return table


def _example(table: Table, row: Row, query: Row, conditions: list[Any], where: str) -> Pair:
    question = field(row, "question", str, where)
    if not question.strip():
        raise JobError(f"{where}: the question is empty. Mend or remove the line.")
    column, aggregate = field(query, "sel", int, where), field(query, "agg", int, where)
    tests = [_condition(condition, where) for condition in conditions]
    numbers = [column, aggregate, *(number for c, o, _ in tests for number in (c, o))]
    try:
        if min(numbers) < 0:
            raise IndexError
        return Pair(prompt_text(table, question), " " + query_text(table, column, aggregate, tests), where)
    except IndexError:
        raise JobError(
            f"{where}: {json.dumps(query)[:200]} names a column, aggregate or operator that does not exist; "
            f'the table "{table.name}" has {len(table.columns)} columns. Mend the line.'
        ) from None


def _condition(condition: Any, where: str) -> tuple[int, int, str]:
    match condition:
        case [int(column), int(operator), str() | int() | float() as value]:
            return column, operator, field({"conds": str(value)}, "conds", str, where)
        case _:
            raise JobError(f"{where}: {json.dumps(condition)[:200]} is not a condition of column, operator and value. Mend the line.")


def _hub_examples(row: Row, where: str) -> list[Pair]:
    query = row["sql"]
    conditions = query["conds"]
    triples = zip(conditions["column_index"], conditions["operator_index"], conditions["condition"], strict=True)
    return [_example(_table(row["table"], where), row, query, [list(triple) for triple in triples], where)]
