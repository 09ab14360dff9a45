"""Hold the layout: what may lie at the top, what edge/core may import, what every source file carries.

check_layout.py      prints one line a finding, exit 1 when there is any   (part of make check)
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = {"pyproject.toml", "edge", "bpf", "tests", "ansible", "README.md", "Makefile", "LICENSE", "CHANGELOG.md"}
# The core computes: no clock, no I/O, no randomness, no logging, nothing of the other layers.
CORE_MAY_IMPORT = {
    *("__future__", "bisect", "collections", "dataclasses", "enum", "functools", "heapq", "ipaddress", "itertools"),
    *("math", "operator", "types", "typing", "msgspec", "numpy", "edge.abi", "edge.core", "edge.errors"),
}
# Traces of one person's machine; spelled in halves so that this file may be searched too.
MACHINE_PATHS = ("/wo" + "rk/", "/fa" + "rm/", ".." + "/shared")
BPF_LICENCE = "SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause"


def files() -> list[Path]:
    """Every file git tracks or would track, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


def foreign_top_level(path: Path) -> Iterator[str]:
    """Nothing else is visible at the top."""
    if path.parts[0] not in TOP and not path.parts[0].startswith("."):
        yield f"{path}: {path.parts[0]} is not one of the top-level entries"


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and module of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = "edge.core" if node.level else node.module or ""
            # `from edge import abi` names the module in the second half.
            yield from ((node.lineno, f"edge.{a.name}" if package == "edge" else package) for a in node.names)


def impure_core(path: Path, tree: ast.Module) -> Iterator[str]:
    """edge/core imports what computes, and nothing else."""
    if path.parts[:2] == ("edge", "core"):
        for line, module in imported(tree):
            parts = module.split(".")
            if not {parts[0], ".".join(parts[:2])} & CORE_MAY_IMPORT:
                yield f"{path}:{line}: edge/core imports {module}, which it may not"


def undocumented(path: Path, tree: ast.Module) -> Iterator[str]:
    """Each module says what it does; a test module says it by its tests' names."""
    if not path.name.startswith(("test_", "conftest", "__init__")) and ast.get_docstring(tree) is None:
        yield f"{path}: no module docstring"


def machine_paths(path: Path, text: str) -> Iterator[str]:
    """No file names a path of the machine it was written on."""
    for number, line in enumerate(text.splitlines(), 1):
        yield from (f"{path}:{number}: names the path {found!r}" for found in MACHINE_PATHS if found in line)


def findings(path: Path) -> Iterator[str]:
    """Everything wrong with one file."""
    yield from foreign_top_level(path)
    try:
        text = (ROOT / path).read_text()
    except UnicodeDecodeError:
        return  # a capture or a picture
    yield from machine_paths(path, text)
    if path.suffix == ".py":
        tree = ast.parse(text, path.name)
        yield from impure_core(path, tree)
        yield from undocumented(path, tree)
    elif path.parts[0] == "bpf" and path.suffix in (".c", ".h") and BPF_LICENCE not in text.partition("\n")[0]:
        yield f"{path}: the first line is not `{BPF_LICENCE}`"


def main() -> None:
    """Print every finding."""
    found = [line for path in files() for line in findings(path)]
    print(*found, sep="\n" if found else "", end="\n" if found else "")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
