"""Which spans are one call: the same for OpenTelemetry and Langfuse, in whatever order they are written."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.trace import spool
from harness.trace.formats.calls import COPY, SAME, SUM, Span, calls
from harness.trace.formats.record import FailedCallError, Place, TraceRecord
from harness.trace.io import open_trace

BASE_S = 1_790_000_000


@dataclass(frozen=True)
class S:
    """A span, in seconds after `BASE_S`."""

    id: str
    parent: str = ""
    start: float = 0.0
    end: float = 1.0
    tokens: tuple[int | None, int | None] | None = (100, 10)
    """None: no model call."""
    answer: str | None = None
    failed: bool = False
    trace: str = "t"


def iso(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"2026-09-21T14:{int(minutes):02}:{rest:06.3f}Z"


def otel(spans: Sequence[S]) -> str:
    made = []
    for s in spans:
        usage = dict(zip(("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"), s.tokens or (), strict=False))
        named = {"gen_ai.operation.name": "chat", "gen_ai.response.id": s.answer} if s.tokens is not None else {}
        made.append({
            "trace_id": s.trace, "span_id": s.id, "parent_span_id": s.parent or None, "start_time": iso(s.start),
            "end_time": iso(s.end), "status": {"code": 2 if s.failed else 1},
            "attributes": {k: v for k, v in {**named, **usage}.items() if v is not None},
        })  # fmt: skip
    return json.dumps({"trace_id": "t", "spans": made})


def langfuse(spans: Sequence[S]) -> str:
    made = []
    for s in spans:
        usage = dict(zip(("input", "output"), s.tokens or (), strict=False))
        made.append({
            "id": s.id, "traceId": s.trace, "parentObservationId": s.parent or None, "startTime": iso(s.start),
            "endTime": iso(s.end), "type": "SPAN" if s.tokens is None else "GENERATION",
            "level": "ERROR" if s.failed else "DEFAULT", "input": None if s.tokens is None else "x" * 300,
            "usageDetails": {k: v for k, v in usage.items() if v is not None},
            "metadata": {"attributes": {"gen_ai.response.id": s.answer}},
        })  # fmt: skip
    return json.dumps({"data": made})


def found(tmp_path: Path, text: str) -> tuple[list[tuple[int | None, int | None]], dict[str, int]]:
    path = tmp_path / "spans.json"
    path.write_text(text)
    trace = open_trace(path)
    kept = [(r.input_tokens, r.output_tokens) for r in trace]
    assert trace.rows_read == trace.rows_kept + sum(trace.rows_dropped.values())
    return kept, trace.rows_dropped


STEPS = [S(f"c{i}", "root", 1.0 + 6 * i, 5.0 + 6 * i, (200 + 100 * i, 50)) for i in range(3)]
CASES: dict[str, tuple[list[S], list[tuple[int, int]], dict[str, int]]] = {
    "framework around sdk": ([S("a", "", 0, 2, (9, 9)), S("b", "a", 0.1, 1.9)], [(100, 10)], {SAME: 1}),
    "three around each other": (
        [S("a", "", 0, 2, (9, 9)), S("b", "a", 0.1, 1.9, (8, 8)), S("c", "b", 0.2, 1.8)], [(100, 10)], {SAME: 2},
    ),
    "with a span of something else between": (
        [S("a", "", 0, 2, (9, 9)), S("x", "a", 0.1, 1.9, None), S("b", "x", 0.2, 1.8)], [(100, 10)], {SAME: 1},
    ),
    "rounded to milliseconds": ([S("a", "", 0.0004, 2), S("b", "a", 0, 2.0009, (7, 7))], [(7, 7)], {SAME: 1}),
    "a sum over three": ([S("root", "", 0, 20, (900, 150)), *STEPS], [(200, 50), (300, 50), (400, 50)], {SUM: 1}),
    "a sum that names the last answer": (
        [S("root", "", 0, 20, (900, 150), "r2"), *(replace(s, answer=f"r{i}") for i, s in enumerate(STEPS))],
        [(200, 50), (300, 50), (400, 50)], {SAME: 1},
    ),
    "a sum of sums": (
        [S("top", "", 0, 30, (900, 150)), S("root", "top", 0, 20, (900, 150)), *STEPS],
        [(200, 50), (300, 50), (400, 50)], {SUM: 2},
    ),
    "a sum around single calls seen twice": (
        [S("root", "", 0, 20, (900, 150)), *STEPS, *(replace(s, id=f"d{s.id}", parent=s.id) for s in STEPS)],
        [(200, 50), (300, 50), (400, 50)], {SUM: 1, SAME: 3},
    ),
    "the next turn under the one before": (
        [S("a", "", 0, 1, (100, 10)), S("b", "a", 2, 3, (200, 20)), S("c", "b", 4, 5, (300, 30))],
        [(100, 10), (200, 20), (300, 30)], {},
    ),
    "turns under each other within a sum": (
        [S("root", "", 0, 9, (600, 60)), S("a", "root", 0, 1), S("b", "a", 2, 3, (200, 20))],
        [(100, 10), (200, 20)], {SUM: 1},
    ),
    "a follow-up within the time of the first": (
        [S("a", "", 0, 2.5, (150, 200), "r1"), S("tool", "a", 1, 1.8, None), S("b", "a", 2, 2.4, (350, 180), "r2")],
        [(150, 200), (350, 180)], {},
    ),
    "one answer in two traces": (
        [S("a", "", 0, 2, (100, 10), "r1", trace="client"), S("b", "", 0.1, 1.9, (101, 10), "r1", trace="gateway")],
        [(101, 10)], {SAME: 1},
    ),
    "brothers of one answer": (
        [S("p", "", 0, 3, None), S("a", "p", 0, 2, (100, 10), "r1"), S("b", "p", 0.1, 1.9, (101, 10), "r1")],
        [(101, 10)], {SAME: 1},
    ),
    "counts only around the call": ([S("a", "", 0, 2, (100, 10)), S("b", "a", 0.1, 1.9, (100, None))],
                                    [(100, 10)], {SAME: 1}),
    "a failed try within a call": (
        [S("a", "", 0, 5, (100, 10)), S("b", "a", 0, 1, failed=True), S("c", "a", 2, 4, (100, 10))],
        [(100, 10)], {SAME: 1, "failed": 1},
    ),
    "only the failed try was seen": ([S("a", "", 0, 5, (100, 10)), S("b", "a", 0, 1, failed=True)],
                                     [(100, 10)], {SAME: 1}),
    "all failed": ([S("a", "", 0, 5, failed=True), S("b", "a", 0, 1, failed=True), S("z", "", 9, 10)],
                   [(100, 10)], {SAME: 1, "failed": 1}),
    "written twice": ([S("a", "", 0, 1, (100, None)), S("a", "", 0, 1, (100, 10))], [(100, 10)], {COPY: 1}),
    "a ring of parents": ([S("a", "b", 0, 1, (1, 1)), S("b", "a", 0, 1, (2, 2))], [(1, 1), (2, 2)], {}),
    "its own parent": ([S("a", "a", 0, 1, (1, 1))], [(1, 1)], {}),
}  # fmt: skip


@pytest.mark.parametrize("carrier", [otel, langfuse], ids=["otel", "langfuse"])
@pytest.mark.parametrize("case", CASES)
def test_each_call_is_counted_once_in_any_order(tmp_path, case, carrier):
    spans, want, dropped = CASES[case]
    for seed in range(4):
        some = spans[::-1] if seed == 1 else random.Random(seed).sample(spans, len(spans)) if seed else spans
        kept, why = found(tmp_path, carrier(some))
        assert sorted(kept) == sorted(want)
        assert {("failed" if "failed call" in reason else reason): n for reason, n in why.items()} == dropped


@st.composite
def trees(draw: st.DrawFn) -> list[S]:
    """Spans with parents among them, mostly within those, some of another kind, some named."""
    spans: list[S] = []
    for at in range(draw(st.integers(1, 9))):
        parent = draw(st.sampled_from([None, *spans]))
        low, high = (0.0, 50.0) if parent is None or draw(st.booleans()) else (parent.start, parent.end)
        start, end = sorted(low + (high - low) * draw(st.integers(0, 8)) / 8 for _ in range(2))
        spans.append(S(
            f"s{at}", "" if parent is None else parent.id, start, end,
            draw(st.sampled_from([None, (10 + at, 1 + at), (10 + at, None)])),
            draw(st.sampled_from([None, None, "r1", "r2"])), draw(st.integers(0, 5)) == 0,
            draw(st.sampled_from(["t", "t", "u"])),
        ))  # fmt: skip
    return spans


def items(spans: Sequence[S]) -> list[tuple[Place, Span]]:
    made = []
    for at, s in enumerate(spans):
        good = None if s.tokens is None else TraceRecord(round(s.start * 1e9), *s.tokens)
        item = FailedCallError() if good and s.failed else good
        made.append(
            (Place(0, at), Span(s.trace, s.id, s.parent, round(s.start * 1e9), round(s.end * 1e9), s.answer, item))
        )
    return made


def outcome(spans: Sequence[S]) -> list[str]:
    """What comes of each span, by its id."""
    placed = sorted(items(spans), key=lambda each: each[1].trace_id)
    return sorted(f"{spans[place.line].id} {item!r}" for place, item in calls(iter(placed)))


@settings(max_examples=120, deadline=None)
@given(trees(), st.randoms(use_true_random=False))
def test_order_plays_no_part(spans, rng):
    assert outcome(rng.sample(spans, len(spans))) == outcome(spans)


@settings(max_examples=80, deadline=None)
@given(trees())
def test_no_span_and_no_named_answer_is_lost(spans):
    got = list(calls(iter(sorted(items(spans), key=lambda each: each[1].trace_id))))
    models = [s for s in spans if s.tokens is not None]
    assert len(got) == len(models)
    answers = {s.answer for s in models if s.answer and not s.failed}
    assert sum(isinstance(item, TraceRecord) for _, item in got) >= len(answers)


def test_what_does_not_fit_into_memory_comes_out_the_same(tmp_path, monkeypatch):
    spans = [
        replace(s, id=f"{t}{s.id}", parent=s.parent and f"{t}{s.parent}", answer=f"{t}{s.answer}", trace=str(t))
        for t in range(20)
        for s in CASES["a sum that names the last answer"][0]
    ]  # fmt: skip
    random.Random(3).shuffle(spans)
    want = found(tmp_path, otel(spans))
    assert len(want[0]) == 60
    monkeypatch.setattr(spool, "HELD_BYTES", 5000)
    assert found(tmp_path, otel(spans)) == want


def test_many_answered_calls_under_one_span_cost_no_more_each():
    """A span that adds up ten thousands of calls, in one trace: what is carried up the tree is not copied each time."""

    def cpu_s(many: int) -> float:
        row, at = TraceRecord(1, 10, 10), Place(0, 0)
        spans = [(at, Span("t", "root", "", 0, 10**12, None, row))]
        spans += [(at, Span("t", str(i), "root", 10 * i, 10 * i + 5, None, row)) for i in range(many)]
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            assert sum(isinstance(item, TraceRecord) for _, item in calls(iter(spans))) == many
            best = min(best, time.process_time() - began)
        return best

    assert cpu_s(40_000) < 90 * cpu_s(1250), "32 times as many: about 35 times the work, and 250 where it is quadratic"
