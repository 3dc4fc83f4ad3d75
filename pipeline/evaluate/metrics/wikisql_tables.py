"""WikiSQL's execution accuracy, as the official `evaluate.py` has it: two queries are equal where their answers are.

In: queries in any form that wikisql.py reads, and the tables: official `*.tables.jsonl`, or the official `.db` (columns col0, col1, ...).
Out: shares from 0 to 1. Only names that a table's own description holds get into SQL; values are bound.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from pipeline.evaluate.metrics.wikisql import AGGREGATES, OPERATORS, Query, column_name, parse, table_of
from pipeline.job.errors import JobError
from pipeline.tasks.json_rows import field, json_lines, texts

_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")

Headers = dict[str, list[str]]
"""Names of the columns, by the table's name in the database; none for a .db."""


def accuracies(predictions: list[str], references: list[str], tables: Path) -> dict[str, float]:
    """Of the logical form and of the answers; with the tables' columns, names and numbers of columns are the same thing.

    Args:
        references: each says its table: `"table_id"` in JSON, or what stands behind FROM.
        tables: a file, or a folder of them.

    Raises:
        JobError: a file cannot be read, or a reference has no table in it or no answer.
    """
    same = equal = 0
    with closing(sqlite3.connect("file::memory:", uri=True)) as connection:
        headers = _open(connection, tables)
        for number, (text, wanted) in enumerate(zip(predictions, references, strict=True), 1):
            table, gold = _table_name(table_of(wanted)), parse(wanted)
            if table is None or gold is None:
                raise JobError(f'references: number {number} is no WikiSQL query with its table: JSON with "table_id", or SQL. Mend it.')
            kinds = {row[1]: row[2].lower() for row in connection.execute("SELECT * FROM pragma_table_info(?)", (table,))}
            if not kinds:
                raise JobError(f"{tables}: has no table {table}, which reference {number} asks. Name the tables of that split.")
            gold, query = _numbered(gold, headers.get(table, [])), _numbered(parse(text), headers.get(table, []))
            if gold is None or (answer := _answer(connection, table, kinds, gold)) is None:
                raise JobError(
                    f"references: number {number} has no answer in {table} of {tables}: a column or a value does not fit. "
                    "Name the *.tables.jsonl of its split; a .db does not know the names of columns."
                )
            same += query is not None and query.same(gold)
            equal += query is not None and _answer(connection, table, kinds, query) == answer
    return {"lf_accuracy": same / len(references), "ex_accuracy": equal / len(references)}


def _open(connection: sqlite3.Connection, tables: Path) -> Headers:
    """The .db files attached, or the tables of the others made anew, as the official ones are: texts in lower case."""
    files = [tables]
    if tables.is_dir() and not (files := sorted(tables.glob("*.tables.jsonl")) or sorted(tables.glob("*.db"))):
        raise JobError(f"{tables}: holds neither *.tables.jsonl nor *.db. Name WikiSQL's.")
    headers: Headers = {}
    for count, file in enumerate(files):
        if not file.is_file():
            raise JobError(f"{file}: there is no such file. Name WikiSQL's .tables.jsonl or .db, or their folder.")
        if file.suffix == ".db":
            try:
                connection.execute(f"ATTACH ? AS db{count}", (f"{file.resolve().as_uri()}?mode=ro",))
            except sqlite3.DatabaseError as error:
                raise JobError(f"{file}: cannot be read ({error}). Is this one of WikiSQL's .db files?") from None
            continue
        for row, where in json_lines(file):
            table, header, kinds = _table_name(field(row, "id", str, where)), texts(row, "header", where), texts(row, "types", where)
            rows = field(row, "rows", list, where)
            if (
                table is None
                or len(header) != len(kinds)
                or any(not isinstance(cells, list) or len(cells) != len(header) for cells in rows)
            ):
                raise JobError(f"{where}: id, header, types and rows do not fit together. Fetch the file again.")
            columns = ", ".join(f"col{n} {'real' if kind == 'real' else 'text'}" for n, kind in enumerate(kinds))
            connection.execute(f'CREATE TABLE IF NOT EXISTS "{table}" ({columns})')
            if table not in headers:
                lowered = [[cell.lower() if isinstance(cell, str) else cell for cell in cells] for cells in rows]
                connection.executemany(f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(header))})', lowered)
            headers[table] = [str(column_name(name)) for name in header]
    return headers


def _table_name(identity: str | None) -> str | None:
    if identity is None or not re.fullmatch(r"[\w-]+", identity):
        return None
    return identity if identity.startswith("table") else f"table_{identity.replace('-', '_')}"


def _numbered(query: Query | None, header: list[str]) -> Query | None:
    """The query by numbers of columns; None where it names one that is not there."""
    if query is None:
        return None
    column, aggregate = query.column, query.aggregate
    if isinstance(column, str) and column not in header and not aggregate:
        word, _, rest = column.partition(" ")
        if word.upper() in AGGREGATES[1:]:
            column, aggregate = column_name(rest), AGGREGATES.index(word.upper())
    names = [column, *(name for name, _, _ in query.conditions)]
    if any(isinstance(name, str) and name not in header for name in names):
        return None
    first, *others = (header.index(name) if isinstance(name, str) else name for name in names)
    conditions = tuple((of, operator, value) for of, (_, operator, value) in zip(others, query.conditions, strict=True))
    return replace(query, column=first, aggregate=aggregate, conditions=conditions)


def _answer(connection: sqlite3.Connection, table: str, kinds: dict[str, str], query: Query) -> list[object] | None:
    """What the query gives; None where it cannot be asked."""
    if query.aggregate not in range(len(AGGREGATES)) or f"col{query.column}" not in kinds:
        return None
    where: list[str] = []
    # By column, as officially: of two conditions on one column, the value of the later one counts for both.
    values: dict[str, str | float] = {}
    for column, operator, value in query.conditions:
        name = f"col{column}"
        if operator not in range(len(OPERATORS)) or name not in kinds:
            return None
        where.append(f"{name} {OPERATORS[operator]} :{name}")
        values[name] = value.lower()
        if kinds[name] == "real":
            try:
                values[name] = float(value.replace(",", ""))
            except ValueError:
                if (number := _NUMBER.search(value)) is None:
                    return None
                values[name] = float(number[0])
    conditions = f" WHERE {' AND '.join(where)}" if where else ""
    selected = f"{AGGREGATES[query.aggregate]}(col{query.column})"
    return [row[0] for row in connection.execute(f'SELECT {selected} FROM "{table}"{conditions}', values)]
