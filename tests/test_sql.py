"""Runs in SQL and as data frames: the report's own figures, whatever is asked; and nothing but reading."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from run_files import SPEC, TIER, bad, good, write_run

from harness import install
from harness.analysis.api import load
from harness.analysis.flat import figures
from harness.analysis.report.sql import VIEWS, Runs, query
from harness.cli.sql import sql
from harness.errors import HarnessError, UsageError

pytest.importorskip("duckdb", reason="the sql extra has it")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    spec = replace(SPEC, slo={"ttft": 1.0})
    one = write_run(tmp_path / "one", [*(good(i, ttft_ms=40 + i) for i in range(60)), bad(60)], spec=spec)
    two = write_run(tmp_path / "two", [good(i, tokens=3) for i in range(40)], spec=spec, tier=replace(TIER, name="big"))
    return [one, two]


def rows(runs: list[Path], sql: str) -> list[tuple[Any, ...]]:
    return query(Runs(runs), sql)[1]


def test_requests_are_all_rows_of_all_runs(runs: list[Path]) -> None:
    assert rows(runs, "select run, tier, count(*), count(ttft_s) from requests group by all order by 1") == [
        ("one", "test.large", 61, 60), ("two", "big", 40, 40),
    ]  # fmt: skip
    assert rows(runs, "select count(*), sum(tokens) from Chunks where run = 'two'") == [(120, 120)]
    gap = rows(runs, "select r.ttft_s, c.gap_s from requests r join chunks c using (run, request_id) where c.chunk = 1")
    assert all(ttft == pytest.approx(first) for ttft, first in gap)


def test_figures_and_runs_say_what_the_report_says(runs: list[Path]) -> None:
    summary = load(runs[0]).summary()
    p50, rate = summary.metrics.ttft.p50, summary.rates.goodput
    assert rows(runs, "select value, low, high, unit, n from figures where run = 'one' and figure = 'ttft_p50'") == [
        (p50.value, p50.low, p50.high, "s", 60),
    ]  # fmt: skip
    found = rows(runs, "select verdict, slo_met, ttft_p50, goodput, ttft_p99, tier from runs order by run")
    assert found[0] == (summary.verdict, True, p50.value, rate.value, None, "test.large") or found[0][1] is not True
    assert found[1][5] == "big" and found[0][2] == p50.value
    assert len(rows(runs, "select distinct figure from figures")) == len(figures(summary)) > 40


def test_samples_are_there_whether_or_not_anything_was_sampled(runs: list[Path]) -> None:
    for view in VIEWS:
        assert rows(runs, f"select count(run) from {view}")[0][0] >= 0
        assert "run" in [name for name, *_ in rows(runs, f"describe {view}")]


@pytest.mark.parametrize(
    "sql",
    [
        "copy (select 1) to '/tmp/hacked'", "select * from read_csv('/etc/passwd')", "select * from '/etc/passwd'",
        "create table x as select 1", "insert into runs select 1", "attach '/tmp/x.db'", "install httpfs", "select",
        "set enable_external_access = true", "pragma database_list", "select * from runs_", "", "select no from runs",
        "select * from rows", "select 1; select 2",
    ],
)  # fmt: skip
def test_nothing_but_reading_runs(runs: list[Path], sql: str) -> None:
    with pytest.raises(UsageError):
        rows(runs, sql)


def test_the_verb_prints_text_csv_and_json(runs: list[Path]) -> None:
    def said(*args: str) -> str:
        done = CliRunner().invoke(sql, [str(runs[0].parent), *args])
        assert done.exit_code == 0, done.output
        return done.stdout

    ask = "select run, count(*) as n, max(tpot_s) as tpot, null as no from requests group by 1 order by 1"
    assert json.loads(said("-c", ask, "--format", "json"))[1] == {
        "run": "two",
        "n": 40,
        "tpot": pytest.approx(0.01),
        "no": None,
    }
    assert list(csv.DictReader(io.StringIO(said("-c", ask, "--format", "csv"))))[1]["n"] == "40"
    assert "two" in said("-c", ask) and "0.01" in said("-c", ask)


def test_a_summary_as_a_data_frame(runs: list[Path]) -> None:
    pytest.importorskip("pandas", reason="dev has it")
    summary = load(runs[0]).summary()
    frame = summary.to_frame()
    assert frame.loc["ttft_p50", "value"] == summary.metrics.ttft.p50.value
    assert frame.loc["slo_attainment", "high"] == summary.slo.attainment.high  # type: ignore[union-attr]
    assert frame.loc["ttft_p99", "value"] != frame.loc["ttft_p99", "value"], "not known is NaN"
    assert list(frame.columns) == ["value", "low", "high", "unit", "n", "evidence", "note"]


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "PUBLISHED", True)
    with pytest.raises(HarnessError, match=r"no_such-module is not installed.*pip install 'llm-harness\[sql\]'"):
        install.require("no_such.module", extra="sql")
    with pytest.raises(HarnessError, match=r"pip install other$"):
        install.require("no_such", package="other")
