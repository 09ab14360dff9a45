"""The core is pure: no clock, no randomness, no input or output, no logging. Held by walking its imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "edge" / "core"
ALLOWED = {
    "__future__",
    "bisect",
    "collections",
    "collections.abc",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "ipaddress",
    "itertools",
    "math",
    "msgspec",
    "numpy",
    "numpy.typing",
    "types",
    "typing",
    "edge.abi",
    "edge.errors",
}
FORBIDDEN_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


def modules() -> list[Path]:
    return sorted(CORE.rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
    return found


def test_there_is_a_core_to_look_at() -> None:
    assert {"step.py", "policy.py", "reputation.py"} <= {path.name for path in modules()}


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.name)
def test_core_imports_only_what_is_pure(path: Path) -> None:
    foreign = {name for name in imports(ast.parse(path.read_text())) if not name.startswith("edge.core.")}
    assert foreign <= ALLOWED, f"{path.name} imports {sorted(foreign - ALLOWED)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.name)
def test_core_calls_nothing_that_reaches_outside(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{path.name}:{node.lineno} calls {node.func.id}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"random", "default_rng", "tofile", "fromfile"}, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.name)
def test_core_has_no_state_of_its_own(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno} keeps state in its module"
