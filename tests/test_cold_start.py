"""A slow first wave is named, a restart is noticed without counters, and neither is said of what is neither."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import SPEC, bad, good, write_run

from harness.analysis.check import Check
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.analysis.validity.counters import outages
from harness.analysis.validity.servers import first_wave
from harness.record.manifest import Replica


def summary(path: Path, results: list[Any], **options: Any) -> Summary:
    return summarise(read_run(write_run(path, results, **options)))


def check(s: Summary, name: str) -> Check:
    return next(c for c in s.checks if c.name == name)


@pytest.mark.parametrize(("slow", "advised"), [(1, 8), (7, 8), (8, 8), (9, 16), (17, 32)])
def test_the_first_wave_of_a_cold_server_is_named_with_what_to_do(tmp_path: Path, slow: int, advised: int) -> None:
    s = summary(tmp_path / "r", [good(i, ttft_ms=2000 if i < slow else 50 + i % 7) for i in range(140)])
    said = check(s, "cold_start")
    assert (said.ok, said.gate, s.verdict) == (False, False, "VALID")
    assert said.observed.startswith(f"the first {slow} of 140 answers took 2,000 ms to the first token, the others 5")
    assert said.advice is not None and said.advice.endswith(f"--warmup {advised}")


def test_with_the_warm_up_nothing_is_said(tmp_path: Path) -> None:
    results = [good(i, ttft_ms=2000 if i < 8 else 50 + i % 7) for i in range(140)]
    s = summary(tmp_path / "r", results, plan={i: {"phase": "warmup"} for i in range(8)})
    assert check(s, "cold_start").ok


def test_no_cold_start_is_made_of_long_prompts_bursts_or_drift() -> None:
    rng = np.random.default_rng(7)
    usual, unknown = rng.lognormal(0, 0.5, 200), np.full(200, np.nan)
    assert first_wave(np.concatenate(([30.0] * 6, usual)), np.full(206, 500.0)) == 6
    assert first_wave(np.concatenate(([30.0] * 6, usual)), np.array([20_000.0] * 6 + [500.0] * 200)) == 0
    burst = usual.copy()
    burst[90:95] = 30.0
    assert first_wave(np.concatenate(([30.0] * 6, burst)), np.full(206, np.nan)) == 0, "the traffic does that"
    assert first_wave(np.linspace(10, 1, 200), unknown) == 0
    assert first_wave(np.ones(200), unknown) == 0


def test_independent_answers_hardly_ever_look_like_a_cold_start() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(1000):
        tokens = rng.lognormal(6, 0.8, 60)
        found += first_wave(0.03 + 1e-4 * tokens * rng.lognormal(0, 0.3, 60), tokens) > 0
    assert found <= 5


DOWN = [bad(10, "cut", took_ms=50), bad(11, "connect", took_ms=1), bad(12, "connect", took_ms=1)]


def with_failures(failures: list[Any], n: int = 30) -> list[Any]:
    at = {row.request_id: row for row in failures}
    return [at.get(i) or good(i, ttft_ms=20) for i in range(n)]


def test_a_restart_is_noticed_without_counters(tmp_path: Path) -> None:
    s = summary(tmp_path / "r", with_failures(DOWN), engine="url")
    said = check(s, "server_restarts")
    assert s.verdict == "INVALID" and said.ok is False
    assert "from 1.1 to 1.2 s no connection came about and all in flight was lost (3 requests)" in said.observed


@pytest.mark.parametrize(
    "results",
    [
        # refused while another answer goes on: the process lives
        [*with_failures(DOWN), good(30, 900_000_000, ttft_ms=500)],
        # never back, or never there before
        with_failures([bad(i, "connect", took_ms=1) for i in range(10, 30)]),
        with_failures([bad(i, "connect", took_ms=1) for i in range(10)]),
        # too few, too far apart, or nobody was refused
        with_failures(DOWN[:2]),
        with_failures([bad(5, "connect", took_ms=1), bad(10, "connect", took_ms=1), bad(20, "connect", took_ms=1)]),
        with_failures([bad(i, "cut", took_ms=1) for i in range(10, 14)]),
    ],
)
def test_what_is_no_restart(tmp_path: Path, results: list[Any]) -> None:
    assert outages(read_run(write_run(tmp_path / "r", results))) == []


def at_server(row: Any, replica: int, **facts: Any) -> Any:
    return replace(row, replica=replica, **facts)


def test_a_restart_of_one_of_several_servers_is_noticed_and_named(tmp_path: Path) -> None:
    """Server 0 goes on all the time; server 1 loses what it has, refuses, and comes back."""
    urls = ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"]
    facts: dict[str, Any] = {
        "engine": "url", "spec": replace(SPEC, base_urls=urls),
        "replicas": [Replica(index=k, base_url=url) for k, url in enumerate(urls)],
    }  # fmt: skip
    down = {10, 12, 14}
    results = [
        at_server(bad(i, "cut" if i == 10 else "connect", took_ms=20) if i in down else good(i, ttft_ms=20), 1 - i % 2)
        for i in range(40)
    ]
    s = summary(tmp_path / "r", results, **facts)
    said = check(s, "server_restarts")
    assert s.verdict == "INVALID" and said.ok is False and s.cost.usd_per_1m_total.value is None
    assert said.observed.startswith("replica 1 (http://127.0.0.1:2/v1) from 1.0 to 1.4 s no connection came about")
    assert len(outages(read_run(tmp_path / "r"))) == 1, "the other one answered all the time"
    dealt = [at_server(row, row.request_id // 2 % 2) for row in results]
    assert outages(read_run(write_run(tmp_path / "dealt", dealt, **facts))) == [], "each lost one or two, for itself"


def sent_again(request_id: int, until_ms: int = 2000) -> Any:
    """A request that found nobody there at first, and was answered soon after the server was back."""
    took_ms = until_ms - 100 * request_id + request_id
    return replace(good(request_id, ttft_ms=took_ms), retries=2)


def test_a_restart_is_noticed_when_what_was_refused_was_sent_again(tmp_path: Path) -> None:
    rows = with_failures([bad(10, "cut", took_ms=50), *(sent_again(i) for i in range(11, 19))])
    retrying = replace(SPEC, retries=5)
    s = summary(tmp_path / "r", rows, engine="url", spec=retrying)
    said = check(s, "server_restarts")
    assert s.verdict == "INVALID" and "from 1.1 to 1.8 s" in said.observed and "(9 requests)" in said.observed
    kept = summary(tmp_path / "kept", rows, engine="url")
    assert check(kept, "server_restarts").ok is None, "nothing is sent again unasked but on a connection that closed"
    quota = with_failures([sent_again(i) for i in range(10, 19)])
    assert outages(read_run(write_run(tmp_path / "quota", quota, spec=retrying))) == [], "429 loses nothing in flight"


def test_an_unknown_number_is_not_printed_as_one(tmp_path: Path) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    replica = Replica(
        index=0, base_url="http://127.0.0.1:1/v1", counters_before=dict.fromkeys(names, 0.0),
        counters_after=dict.fromkeys(names, 500.0),
    )  # fmt: skip
    results = [*(good(i) for i in range(20)), bad(20)]
    for spec, plan in ((SPEC, {20: {"input_tokens": None}}), (replace(SPEC, output_lengths="free"), {})):
        s = summary(tmp_path / spec.output_lengths, results, replicas=[replica], spec=spec, plan=plan)
        said = check(s, "token_books").observed
        assert "(+any number failed)" in said and "000,000" not in said
