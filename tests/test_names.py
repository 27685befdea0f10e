"""No local name in the code hides a function that is called in the same function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("d2filter", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))]


def hidden(source: str) -> list[str]:
    """Names that a function binds and also calls, while the module has a function of that name:
    the call reaches the local variable, or nothing at all.
    """
    tree = ast.parse(source)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        inside = [node for one in function.body for node in ast.walk(one)]
        bound = {
            node.id
            for node in inside
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        called = {
            node.func.id
            for node in inside
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        found += [f"{function.name}: {name}" for name in sorted(bound & called & functions)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_local_name_hides_a_function_that_is_called(path: Path) -> None:
    assert not hidden(path.read_text("utf-8"))


def test_a_hidden_function_is_found() -> None:
    assert hidden("def f(x): return x\ndef g(y):\n    f = [f(one) for one in y]\n    return f\n")
