"""The mix of a search's probes against the trace's: input, output and cached tokens, pooled over those that decide."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from harness.analysis.capacity.backlog import Demand
from harness.analysis.capacity.crossing import Evidence
from harness.analysis.capacity.search_answer import mixes
from harness.analysis.fidelity.inputs import measured_reuse
from harness.analysis.rows.read import Run
from harness.cli.runner.capacity import window_count
from harness.plan.build import build_plan
from harness.plan.file import PlanInfo, Windows
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec
from harness.record.manifest import RunDir
from harness.trace.io import open_trace
from harness.trace.stats import LengthStats, PrefixStats, TraceStats

VOCABULARY = Vocabulary.from_ids(range(100, 5000))
RATE, TURNS, THINK_S, SESSIONS = 8.0, 5, 2.0, 400
N = 400
PREFIX = PrefixStats(block_tokens=[16], rows=N, hit_rate_blocks=0.5, hit_rate_tokens=0.5, sampled=1)


def length_stats(mean: float) -> LengthStats:
    return LengthStats(rows=N, mean=mean, quantiles=[mean] * 101, part_sd=None)


def source(hit_rate: float = 0.5) -> TraceStats:
    """A mean of 200 input tokens."""
    return TraceStats(
        requests=N, arrivals=None, input_tokens=length_stats(200.0), output_tokens=length_stats(20.0), sessions=0,
        session_rows=0, most_turns=0, unit_rows=1.0, prefix=replace(PREFIX, hit_rate_tokens=hit_rate), grid_s=None,
    )  # fmt: skip


DEMAND = Demand(arrival_s=np.arange(N) / 4.0, input_tokens=np.full(N, 200.0), output_tokens=np.full(N, 20.0))


def probes(inputs: float = 200.0, outputs: float = 20.0, cached: float | None = 100.0) -> list[Evidence]:
    """Five probes whose windows differ by 1 %."""
    found = []
    for k in range(5):
        noise = np.repeat(1 + 0.01 * np.array([-1, 0, 1, 0]), N // 4)
        sent = Demand(arrival_s=np.arange(N) / 4.0, input_tokens=inputs * noise, output_tokens=outputs * noise)
        all_ = np.ones(N, dtype=np.bool_)
        found.append(
            Evidence(
                rate=4.0, sent=sent, measured=all_, kept=(all_,), window=np.arange(N) // (N // 4), unstable=False,
                cached_tokens=None if cached is None else cached * (1 + 0.01 * (k - 2)),
            )
        )  # fmt: skip
    return found


def unfit(found: list[Evidence], hit_rate: float = 0.5, near: float = 4.0) -> list[str]:
    return [mix.kind for mix in mixes(found, near, DEMAND, source(hit_rate)) if not mix.fits]


def test_probes_like_the_trace_pass() -> None:
    assert [mix.kind for mix in mixes(probes(), 4.0, DEMAND, source())] == ["input", "output", "cached"]
    assert unfit(probes()) == []
    assert unfit(probes(inputs=208.0, outputs=19.2, cached=96.0)) == []


@pytest.mark.parametrize(
    ("off", "kind"), [({"inputs": 212.0}, "input"), ({"outputs": 18.8}, "output"), ({"cached": 94.0}, "cached")]
)
def test_six_percent_off_is_too_much(off: dict[str, float], kind: str) -> None:
    assert unfit(probes(**off)) == [kind]


def test_two_points_of_few_cached_tokens_are_allowed() -> None:
    """4 of 200 input tokens are cached: 5 % of them are a fifth of a token. Two points are 4 tokens."""
    assert unfit(probes(cached=7.5), hit_rate=0.02) == []
    assert unfit(probes(cached=8.5), hit_rate=0.02) == ["cached"]


def test_what_is_not_known_is_not_judged() -> None:
    assert [mix.kind for mix in mixes(probes(cached=None), 4.0, DEMAND, source())] == ["input", "output"]
    assert [mix.kind for mix in mixes(probes(), 4.0, DEMAND)] == ["input", "output"]
    assert mixes(probes(), 40.0, DEMAND, source()) == [], "probes far from the crossing do not decide"


def test_the_advice_says_how_long() -> None:
    short = next(mix for mix in mixes(probes(cached=80.0), 4.0, DEMAND, source()) if mix.kind == "cached")
    assert (
        short.advice(5.0) == "windows cut conversations and shared prefixes: probes about 4.0 times as long (--probe)"
    )
    more = next(mix for mix in mixes(probes(inputs=230.0), 4.0, DEMAND) if mix.kind == "input")
    assert more.advice(5.0) == "measure again with another seed"
    assert replace(more, error=10.0).advice(5.0) == "measure about 15 minutes longer"


# --- what a plan's prompts find --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Turns that go on with all that was said: 64, 128 ... 320 tokens, a turn each 2 s."""
    starts = np.cumsum(np.random.default_rng(1).exponential(TURNS / RATE, SESSIONS))
    turns = sorted((float(at) + k * THINK_S, s, k) for s, at in enumerate(starts) for k in range(TURNS))
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    rows = (
        {"arrival_s": round(at, 3), "input_tokens": 64 * (k + 1), "output_tokens": 16, "session_id": f"s{s}", "turn": k}
        for at, s, k in turns
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reuse_of(folder: Path, trace: Path, sessions: str, warmup_s: float) -> tuple[float, PlanInfo]:
    """Share of input tokens that the measured requests of a probe at twice the trace's rate find."""
    folder.mkdir()
    count = window_count(60.0, waits=sessions == "wait")
    spec = PlanSpec(
        closed=False, rate=2 * RATE, duration_s=60.0 + warmup_s, warmup=warmup_s or None, sessions=sessions,
        windows=Windows(count=count, draw=0),
    )  # fmt: skip
    info = build_plan(open_trace(trace), RunDir(folder).plan, spec, VOCABULARY)
    found = measured_reuse(cast(Run, SimpleNamespace(path=folder, manifest=SimpleNamespace(plan=info))))
    assert found is not None and found.prompts == info.requests - info.warmup_requests
    return found.hit_rate, info


def test_sessions_that_wait_find_in_a_probe_what_the_trace_finds(tmp_path: Path, conversations: Path) -> None:
    got, info = reuse_of(tmp_path / "r", conversations, "wait", 9.0)
    assert info.source is not None and info.source.prefix is not None
    ideal = info.source.prefix.hit_rate_tokens
    assert ideal == pytest.approx((64 + 128 + 192 + 256) / (64 * 15))
    assert got == pytest.approx(ideal, rel=0.03)


def test_three_windows_cut_conversations(tmp_path: Path, conversations: Path) -> None:
    """On a clock twice as fast a session is 4 s long, and windows are 23 s."""
    got, info = reuse_of(tmp_path / "r", conversations, "trace", 9.0)
    assert info.source is not None and info.source.prefix is not None
    assert got < 0.97 * info.source.prefix.hit_rate_tokens
