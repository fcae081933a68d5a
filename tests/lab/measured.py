"""The code that a study measures, by hash: a committed table speaks of that code and of no later one."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
DECIDING = (
    "analysis.capacity", "analysis.compare", "analysis.quality", "analysis.stats", "analysis.steady",
    "cluster.simulator", "harness.plan.windows", "tests.lab",
)  # fmt: skip
"""Where figures and verdicts are made, by folder. What a study imports elsewhere brings it data or words, and tests
guard that."""
BY_COMMAND = {"fleet": "analysis.capacity.fleet_plan"}
"""What a study measures through a verb of the command line, and so does not import."""
_LINKED = re.compile(r"\bharness\.(?=(?:analysis|cluster|scenarios)\b)")
"""Of a module's name: its folder is at the top."""


def modules(study: str) -> list[str]:
    """The study's module and the deciding ones that it imports, directly or not, in order of their names."""
    found: set[str] = set()
    coming = [f"tests.lab.{study}", *([BY_COMMAND[study]] if study in BY_COMMAND else [])]
    while coming:
        name = coming.pop()
        if name not in found:
            found.add(name)
            coming += _imports(ast.parse(_path(name).read_bytes()))
    return sorted(found)


def fingerprint(study: str) -> str:
    """SHA-256 of those modules without comments, docstrings, layout and the order of imports, as hex."""
    whole = hashlib.sha256()
    for name in modules(study):
        whole.update(f"{name} {_bare(_path(name).read_text())}\n".encode())
    return whole.hexdigest()


def _path(module: str) -> Path:
    return ROOT / Path(*module.split(".")).with_suffix(".py")


def _imports(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    names = {_LINKED.sub("", name) for name in names}
    return {n for n in names if any(n == d or n.startswith(f"{d}.") for d in DECIDING) and _path(n).is_file()}


def _bare(source: str) -> str:
    """Python source without its docstrings, comments and white space, what it imports at the top first and sorted."""
    source = _LINKED.sub("", source)
    lines, imported = source.splitlines(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset == 0:
            whence = f"{node.module} " if isinstance(node, ast.ImportFrom) else ""
            imported += [f"{whence}{alias.name} {alias.asname}" for alias in node.names]
        elif not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            continue
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return ";".join(sorted(imported)) + "".join("".join(lines).split())
