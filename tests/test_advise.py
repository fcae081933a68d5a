from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.cli import main
from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.hardware import advice
from harness.cluster.hardware.advice import Demand, Offer, capacity, offers, ranked, to_measure
from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.hardware.error import ERRORS
from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.step_time import LinearStep
from harness.slo import criteria
from harness.sweep.spec import pairs, read_sweep

EVEN = Demand(arrival_s=np.arange(300.0), input_tokens=np.full(300, 100), output_tokens=np.full(300, 11))
LONG = Demand(arrival_s=np.arange(300.0), input_tokens=np.full(300, 2000), output_tokens=np.full(300, 200))


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "REQUESTS", 300)
    monkeypatch.setattr(advice, "SPAN_S", 15.0)


def test_capacity_is_the_rate_at_which_the_limit_is_reached() -> None:
    """One at a time, 100 ms a step: a request takes 1.1 s, so 1/1.1 of them come each second at most."""
    engine = HardwareEngine(
        step_time=LinearStep(0.1, 0.0, 0.0), limits=Limits(max_num_seqs=1), source="given", chip="none",
        tensor_parallel=1,
    )  # fmt: skip
    assert capacity(engine, EVEN, criteria({"ttft": 0.11}, 0.99)) == pytest.approx(1 / 1.1, rel=advice.CLOSE)
    assert capacity(engine, EVEN, criteria({"tpot": 0.09}, 0.99)) == 0


def offer(usd: float, chip: str, source: Any = "kernels") -> Offer:
    engine = HardwareEngine(
        step_time=LinearStep(1, 1, 1), limits=Limits(max_num_seqs=1), source=source, chip=chip, tensor_parallel=1
    )  # fmt: skip
    return Offer(
        model="m", tier=get_tier("lambda-h100"), engine=engine, replicas=1, requests_per_s=1, usd_per_1m_output=usd,
        error=(0.8, 1.2), served=1,
    )  # fmt: skip


def test_ties_are_within_a_tenth_of_the_first_and_a_bound_has_no_rank() -> None:
    groups = ranked([offer(1.2, "a"), offer(1.0, "a"), offer(0.1, "c", "bound"), offer(1.09, "b"), offer(1.11, "a")])
    assert [[one.usd_per_1m_output for one in group] for group in groups] == [[1.0, 1.09], [1.11, 1.2]]
    assert [one.usd_per_1m_output for one in to_measure(groups)] == [1.0, 1.09]
    assert to_measure([]) == []


def test_a_range_holds_the_models_own_error_and_a_bound_has_no_upper_end() -> None:
    model = get_model("mistral-7b-instruct-v0.3")
    tiers = [get_tier(name) for name in ("lambda-h100", "aws-g6.xlarge")]
    h100, l4 = offers([model], tiers, LONG, criteria({"ttft": 2.0, "tpot": 0.1}, 0.95))
    assert isinstance(h100, Offer) and isinstance(l4, Offer)
    figures = json.loads(ERRORS.read_text())
    p90 = max(figures["all"]["model_left_out"]["cost"][1], figures["strangers_beyond"]["cost"][1]) / 100
    assert h100.error == pytest.approx((1 / (1 + p90), 1 / (1 - p90)))
    assert l4.is_bound and l4.error == (1.0, float("inf"))


def test_advice_ranks_says_what_is_missing_and_writes_a_sweep_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, sweep = tmp_path / "t.jsonl", tmp_path / "measure.toml"
    rows = [{"arrival_s": k * 0.5, "input_tokens": 2000, "output_tokens": 200} for k in range(50)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("lambda-h100", "runpod-b200", "aws-g6.xlarge", "aws-m7a.large")
    args = [
        "advise",
        str(trace),
        "--model",
        "mistral-7b-instruct-v0.3",
        "--slo",
        "ttft=2s,tpot=100ms",
        "--format",
        "json",
    ]
    args += [word for name in names for word in ("--tier", name)]
    with pytest.raises(SystemExit) as done:
        main([*args, "--sweep", str(sweep)])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evidence"] == "simulated"
    by_tier = {row["tier"]: row for row in found["offers"]}
    assert {by_tier["lambda-h100"]["rank"], by_tier["runpod-b200"]["rank"]} <= {"1", "2"}
    assert by_tier["aws-g6.xlarge"]["rank"] is None and by_tier["aws-g6.xlarge"]["high"] is None
    assert [row["tier"] for row in found["without"]] == ["aws-m7a.large"]
    spec = read_sweep(sweep, {"slo", "attain"}, {})
    assert {pair.tier for pair in pairs(spec)} == {"lambda-h100", "runpod-b200"}
    assert sweep.read_text() == found["sweep"]


def test_a_simulated_price_says_the_simulators_own_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [{"arrival_s": k * 0.2, "input_tokens": 300, "output_tokens": 40} for k in range(60)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["simulate", str(trace), "--model", "mistral-7b-instruct-v0.3", "--tier", "lambda-h100", "-o", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(args)
    said = " ".join(capsys.readouterr().out.split())
    assert "hold the simulator's own error: 0.78 to 1.40 times it" in said
