"""What a simulated run costs: its interval holds the simulator's own error; a bound is neither priced nor ranked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.cost.simulated import own_error
from harness.analysis.pricing.operating_point import pooled_cost
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.cli import cli
from harness.errors import EXIT_FAILURE
from harness.record.manifest import read_manifest

MODEL = "mistral-7b-instruct-v0.3"


def harness(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trace on a chip whose kernels are known, with a step that the user says, and by a data sheet."""
    folder = tmp_path_factory.mktemp("simulated")
    trace = folder / "t.jsonl"
    rows = [{"arrival_s": k * 0.1, "input_tokens": 300 + k % 50, "output_tokens": 30 + k % 9} for k in range(150)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name, more in {
        "kernels": ("--tier", "lambda-h100"), "closed": ("--tier", "lambda-h100", "--concurrency", "4"),
        "given": ("--tier", "lambda-h100", "--step", "8,0.05,0.02"), "bound": ("--tier", "aws-g6.xlarge"),
        "other": ("--tier", "aws-g6e.xlarge"),
    }.items():  # fmt: skip
        done = harness("simulate", trace, "--model", MODEL, "--slo", "ttft=2s", *more, "-o", folder / name)
        assert done.return_value == 0, done.output
        (found[name],) = (folder / name).iterdir()
    return found


def summary(run: Path) -> Summary:
    return summarise(read_run(run))


def test_the_interval_of_a_cost_holds_the_simulators_own_error(runs: dict[str, Path]) -> None:
    within = own_error(read_manifest(runs["kernels"]).model_facts)
    assert within is not None and within[0] < 0.8 and within[1] > 1.3
    opened, closed, given, bound = (summary(runs[name]) for name in ("kernels", "closed", "given", "bound"))
    cost = opened.cost.usd_per_1m_total
    assert cost.value and (cost.low, cost.high) == pytest.approx((cost.value * within[0], cost.value * within[1]))
    assert opened.rates.total_token_throughput.low is None, "of tokens/s there is none: the load was given"
    cost, rate = closed.cost.usd_per_1m_total, closed.rates.total_token_throughput
    assert cost.value and cost.low and cost.high and rate.value and rate.low and rate.high
    assert (cost.low, cost.high) == pytest.approx(
        (cost.value * rate.value / rate.high * within[0], cost.value * rate.value / rate.low * within[1])
    )
    assert given.cost.usd_per_1m_total.low is None and "not known" in (given.caution or "")
    least = bound.cost.usd_per_1m_total
    assert (least.low, least.high) == (least.value, None) and "lower bounds" in (bound.caution or "")


def test_repeats_do_not_shrink_what_they_share(runs: dict[str, Path]) -> None:
    one = summary(runs["closed"])
    alone, pooled = one.cost.usd_per_1m_total, pooled_cost([one] * 4)
    within = own_error(one.server.model_facts)
    assert within and pooled.value and pooled.low and pooled.high and alone.low
    assert pooled.low <= pooled.value * within[0] and pooled.high >= pooled.value * within[1]


def test_no_fleet_is_planned_by_a_bound(runs: dict[str, Path]) -> None:
    done = harness("plan-fleet", runs["kernels"].parents[1] / "t.jsonl", runs["bound"])
    assert done.return_value != 0 and "lower bounds" in " ".join(done.output.split())


def test_text_page_and_json_show_the_wide_interval(runs: dict[str, Path]) -> None:
    run = runs["kernels"]
    cost = summary(run).cost.usd_per_1m_total
    assert cost.low and cost.high
    ends = re.compile(rf"{cost.low:.3g}\d* to {cost.high:.3g}")
    for format_ in ("text", "md"):
        said = harness("report", run, "--format", format_).stdout
        assert ends.search(said), said
        assert "hold the simulator's own error" in " ".join(said.split())
    found: dict[str, Any] = json.loads(harness("report", run, "--format", "json").stdout)
    assert found["cost"]["usd_per_1m_total"]["low"] == cost.low
    priced = harness("price", run).stdout
    assert "PRICE (simulated)" in priced and f"(simulated: {cost.low / 0.18:.3f} to " in priced
    assert "(95 %: 0" not in priced


def test_a_bound_is_neither_priced_nor_ranked_nor_compared(runs: dict[str, Path]) -> None:
    done = harness("price", runs["bound"])
    assert done.return_value == EXIT_FAILURE and "No price: a lower bound" in done.stdout and "at least" in done.stdout
    both = json.loads(harness("price", runs["bound"], runs["other"], "--format", "json").stdout)["charges"]
    assert [charge["cost_full"] is None for charge in both] == [False, True]
    for pair in ((runs["bound"], runs["other"]), (runs["other"], runs["bound"])):
        done = harness("compare", *pair)
        assert done.return_value != 0 and "lower bounds" in " ".join(done.output.split())
    configs = serving_configs([summary(runs[name]) for name in ("bound", "kernels", "other")])
    assert [one.costs_at_least for one in configs] == [False, False, True], "a bound stands last, however low"


def test_two_simulations_at_one_load_show_no_better_ttft_and_no_better_cost(runs: dict[str, Path]) -> None:
    found = json.loads(harness("compare", runs["kernels"], runs["other"], "--format", "json").stdout)
    by_name = {figure["name"]: figure for load in found["loads"] for figure in load["figures"]}
    assert by_name["ttft_p50"]["verdict"] == "not judged" and by_name["cost"]["verdict"] == "not judged"
    assert "equal share of each system's own capacity" in by_name["ttft_p50"]["difference"]["note"]


def test_systems_whose_steps_are_known_otherwise_are_never_one(runs: dict[str, Path]) -> None:
    assert len(serving_configs([summary(runs[name]) for name in ("kernels", "given")])) == 2
