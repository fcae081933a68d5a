"""Below 30 measured requests there is no verdict and no price, whatever the rate, the report or the rest of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, exit_code, summarise
from harness.cli.results import exit_of
from harness.cli.select_runs import refused_exit
from harness.errors import EXIT_INVALID, EXIT_NOT_DECIDED, EXIT_VALID
from harness.record.run_spec import RunSpec
from tests.conftest import StartServer, harness
from tests.run_files import SPEC, bad, good, write_run

THIRTY = replace(SPEC, min_requests=30)


def judged(path: Path, results: list[Any], least: int | None = None, **options: Any) -> Summary:
    return summarise(read_run(write_run(path, results, **{"spec": THIRTY, **options})), min_requests=least)


def test_thirty_is_the_default() -> None:
    assert RunSpec(mode="open", model="m", base_urls=[]).min_requests == 30


@pytest.mark.parametrize(("n", "said"), [(0, "TOO SMALL"), (3, "TOO SMALL"), (29, "TOO SMALL"), (30, "VALID")])
def test_fewer_than_thirty_have_no_verdict_and_no_price(tmp_path: Path, n: int, said: str) -> None:
    s = judged(tmp_path / "run", [good(i) for i in range(n)])
    assert s.verdict == said
    assert exit_code(s) == (EXIT_VALID if said == "VALID" else EXIT_NOT_DECIDED)
    assert (s.cost.usd_per_1m_total.value is None) == (said != "VALID")
    if said != "VALID":
        assert s.reasons[0].startswith(f"min_requests: {n} measured requests")
        assert s.cost.reason == "the run is TOO SMALL"


def test_too_small_is_neither_valid_nor_invalid(tmp_path: Path) -> None:
    s = judged(tmp_path / "run", [bad(i) for i in range(3)])
    assert s.verdict == "TOO SMALL" and any(reason.startswith("success") for reason in s.reasons)


def test_warmup_does_not_count(tmp_path: Path) -> None:
    warm = {i: {"phase": "warmup"} for i in range(5)}
    assert judged(tmp_path / "run", [good(i) for i in range(34)], plan=warm).verdict == "TOO SMALL"


def test_a_large_plan_that_was_broken_off_is_invalid_as_ever(tmp_path: Path) -> None:
    s = judged(tmp_path / "run", [good(0)], requests=100, status="stopped")
    assert s.verdict == "INVALID"


def test_a_report_may_ask_for_another_number(tmp_path: Path) -> None:
    assert judged(tmp_path / "a", [good(i) for i in range(5)], least=5).verdict == "VALID"
    assert judged(tmp_path / "b", [good(i) for i in range(50)], least=100).verdict == "TOO SMALL"


def test_of_several_runs_invalid_counts_before_too_small(tmp_path: Path) -> None:
    large = judged(tmp_path / "a", [good(i) for i in range(40)])
    small = judged(tmp_path / "b", [good(i) for i in range(3)])
    broken = judged(tmp_path / "c", [good(i) for i in range(40)], status="stopped")
    assert exit_of(serving_configs([large, small]), [large, small]) == EXIT_NOT_DECIDED
    assert exit_of(serving_configs([large, small, broken]), [large, small, broken]) == EXIT_INVALID
    assert refused_exit(["VALID"]) == EXIT_VALID
    (one,) = serving_configs([large, small])
    assert len(one.loads) == 1, "what is too small makes no capacity"


@pytest.mark.parametrize(("n", "rate"), [(5, "1000000000"), (3, "10")])
def test_the_command_line_ends_with_five(fake_server: StartServer, tmp_path: Path, n: int, rate: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(json.dumps({"arrival_s": i, "input_tokens": 8, "output_tokens": 2}) + "\n" for i in range(n))
    )
    out, url = tmp_path / "runs", fake_server("--ttft", "0.01", "--itl", "0.001").url
    done = harness(
        "replay", trace, "--base-url", url, "--rate", rate, "--out", out,
        "--min-requests", "30", "--tier", "aws-g6.xlarge", "--format", "json",
    )  # fmt: skip
    assert done.returncode == EXIT_NOT_DECIDED, done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "TOO SMALL"
    assert report["cost"]["usd_per_1m_total"]["value"] is None
    (run,) = out.iterdir()
    assert harness("report", run).returncode == EXIT_NOT_DECIDED
    price = harness("price", run)
    assert price.returncode == EXIT_NOT_DECIDED, price.stderr
    assert "TOO SMALL" in harness("report", run, "--format", "md").stdout
