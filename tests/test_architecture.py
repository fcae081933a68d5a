"""The import rules of ARCHITECTURE.md, read from the code itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("harness", "scenarios", "cluster", "analysis")
# The only modules that may see all four packages, and only inside functions, so a verb loads what it needs.
TOP = ("harness.cli", "harness.commands")
MODULES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, at module level and not only for type checking)"""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, eager: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = eager and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = False
            if isinstance(child, ast.Import):
                found.extend((alias.name, eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                found.append((child.module or "", eager))
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
            assert not eager, f"{name} imports {imported} at module level: verbs load what they need"
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


def loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_locust_and_ray_never_share_a_process() -> None:
    worker = loaded_by("import scenarios.worker")
    assert "locust" in worker
    assert not {"ray", "flask", "jinja2"} & worker, "Locust brings a web page that a worker never shows"
    assert not {"ray", "vllm", "torch", "locust", "gevent"} & loaded_by(
        "import harness.cli, harness.commands.flow, harness.server.probe, cluster.deploy.load_workers, "
        "cluster.process.process, analysis"
    )


def test_a_process_of_ours_does_without_pandas() -> None:
    first_array = "import pyarrow, numpy; pyarrow.array(numpy.zeros(1))"
    assert "pandas" in loaded_by(first_array), "else there is nothing to forgo"
    assert "pandas" not in loaded_by(f"from harness.startup import forgo_pandas; forgo_pandas(); {first_array}")


def test_the_simulator_is_numpy_and_the_standard_library_alone() -> None:
    assert not {"pyarrow", "ray", "locust", "msgspec", "scipy"} & loaded_by("import cluster.simulator.replica")


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
