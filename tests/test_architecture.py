"""The import rules of ARCHITECTURE.md, read from the code itself."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "scenarios", "cluster", "analysis")
# The only package that may see all four; it imports a verb's module when the verb is run (tests/test_verb.py).
TOP = "harness.cli"
# The last three are imported as harness.scenarios and so on (the links in harness/); here each goes by its folder.
# Examples are a user's code: in no package, and free to use all of it.
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p.parent.name != "examples")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_name(module: str) -> str:
    """``harness.analysis.rows`` -> ``analysis.rows``, ``harness.trace`` as it is."""
    below = module.removeprefix("harness.")
    return below if below.split(".")[0] in PACKAGES else module


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, at module level and not only for type checking)"""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, eager: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = eager and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = False
            if isinstance(child, ast.Import):
                found.extend((folder_name(alias.name), eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                if child.module == "harness":
                    found.extend((folder_name(f"harness.{alias.name}"), eager) for alias in child.names)
                else:
                    found.append((folder_name(child.module or ""), eager))
            walk(child, inner)

    walk(ast.parse(path.read_text()), True)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    package = name.split(".")[0]
    for imported, eager in imports(path):
        target = imported.split(".")[0]
        if target in PACKAGES and target not in (package, "harness"):
            assert name.startswith(TOP), f"{name} imports {imported}: only {TOP} may"
            assert not (eager and name.startswith(f"{TOP}.runner")), f"{name} imports {imported} at module level"
        if package != "harness" and target == "harness":
            assert not imported.startswith(TOP), f"{name} imports {imported}: nothing imports the command line"
        if target in ("locust", "gevent"):
            assert package == "scenarios", f"{name} imports {imported}: Locust's patching stays in scenarios"
        if target == "ray":
            assert package == "cluster", f"{name} imports {imported}: Ray stays in cluster"
        if target in ("vllm", "torch", "transformers"):
            assert not eager, f"{name} imports {imported} at module level"
        if name.startswith("cluster.simulator") and target in PACKAGES:
            assert imported.startswith("cluster.simulator"), f"{name} imports {imported}: the simulator stands alone"
        if name == "harness.errors":
            assert target not in PACKAGES, "errors is the bottom"


@functools.cache
def edges(*, typing: bool = False) -> dict[str, set[str]]:
    """Module -> those of ours that it imports, in functions too; and what is only for type checking, if ``typing``."""
    names = {module_name(path): path for path in MODULES}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        typed = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        aside = {id(inner) for block in typed for statement in block.body for inner in ast.walk(statement)}
        seen: set[str] = set()
        for node in ast.walk(tree):
            if id(node) in aside and not typing:
                continue
            if isinstance(node, ast.Import):
                seen.update(folder_name(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                module = folder_name(node.module)
                below = {folder_name(f"{node.module}.{alias.name}") for alias in node.names}
                seen |= below & names.keys() or {module}
        found[name] = seen & names.keys() - {name}
    return found


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Strongly connected components of several modules. Source: Tarjan, SIAM Journal on Computing 1(2), 1972."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == index[name]:
            k = stack.index(name)
            if len(stack) - k > 1:
                found.add(frozenset(stack[k:]))
            del stack[k:]

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == {frozenset("abc")}


@pytest.mark.parametrize("typing", [False, True], ids=["when run", "for type checking, too"])
def test_no_circle_of_modules(typing: bool) -> None:
    assert not circles(edges(typing=typing))


ANALYSIS = (
    "arrays", "check", "labels", "price_age", "rows", "stats", "metrics", "rates", "steady", "validity",
    "fidelity", "cost", "flat", "summary", "capacity", "pricing", "compare", "quality", "audit", "report", "api",
)  # fmt: skip
"""The packages and modules of the analysis from left to right: each imports only those to its left."""


def test_the_analysis_flows_one_way() -> None:
    place = {name: k for k, name in enumerate(ANALYSIS)}
    for name, others in edges().items():
        if name.startswith("analysis."):
            own = place[name.split(".")[1]]
            wrong = [other for other in others if other.startswith("analysis.") and place[other.split(".")[1]] > own]
            assert not wrong, f"{name} imports {', '.join(wrong)}: to the right of it"


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_locust_and_ray_never_share_a_process() -> None:
    worker = loaded_by("import harness.scenarios.worker")
    assert "locust" in worker
    assert not {"ray", "flask", "jinja2"} & worker, "Locust brings a web page that a worker never shows"
    assert not {"ray", "vllm", "torch", "locust", "gevent"} & loaded_by(
        "import harness.cli, harness.cli.replay, harness.cli.runner.steps, harness.server.probe, "
        "harness.cluster.deploy.load_workers, harness.cluster.process.process, harness.analysis"
    )


def test_a_process_of_ours_does_without_pandas() -> None:
    first_array = "import pyarrow, numpy; pyarrow.array(numpy.zeros(1))"
    assert "pandas" in loaded_by(first_array), "else there is nothing to forgo"
    assert "pandas" not in loaded_by(f"from harness import forgo_pandas; forgo_pandas(); {first_array}")


def test_the_simulator_is_numpy_and_the_standard_library_alone() -> None:
    assert not {"pyarrow", "ray", "locust", "msgspec", "scipy"} & loaded_by("import harness.cluster.simulator.fleet")


def test_help_is_light() -> None:
    """`harness --help` answers at once: no Arrow, no NumPy, no engine."""
    assert not {"pyarrow", "numpy", "ray", "locust", "rich"} & loaded_by("import harness.cli")


def test_the_reading_order_is_true_and_takes_an_hour() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    section = page.split("## Read it in an hour")[1].split("\n## ")[0]
    paths = re.findall(r"`((?:harness|scenarios|cluster|analysis)/[\w/]+\.py)`", section)
    assert len(paths) >= 8
    assert sum(len((ROOT / path).read_text().splitlines()) for path in paths) < 2500
    missing = [path for path in re.findall(r"`([\w/]+\.(?:py|c|md))`", page) if not (ROOT / path).exists()]
    assert not missing
