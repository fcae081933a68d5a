"""`scenarios/examples`: each does what its first lines say, as a user starts it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.record.results import read_results
from tests.conftest import ROOT, StartServer, harness

EXAMPLES = ROOT / "scenarios" / "examples"
TRACE = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command beside the `harness` of this tree."""
    tool = cwd / "bin" / "harness"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness "$@"\n')
    tool.chmod(0o755)
    path = f"{tool.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=280, check=False,
    )  # fmt: skip


def test_every_example_has_a_test_and_a_line_in_the_documents() -> None:
    page, tests = (ROOT / "docs" / "examples.md").read_text(), Path(__file__).read_text()
    names = [file.name for file in EXAMPLES.iterdir() if file.is_file()]
    assert len(names) >= 4
    assert [name for name in names if name not in page or name not in tests] == []


def test_a_plan_beside_a_plain_page(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.02", "--itl", "0.001", "--model", "m")
    plan = tmp_path / "plan.arrow"
    made = harness("plan", TRACE, "--limit", "30", "--rate", "15", "--base-url", server.url, "--model", "m", "-o", plan)
    assert made.returncode == 0, made.stderr
    done = run(
        sys.executable, "-m", "locust", "-f", EXAMPLES / "mixed_locustfile.py", "--headless", "-u", "2", "--host",
        server.url.removesuffix("/v1"), "--plan", plan, "--model", "m", "--results", "rows.arrows", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 4), done.stderr  # 4: a busy machine was slow to give the page
    rows = read_results(tmp_path / "rows.arrows")
    assert rows.num_rows == 30 and rows.column("error").null_count == 30
    assert "models" in done.stderr + done.stdout and "TTFT" in done.stderr + done.stdout


def test_capacity_to_price(tmp_path: Path) -> None:
    done = run(
        "sh", EXAMPLES / "capacity_to_price.sh", TRACE, "mistral-7b-instruct-v0.3", "aws-g6e.xlarge", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / done.stdout.rpartition("pages and tables: ")[2].strip()
    assert "Simulated" in (folder / "price.html").read_text() and "instances" in (folder / "fleet.html").read_text()
    assert any("output" in row for row in csv.reader((folder / "price.csv").open()))


@pytest.fixture(scope="module")
def two_systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = harness("sweep", EXAMPLES / "two_systems.toml", "--out", folder, "-q")
    assert done.returncode == 0, done.stderr
    return next(folder.iterdir())


def test_two_systems_can_be_judged(two_systems: Path) -> None:
    done = harness("compare", two_systems, "--fail-if", "tpot_p95 > +20%")
    assert done.returncode == 0 and "--fail-if tpot_p95 > +20%: holds" in done.stdout, done.stdout + done.stderr


def test_slow_requests(two_systems: Path, tmp_path: Path) -> None:
    some = next(path.parent for path in two_systems.rglob("run.json"))
    done = run(sys.executable, EXAMPLES / "slow_requests.py", some, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("VALID: ttft p95 0.") and done.stdout.count("request_id") == 1
