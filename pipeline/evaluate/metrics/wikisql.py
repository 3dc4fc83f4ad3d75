"""WikiSQL's accuracies (Zhong et al. 2017): of the logical form, and of what the query answers.

In: queries, one text each: {"sel": 0, "agg": 3, "conds": [[1, 0, "x"]]} as in the official files, or the same under "query" or "sql";
or SQL text, `SELECT COUNT(name) FROM table WHERE year = 1990 AND city = 'Rome'`, with column names. Out: shares from 0 to 1.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from pipeline.job.errors import JobError

_AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
_OPERATORS = ("=", ">", "<")
_SELECT = re.compile(
    r"\s*SELECT\s+(?:(?P<agg>MAX|MIN|COUNT|SUM|AVG)\s*\((?P<of>.+?)\)|(?P<column>.+?))\s+FROM\s+(?:\"[^\"]*\"|\S+)"
    r"(?:\s+WHERE\s+(?P<where>.+?))?\s*;?\s*",
    re.IGNORECASE | re.DOTALL,
)
_CONDITION = re.compile(
    r"\s*(?P<column>.+?)\s*(?P<op>[=<>])\s*(?P<value>'(?:[^']|'')*'|\"[^\"]*\"|.+?)\s*(?:\bAND\b|$)", re.IGNORECASE | re.DOTALL
)
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


@dataclass(frozen=True)
class Query:
    """What is selected and under which conditions; a column is its number, or its name in lower case."""

    column: int | str
    aggregate: int
    conditions: tuple[tuple[int | str, int, str], ...]

    def same(self, other: Query) -> bool:
        """Equal as the official script has it: the order of conditions and the case of their values do not count."""
        ours, theirs = ({(column, op, value.lower()) for column, op, value in q.conditions} for q in (self, other))
        return (self.column, self.aggregate, ours) == (other.column, other.aggregate, theirs)


def logical_form(predictions: list[str], references: list[str]) -> float:
    """Share of predictions that are the reference's query. What is no query is wrong.

    Raises:
        ValueError: a reference is no query; its number, from 0, is the argument.
    """
    right = 0
    for number, (text, wanted) in enumerate(zip(predictions, references, strict=True)):
        if (reference := parse(wanted)) is None:
            raise ValueError(number)
        right += (query := parse(text)) is not None and query.same(reference)
    return right / len(references)


def execution(predictions: list[str], references: list[str], tables: list[str], database: Path) -> float:
    """Share of predictions that answer what the reference's query answers, on an official .db file (columns col0, col1, ...).

    Args:
        tables: each query's table id, such as 1-1000181-1.

    Raises:
        JobError: the database lacks a table or cannot be read.
    """
    if not database.is_file():
        raise JobError(f"{database}: there is no such file. Name one of WikiSQL's .db files.")
    right = 0
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        for text, wanted, table in zip(predictions, references, tables, strict=True):
            name = table if table.startswith("table") else f"table_{table.replace('-', '_')}"
            try:
                kinds = {row[1]: row[2].lower() for row in connection.execute("SELECT * FROM pragma_table_info(?)", (name,))}
            except sqlite3.DatabaseError as error:
                raise JobError(f"{database}: cannot be read ({error}). Is this one of WikiSQL's .db files?") from None
            if not kinds:
                raise JobError(f'{database}: has no table "{name}". Name the .db file of the split that is scored.')
            right += _answer(connection, name, kinds, parse(text)) == _answer(connection, name, kinds, parse(wanted))
    return right / len(references)


def parse(text: str) -> Query | None:
    """A query of either form; None where it is neither."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return _of_sql(text)
    while isinstance(row, dict) and "sel" not in row:
        row = row.get("query") or row.get("sql")
    match row:
        case str():
            return _of_sql(row)
        case {"sel": int(column), "agg": int(aggregate), "conds": list(conditions)}:
            return _of_numbers(column, aggregate, conditions)
        case _:
            return None


def _of_numbers(column: int, aggregate: int, conditions: Sequence[object]) -> Query | None:
    found = []
    for condition in conditions:
        match condition:
            case [int(of), int(operator), (str() | int() | float()) as value]:
                found.append((of, operator, str(value)))
            case _:
                return None
    return Query(column, aggregate, tuple(found))


def _of_sql(text: str) -> Query | None:
    if (found := _SELECT.fullmatch(text)) is None:
        return None
    aggregate = _AGGREGATES.index((found["agg"] or "").upper())
    conditions, start, where = [], 0, found["where"] or ""
    while start < len(where):
        if (condition := _CONDITION.match(where, start)) is None:
            return None
        conditions.append((_name(condition["column"]), _OPERATORS.index(condition["op"]), _value(condition["value"])))
        start = condition.end()
    return Query(_name(found["of"] or found["column"]), aggregate, tuple(conditions))


def _name(text: str) -> int | str:
    name = " ".join(text.strip().strip("\"`'[]").lower().split())
    return int(name[3:]) if re.fullmatch(r"col\d+", name) else name


def _value(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'").strip()
    return text


def _answer(connection: sqlite3.Connection, table: str, kinds: dict[str, str], query: Query | None) -> list[object] | str:
    """What the query gives, or in words why it gives nothing: those must not equal any reference's answer."""
    if query is None or query.aggregate not in range(len(_AGGREGATES)):
        return "no query"
    where, values = [], []
    for column, operator, value in query.conditions:
        # The tables hold texts in lower case.
        wanted: str | float = value.lower()
        if operator not in range(len(_OPERATORS)) or f"col{column}" not in kinds:
            return "no such operator or column"
        if kinds[f"col{column}"] == "real":
            try:
                wanted = float(value.replace(",", ""))
            except ValueError:
                if (number := _NUMBER.search(value)) is None:
                    return "no number"
                wanted = float(number[0])
        where.append(f"col{column} {_OPERATORS[operator]} ?")
        values.append(wanted)
    if f"col{query.column}" not in kinds:
        return "no such column"
    # Only names that the table's own description holds get here; values are bound.
    selected = f"{_AGGREGATES[query.aggregate]}(col{query.column})"
    conditions = f" WHERE {' AND '.join(where)}" if where else ""
    return [row[0] for row in connection.execute(f'SELECT {selected} FROM "{table}"{conditions}', values)]
