"""WikiSQL's queries, and the accuracy of their logical form (Zhong et al. 2017).

In: queries, one text each: {"sel": 0, "agg": 3, "conds": [[1, 0, "x"]]} as in the official files, or the same under "query" or "sql";
or SQL text, `SELECT COUNT(name) FROM table WHERE year = 1990 AND city = 'Rome'`, with column names. Out: shares from 0 to 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
_SELECT = re.compile(
    r"\s*SELECT\s+(?:(?P<agg>MAX|MIN|COUNT|SUM|AVG)\s*\((?P<of>.+?)\)|(?P<column>.+?))\s+FROM\s+(?P<table>\"[^\"]*\"|\S+?)"
    r"(?:\s+WHERE\s+(?P<where>.+?))?\s*;?\s*",
    re.IGNORECASE | re.DOTALL,
)
_CONDITION = re.compile(
    r"\s*(?P<column>.+?)\s*(?P<op>[=<>])\s*(?P<value>'(?:[^']|'')*'|\"[^\"]*\"|.+?)\s*(?:\bAND\b|$)", re.IGNORECASE | re.DOTALL
)


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


def parse(text: str) -> Query | None:
    """A query of either form; None where it is neither."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return _of_sql(text)
    while isinstance(row, dict) and "sel" not in row:
        row = None if row.get("error") else row.get("query") or row.get("sql")
    match row:
        case str():
            return _of_sql(row)
        case {"sel": int(column), "agg": int(aggregate), "conds": list(conditions)}:
            return _of_numbers(column, aggregate, conditions)
        case _:
            return None


def table_of(text: str) -> str | None:
    """The id of the table that a query asks, such as 1-1000181-1; None where it does not say."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return found["table"].strip('"') if (found := _SELECT.fullmatch(text)) else None
    return table if isinstance(row, dict) and isinstance(table := row.get("table_id"), str) else None


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
    aggregate = AGGREGATES.index((found["agg"] or "").upper())
    conditions, start, where = [], 0, found["where"] or ""
    while start < len(where):
        if (condition := _CONDITION.match(where, start)) is None:
            return None
        conditions.append((column_name(condition["column"]), OPERATORS.index(condition["op"]), _value(condition["value"])))
        start = condition.end()
    return Query(column_name(found["of"] or found["column"]), aggregate, tuple(conditions))


def column_name(text: str) -> int | str:
    """Its number where it is col0, col1, ...; otherwise in lower case, without quotation marks, with single blanks."""
    name = " ".join(text.strip().strip("\"`'[]").lower().split())
    return int(name[3:]) if re.fullmatch(r"col\d+", name) else name


def _value(text: str) -> str:
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace("''", "'").strip()
    return text
