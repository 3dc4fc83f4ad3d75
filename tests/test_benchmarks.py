"""The scripts of benchmarks/ fit together: each takes from the others what is there, and the README names each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = {file.stem: ast.parse(file.read_text()) for file in sorted(FOLDER.glob("*.py"))}


def names(tree: ast.Module) -> set[str]:
    """What a script has at its top."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name) for alias in node.names}
        else:
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
    return found


def test_what_is_missing_would_be_seen():
    assert {"SCRIPTS", "names", "ast", "Path"} <= names(ast.parse(Path(__file__).read_text()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_takes_from_the_others_what_is_there(script):
    for node in ast.walk(SCRIPTS[script]):
        if isinstance(node, ast.ImportFrom) and node.module in SCRIPTS:
            assert {alias.name for alias in node.names} <= names(SCRIPTS[node.module])
        if isinstance(node, ast.ImportFrom) and (FOLDER / f"{node.module}.py").exists() is False and "." not in str(node.module):
            # Of nothing in benchmarks/: a library, which must be there.
            __import__(str(node.module))


def test_the_readme_names_every_script():
    text = (FOLDER / "README.md").read_text()
    assert [name for name in SCRIPTS if f"`{name}.py`" not in text and f"benchmarks/{name}.py" not in text] == []
