"""The definitions of other tools: vLLM's against vLLM's own code, the others by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from run_files import bad, good, write_run

from harness.analysis.compare.variants import (
    PERCENTILES,
    VARIANTS,
    by_weight,
    linear,
    variant,
    variant_of,
)
from harness.analysis.rows.read import read_run
from harness.errors import UsageError

METRICS_MD = (Path(__file__).resolve().parent.parent / "analysis" / "METRICS.md").read_text()


@dataclass
class Rows:
    success: np.ndarray
    sent_s: np.ndarray
    finished_s: np.ndarray
    first_gap_s: np.ndarray
    decode_s: np.ndarray
    chunks: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray


def rows(requests):
    """From (sent, stamps relative to sent, end relative to sent, input tokens, output tokens, success)."""
    sent, stamps, end, into, out, ok = zip(*requests, strict=True)
    return Rows(
        success=np.array(ok), sent_s=np.array(sent, dtype=float), finished_s=np.array(sent) + np.array(end),
        first_gap_s=np.array([s[0] if s else math.nan for s in stamps]),
        decode_s=np.array([s[-1] - s[0] if s else math.nan for s in stamps]),
        chunks=np.array([len(s) for s in stamps], dtype=np.int32),
        input_tokens=np.array(into, dtype=float), output_tokens=np.array(out, dtype=float),
    )  # fmt: skip


def gaps_of(requests):
    return np.concatenate([np.diff(s) for _, s, _, _, _, ok in requests if ok and s])


def drawn(n=200, seed=0):
    rng, found = np.random.default_rng(seed), []
    for k in range(n):
        count = int(rng.integers(1, 40))
        stamps = list(0.05 + 0.2 * rng.random() + np.cumsum(rng.exponential(0.02, count)))
        found.append((0.1 * k, stamps, stamps[-1] + 0.003, int(rng.integers(1, 500)), count, rng.random() > 0.1))
    return found


TWO = [(0.0, [0.1, 0.2, 0.4], 0.5, 10, 5, True), (1.0, [0.3], 0.3, 20, 1, True), (1.5, [], 9.0, 5, math.nan, False)]


def test_vllm_bench_is_vllms_own():
    """The same data through the installed vLLM's calculate_metrics."""
    serve = pytest.importorskip("vllm.benchmarks.serve")
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    requests = drawn()
    outputs = [
        RequestFuncOutput(
            success=bool(ok), latency=s[-1], output_tokens=out, ttft=s[0], itl=list(np.diff(s)), prompt_len=into,
            start_time=sent,
        )
        for sent, s, _, into, out, ok in requests
    ]  # fmt: skip
    served = rows(requests)
    duration = float(served.finished_s.max() - served.sent_s.min())  # its own clock runs until all have ended
    theirs, _ = serve.calculate_metrics([], outputs, duration, None, list(map(float, PERCENTILES)), {})
    ours = variant("vllm-bench", served, gaps_of(requests))
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert ours[metric].mean * 1000 == pytest.approx(getattr(theirs, f"mean_{metric}_ms"), rel=1e-12)
        assert ours[metric].percentiles[50] * 1000 == pytest.approx(getattr(theirs, f"median_{metric}_ms"), rel=1e-9)
        for p, value in getattr(theirs, f"percentiles_{metric}_ms"):
            assert ours[metric].percentiles[int(p)] * 1000 == pytest.approx(value, rel=1e-9)
    for rate in ("request_throughput", "output_throughput", "total_token_throughput"):
        assert ours[rate].mean == pytest.approx(getattr(theirs, rate), rel=1e-12)


def means(name, requests=TWO):
    return {metric: f.mean for metric, f in variant(name, rows(requests), gaps_of(requests)).items()}


def test_the_same_two_requests_by_every_tool():
    """Sent at 0: chunks after 0.1, 0.2, 0.4 s, end at 0.5, 5 tokens. Sent at 1: one token after 0.3 s. One failed at
    10.5 s, until which vLLM's clock runs.
    """
    near = pytest.approx
    assert means("vllm-bench") == near(
        {
            "ttft": 0.2, "tpot": 0.3 / 4, "itl": 0.15, "e2el": 0.35, "request_throughput": 2 / 10.5,
            "output_throughput": 6 / 10.5, "total_token_throughput": 36 / 10.5,
        }
    )  # fmt: skip
    assert means("guidellm") == near(
        {
            "time_to_first_token": 0.2, "time_per_output_token": (0.4 + 0.3) / 6, "inter_token_latency": 0.3 / 4,
            "request_latency": 0.4,
        }
    )  # fmt: skip
    assert means("aiperf")["inter_token_latency"] == near(0.3 / 4)
    assert means("aiperf")["request_latency"] == near(0.35)
    late = means("aiperf", [(0.0, [0.1, 0.2], 0.9, 5, 2, True), TWO[2]])
    assert late["request_throughput"] == near(1 / 0.2)  # to the last chunk of what succeeded


def test_each_tool_takes_percentiles_its_own_way():
    requests = [(float(k), [0.1 * (k + 1), 1.0], 1.0, 10, 2, True) for k in range(10)]
    values = [0.1 * (k + 1) for k in range(10)]
    found = {name: variant(name, rows(requests)) for name in VARIANTS}
    assert found["vllm-bench"]["ttft"].percentiles[90] == pytest.approx(float(np.percentile(values, 90)))
    assert found["guidellm"]["time_to_first_token"].percentiles[90] == pytest.approx(0.9)


def test_weights_move_percentiles():
    values = np.array([1.0, 2.0, 3.0])
    assert by_weight(values, np.array([1.0, 1.0, 8.0]), 0.5) == 3.0
    assert by_weight(values, None, 0.5) == linear(values, None, 0.5) == 2.0


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_served_is_null(name):
    found = variant(name, rows([TWO[2]]), None)
    assert all(f.n == 0 and f.mean is None and set(f.percentiles.values()) == {None} for f in found.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_without_chunks_their_metrics_are_left_out(name):
    full, without = variant(name, rows(TWO), gaps_of(TWO)), variant(name, rows(TWO))
    assert set(without) <= set(full)
    assert not {"itl", "inter_chunk_latency"} & set(without)


def test_a_run_directory_by_their_definitions(tmp_path):
    """Chunks of 2 tokens every 10 ms; the first chunk ends no gap, a failed request counts in none."""
    results = [good(0, ttft_ms=50, itl_ms=10, tokens=4), bad(1, chunks_ms=(10, 50))]
    results[0] = replace(results[0], chunk_tokens=[2, 2, 2, 2], output_tokens=8)
    run = read_run(write_run(tmp_path / "r", results))
    found = variant_of("vllm-bench", run)
    assert found["itl"].n == 3 and found["itl"].mean == pytest.approx(0.01)
    assert found["ttft"].mean == pytest.approx(0.05)
    assert found["request_throughput"].mean == pytest.approx(1 / 0.2)
    found = variant_of("guidellm", run)
    assert found["inter_token_latency"].n == 1 and found["inter_token_latency"].mean == pytest.approx(0.03 / 7)


def test_an_unknown_tool_has_neighbours():
    with pytest.raises(UsageError, match="vllm-bench"):
        variant("vllm-bnch", rows(TWO))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_documented(name):
    """Each metric has its line in the tool's part of the table, with a formula and a source."""
    part = METRICS_MD[METRICS_MD.index(f"| `{name}` (") :].split("\n\n")[0]
    for metric in variant(name, rows(TWO), gaps_of(TWO)):
        line = next(line for line in part.splitlines() if f" | `{metric}` | " in line)
        assert all(cell.strip() for cell in line.split("|")[2:5]), line
