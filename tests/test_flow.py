"""What a replay leaves behind when it cannot begin."""

from __future__ import annotations

from pathlib import Path

from conftest import StartServer, harness

TRACE = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "azure-conv-2023.csv"


def test_a_plan_that_cannot_be_leaves_no_run_directory(fake_server: StartServer, tmp_path: Path) -> None:
    url, out = fake_server().url, tmp_path / "runs"
    done = harness("replay", TRACE, "--rate", "5", "--grow", "2x", "--base-url", url, "--out", out)
    assert done.returncode == 2
    assert "growth" in done.stderr
    assert not list(out.iterdir())
