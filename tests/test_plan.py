"""The plan is the trace: its times, its lengths, its text; slices are the plan; equal arguments make equal bytes."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from harness.cli import main
from harness.errors import PlanError, TraceError, UsageError
from harness.plan import batches
from harness.plan import build as build_module
from harness.plan.arrivals import arrival_times, constant_stage, parse_stages
from harness.plan.build import build_plan
from harness.plan.file import (
    INFO_KEY,
    SCHEMA,
    PlanInfo,
    Request,
    iter_requests,
    plan_sha256,
    read_plan_columns,
    read_plan_info,
)
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec
from harness.trace.io import Trace, open_trace

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"
VOCABULARY = Vocabulary.from_ids(range(100, 5000))


def trace_of(tmp_path: Path, *rows: dict, **options: object) -> Trace:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_trace(path, **options)  # type: ignore[arg-type]


def build(trace: Trace, out: Path, *, vocabulary: Vocabulary | None = None, **spec: object) -> PlanInfo:
    return build_plan(trace, out, PlanSpec(**spec), vocabulary)  # type: ignore[arg-type]


def at(*times: float, **fields: object) -> list[dict]:
    return [{"arrival_s": t, "prompt": f"p{i}", **fields} for i, t in enumerate(times)]


def scheduled(path: Path) -> list[int | None]:
    return read_plan_columns(path, ["scheduled_ns"]).column(0).to_pylist()


def sample_text(tmp_path: Path) -> Trace:
    return trace_of(tmp_path, *at(0, 1))


def sample(name: str) -> Trace:
    return open_trace(SAMPLES / name)


# --- times -----------------------------------------------------------------------------------------------------------


def test_open_loop_is_the_traces_own_clock(tmp_path):
    out = tmp_path / "p"
    info = build(sample("azure-conv-2023.csv"), out, closed=False, vocabulary=VOCABULARY)
    times = scheduled(out)
    assert times[:2] == [0, 4_314_579_000]  # 18:15:46.6805900 and 18:15:50.9951690, to the nanosecond
    assert times == sorted(times)
    assert (info.requests, info.rows_read, info.rows_kept, info.rows_dropped) == (600, 600, 600, {})
    assert (info.arrivals, info.speed, info.span_s) == ("trace", 1.0, 148.18913)
    assert info.source_rate == info.planned_rate == pytest.approx(599 / 148.18913, rel=1e-12)
    tokens = read_plan_columns(out, ["input_tokens", "output_tokens"]).to_pydict()
    assert (sum(tokens["input_tokens"]), sum(tokens["output_tokens"])) == (553_386, 156_892)
    for request in iter_requests(out):
        assert len(request.prompt_token_ids) == request.input_tokens


def test_compression_is_named_and_what_it_does_to_the_shape_is_said(tmp_path):
    trace = trace_of(tmp_path, *at(*(i * 2.0 for i in range(60))))
    fast, slow, own = (
        build(trace, tmp_path / f"{i}.plan", closed=False, **spec).notes
        for i, spec in enumerate(({"rate": 2.0}, {"speed": 0.5}, {}))
    )
    assert any(note.startswith("time compression: the trace's clock runs 4 times as fast") for note in fast)
    assert any(note.startswith("shape, trace -> plan: requests/s 0.5 -> 2, variance/mean at 1s") for note in fast)
    assert any("runs 2 times slower" in note for note in slow)
    assert not any("compression" in note for note in own)


def test_speed_multiplies_the_clock(tmp_path):
    info = build(trace_of(tmp_path, *at(7, 8, 10)), tmp_path / "p", closed=False, speed=2)
    assert scheduled(tmp_path / "p") == [0, 500_000_000, 1_500_000_000]
    assert (info.speed, info.source_rate, info.planned_rate, info.span_s) == (2, 2 / 3, 4 / 3, 1.5)


def test_rate_is_gaps_over_span_and_keeps_the_shape(tmp_path):
    info = build(trace_of(tmp_path, *at(0, 1, 1, 4)), tmp_path / "p", closed=False, rate=3.0)
    # Three gaps in 4 s are 0.75 req/s: four times as fast is 3 req/s, and every gap shrinks alike.
    assert scheduled(tmp_path / "p") == [0, 250_000_000, 250_000_000, 1_000_000_000]
    assert (info.source_rate, info.speed, info.planned_rate) == (0.75, 4.0, 3.0)


def test_rate_with_duration_meets_the_rate_inside_the_duration(tmp_path):
    # 10 requests in the first second, then one a second: a part of a trace has not the rate of the whole.
    trace = trace_of(tmp_path, *at(*(i / 10 for i in range(10)), *range(1, 100)))
    info = build(trace, tmp_path / "p", closed=False, rate=2.0, duration_s=10.0)
    assert info.requests == 20
    assert info.planned_rate == pytest.approx(2.0, rel=1e-9)
    assert info.span_s == pytest.approx(9.5)
    assert any("stopped after 20" in note for note in info.notes)
    assert build(trace, tmp_path / "q", closed=False, rate=1.1, duration_s=10.0).requests == 11, "1.1 x 10 is above 11"


def test_duration_cuts_by_planned_time(tmp_path):
    trace = trace_of(tmp_path, *at(0, 1, 2, 3, 4))
    info = build(trace, tmp_path / "p", closed=False, speed=2, duration_s=1.0)
    assert scheduled(tmp_path / "p") == [0, 500_000_000]
    assert info.rows_read == info.rows_kept == 2


def test_a_trace_shorter_than_the_duration_is_noted(tmp_path):
    info = build(trace_of(tmp_path, *at(0, 1, 2)), tmp_path / "p", closed=False, duration_s=60.0)
    assert info.notes[0] == "the trace ends at 2.0 s of the 60 s asked for"
    assert info.notes[1].startswith("3 rows do not say how many tokens")
    assert len(info.notes) == 2


def test_limit_keeps_the_first_rows_and_does_not_read_on(tmp_path):
    trace = trace_of(tmp_path, *at(0, 1, 2), {"never": "read"})
    info = build(trace, tmp_path / "p", closed=False, limit=2)
    assert (info.requests, info.rows_read) == (2, 2)
    with pytest.raises(TraceError):
        build(trace, tmp_path / "q", closed=False, limit=4)
    assert not (tmp_path / "q").exists()


def test_closed_loop_has_no_times(tmp_path):
    info = build(sample("example.jsonl"), tmp_path / "p", closed=True, vocabulary=VOCABULARY)
    assert set(scheduled(tmp_path / "p")) == {None}
    assert (info.arrivals, info.speed, info.planned_rate, info.span_s, info.source_rate) == (
        "closed",
        None,
        None,
        None,
        1.9,
    )
    build(trace_of(tmp_path, {"prompt": "a"}), tmp_path / "q", closed=True)


@given(
    gaps=st.lists(st.integers(0, 10**7), min_size=1, max_size=50),
    speed=st.floats(0.01, 100),
    workers=st.integers(1, 7),
    sessions=st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=51, max_size=51),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_times_scale_and_slices_are_the_plan(tmp_path_factory, gaps, speed, workers, sessions):
    folder = tmp_path_factory.mktemp("p")
    micros = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    rows = [
        {"arrival_s": t / 1e6, "prompt": str(i)} | ({"session_id": s} if s else {})
        for i, (t, s) in enumerate(zip(micros, sessions, strict=False))
    ]
    build(trace_of(folder, *rows), folder / "p", closed=False, speed=speed)
    times = scheduled(folder / "p")
    assert times == sorted(times)
    assert all(abs(t - m * 1000 / speed) <= 1 for t, m in zip(times, micros, strict=True))
    whole = list(iter_requests(folder / "p"))
    assert [r.request_id for r in whole] == list(range(len(rows)))
    parts = [list(iter_requests(folder / "p", k, workers)) for k in range(workers)]
    assert sorted((r for part in parts for r in part), key=lambda r: r.request_id) == whole
    for part in parts:
        assert part == sorted(part, key=lambda r: (r.scheduled_ns, r.request_id))
    for name in "abc":  # a session is on one worker
        at_workers = {k for k, part in enumerate(parts) for r in part if sessions[r.request_id] == name}
        assert len(at_workers) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"closed": True, "speed": 1.0},
        {"closed": True, "rate": 1.0},
        {"closed": False, "speed": 1.0, "rate": 1.0},
        {"closed": True, "duration_s": 1.0},
        {"closed": False, "speed": 0.0},
        {"closed": False, "speed": float("nan")},
        {"closed": False, "rate": -1.0},
        {"closed": False, "rate": float("inf")},
        {"closed": False, "duration_s": 0.0},
        {"closed": False, "limit": 0},
        {"closed": False, "speed": 1e-10},  # 10 s become 3,000 years
        {"closed": False, "rate": 1.0, "limit": 1},
        {"closed": False, "rate": 1.0, "limit": 2},  # two rows at one instant
    ],
)
def test_options_that_cannot_be(tmp_path, options):
    with pytest.raises(UsageError):
        build(trace_of(tmp_path, *at(0, 0, 10)), tmp_path / "p", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.jsonl"]


@pytest.mark.parametrize("options", [{}, {"rate": 2.0}, {"speed": 2.0}])
def test_no_times_no_open_loop(tmp_path, options):
    with pytest.raises(UsageError, match=r"no arrival times.*--concurrency"):
        build(trace_of(tmp_path, {"prompt": "a"}), tmp_path / "p", closed=False, **options)


# --- drawn arrivals --------------------------------------------------------------------------------------------------


def test_drawn_arrivals_change_times_and_nothing_else(tmp_path):
    rows = at(*range(300), session_id="s")
    info = build(trace_of(tmp_path, *rows), tmp_path / "a", closed=False)
    drawn = build(trace_of(tmp_path, *rows), tmp_path / "b", closed=False, arrivals="poisson", rate=5.0, seed=3)
    old, new = list(iter_requests(tmp_path / "a")), list(iter_requests(tmp_path / "b"))
    assert [replace(r, scheduled_ns=0) for r in old] == [replace(r, scheduled_ns=0) for r in new]
    assert scheduled(tmp_path / "b") == arrival_times("poisson", constant_stage(5.0), seed=3, most=300).tolist()
    assert (info.arrivals, info.stages, info.speed) == ("trace", [], 1.0)
    assert (drawn.arrivals, drawn.stages, drawn.speed) == ("poisson", list(constant_stage(5.0)), None)
    assert drawn.source_rate == 1.0
    assert drawn.planned_rate == pytest.approx(5.0, rel=0.25)
    assert read_plan_info(tmp_path / "b") == drawn


def test_a_trace_without_times_can_be_sent_at_drawn_times(tmp_path):
    trace = trace_of(tmp_path, *({"prompt": str(i)} for i in range(9)))
    build(trace, tmp_path / "p", closed=False, arrivals="constant", rate=2.0)
    assert scheduled(tmp_path / "p") == [i * 500_000_000 for i in range(9)]


def test_stages_and_durations_say_how_many(tmp_path):
    trace = trace_of(tmp_path, *at(*range(100)))
    info = build(trace, tmp_path / "a", closed=False, arrivals="constant", stages=parse_stages("2s@10,1s@40"))
    assert (info.requests, info.span_s, info.planned_rate) == (60, pytest.approx(2.975), pytest.approx(59 / 2.975))
    assert [s.rate for s in info.stages] == [10, 40]
    assert build(trace, tmp_path / "b", closed=False, arrivals="constant", rate=8.0, duration_s=2.0).requests == 16
    assert build(trace, tmp_path / "c", closed=False, arrivals="constant", rate=8.0, limit=5).requests == 5
    limited = build(trace, tmp_path / "d", closed=False, arrivals="poisson", rate=8.0, duration_s=2.0, limit=5)
    assert limited.requests == 5


def test_a_trace_that_is_too_short_for_its_stages_is_refused_or_repeated(tmp_path):
    trace = trace_of(tmp_path, *at(*range(50)))
    stages = parse_stages("10s@12")
    with pytest.raises(UsageError, match=r"120 requests .* 10 s .* has 50.*--repeat"):
        build(trace, tmp_path / "p", closed=False, arrivals="constant", stages=stages)
    assert not (tmp_path / "p").exists()
    info = build(trace, tmp_path / "p", closed=False, arrivals="constant", stages=stages, repeat=True)
    assert (info.requests, info.cycles, info.rows_kept) == (120, 3, 50)
    assert [r.prompt_text for r in iter_requests(tmp_path / "p")] == [f"p{i % 50}" for i in range(120)]
    assert any("2.4 times over" in note and "word for word" in note for note in info.notes)


def test_repeated_prompts_are_new_each_time_but_keep_what_they_share(tmp_path):
    rows = [{"input_tokens": 32, "prefix_ids": [7, i], "block_tokens": 16, "session_id": "s"} for i in range(2)]
    info = build(trace_of(tmp_path, *rows), tmp_path / "p", closed=True, limit=6, repeat=True, vocabulary=VOCABULARY)
    requests = list(iter_requests(tmp_path / "p"))
    prompts = [r.prompt_token_ids for r in requests]
    for k in (0, 2, 4):
        assert prompts[k][:16] == prompts[k + 1][:16]
        assert prompts[k][16:] != prompts[k + 1][16:]
    assert len({tuple(p[:16]) for p in prompts}) == 3, "a prefix cache must not know the next pass over the trace"
    assert [r.slice for r in requests] == [0, 0, 1, 1, 2, 2], "nor is it the same session"
    assert any("new each time" in note for note in info.notes)


def test_own_times_repeat_one_mean_gap_after_the_last_row(tmp_path):
    trace = trace_of(tmp_path, *at(0, 1, 4))
    build(trace, tmp_path / "p", closed=False, duration_s=13.0, repeat=True)
    assert [t // 10**9 for t in scheduled(tmp_path / "p")] == [0, 1, 4, 6, 7, 10, 12]
    build(trace, tmp_path / "q", closed=False, limit=5, repeat=True, speed=2.0)
    assert [t / 1e9 for t in scheduled(tmp_path / "q")] == [0, 0.5, 2, 3, 3.5]
    info = build(trace, tmp_path / "r", closed=False, rate=4.0, duration_s=5.0, repeat=True)
    assert (info.requests, info.planned_rate) == (20, pytest.approx(4.0))
    with pytest.raises(UsageError, match="one instant"):
        build(trace_of(tmp_path, *at(3, 3)), tmp_path / "s", closed=False, limit=5, repeat=True)


OPEN_ENDED = (
    "{} rows do not say how many tokens to generate: the server decides (vLLM's completions end after 16 tokens)"
)


def test_chance_is_said(tmp_path):
    trace = trace_of(tmp_path, *at(*range(30)))
    notes = [
        build(trace, tmp_path / str(seed), closed=False, arrivals="poisson", rate=2.0, seed=seed).notes
        for seed in range(20)
    ]
    assert any("chance" in note for each in notes for note in each)
    assert build(trace, tmp_path / "p", closed=False, arrivals="constant", rate=2.0).notes == [OPEN_ENDED.format(30)]


# --- phases, sessions, hang-ups --------------------------------------------------------------------------------------


def phases(path: Path) -> list[str]:
    return read_plan_columns(path, ["phase"]).column(0).to_pylist()


def test_warm_up_is_the_first_requests_or_the_first_time(tmp_path):
    trace = trace_of(tmp_path, *at(0, 1, 2, 3, 4))
    info = build(trace, tmp_path / "a", closed=True, warmup=2)
    assert (phases(tmp_path / "a"), info.warmup_requests) == (["warmup"] * 2 + ["measured"] * 3, 2)
    build(trace, tmp_path / "b", closed=False, warmup=3.0)
    assert phases(tmp_path / "b") == ["warmup"] * 3 + ["measured"] * 2
    build(trace, tmp_path / "c", closed=False, warmup=1.0, speed=2.0)
    assert phases(tmp_path / "c") == ["warmup"] * 2 + ["measured"] * 3, "time of the plan, not of the trace"
    with pytest.raises(UsageError, match="all 5 requests would be warm-up"):
        build(trace, tmp_path / "d", closed=False, warmup=5.0)


def test_turns_wait_for_the_one_before_them(tmp_path):
    rows = [
        {"arrival_s": 0, "prompt": "a", "session_id": "x", "turn": 0},
        {"arrival_s": 1, "prompt": "b", "session_id": "y"},
        {"arrival_s": 2, "prompt": "c", "session_id": "x", "turn": 1, "think_s": 1.5},
        {"arrival_s": 3, "prompt": "d"},
        {"arrival_s": 4, "prompt": "e", "session_id": "x", "turn": 2},
        {"arrival_s": 5, "prompt": "f", "session_id": "y"},
    ]
    for name, sessions in (("alone", "trace"), ("wait", "wait")):
        info = build(trace_of(tmp_path, *rows), tmp_path / name, closed=False, sessions=sessions)
        assert info.sessions == sessions
    alone, wait = (list(iter_requests(tmp_path / name)) for name in ("alone", "wait"))
    assert {(r.after, r.think_ns) for r in alone} == {(None, None)}
    assert [r.after for r in wait] == [None, None, 0, None, 2, 1]
    assert [r.think_ns for r in wait] == [None, None, 1_500_000_000, None, 0, 0]
    assert [r.slice for r in wait] == [r.slice for r in alone] == [0, 1, 0, 2, 0, 1]
    assert [r.scheduled_ns for r in wait] == [r.scheduled_ns for r in alone]
    backwards = [{**row, "turn": 2 - i // 2} if row.get("session_id") == "x" else row for i, row in enumerate(rows)]
    with pytest.raises(PlanError, match=r"jsonl:3: turn 1 of session 'x' comes after its turn 2"):
        build(trace_of(tmp_path, *backwards), tmp_path / "p", closed=False, sessions="wait")


def test_sessions_of_a_steady_pattern_do_not_all_fall_to_one_worker(tmp_path):
    rows = [{"prompt": "a", "session_id": str(i // 2)} for i in range(40)]
    build(trace_of(tmp_path, *rows), tmp_path / "p", closed=True)
    assert [len(list(iter_requests(tmp_path / "p", k, 2))) for k in range(2)] == [20, 20]


def test_hang_ups_are_drawn_per_request_and_the_traces_own_are_kept(tmp_path):
    rows = [{"prompt": "a", "cancel_after_s": 0.25} if i == 5 else {"prompt": "a"} for i in range(2000)]
    info = build(trace_of(tmp_path, *rows), tmp_path / "p", closed=True, cancel=(0.1, 2.0))
    after = [r.cancel_after_ns for r in iter_requests(tmp_path / "p")]
    assert after[5] == 250_000_000
    chosen = [a == 2_000_000_000 for a in after]
    assert sum(chosen) == pytest.approx(200, abs=4 * (2000 * 0.1 * 0.9) ** 0.5)
    assert set(after) == {None, 250_000_000, 2_000_000_000}
    assert [note for note in info.notes if "hang" in note or "hung" in note][1].startswith("1 rows of the trace")
    build(trace_of(tmp_path, *rows[:50]), tmp_path / "q", closed=True, cancel=(0.1, 2.0))
    assert [r.cancel_after_ns for r in iter_requests(tmp_path / "q")] == after[:50], "a longer plan keeps the choice"


def test_the_adapter_of_a_row_is_the_model_it_asks_for(tmp_path):
    rows = [{"prompt": "a", "adapter": name} if name else {"prompt": "a"} for name in ("lora-1", None, "lora-2")]
    info = build(trace_of(tmp_path, *rows), tmp_path / "p", closed=True)
    assert [r.model for r in iter_requests(tmp_path / "p")] == ["lora-1", None, "lora-2"]
    assert any("lora-1, lora-2" in note for note in info.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"closed": True, "arrivals": "poisson"}, "closed loop"),
        ({"closed": True, "stages": parse_stages("1s@1")}, "exclude"),
        ({"closed": True, "warmup": 1.0}, "to the run"),
        ({"closed": True, "repeat": True}, "needs an end"),
        ({"arrivals": "poisson"}, "request rate"),
        ({"arrivals": "poisson", "rate": 1.0, "stages": parse_stages("1s@1")}, "exclude"),
        ({"arrivals": "poisson", "rate": 1.0, "speed": 2.0}, "exclude"),
        ({"arrivals": "poisson", "rate": 1.0, "burstiness": 2.0}, "means nothing"),
        ({"arrivals": "gamma", "rate": 1.0}, "burstiness"),
        ({"arrivals": "gamma", "rate": 1.0, "burstiness": 0.0}, "above 0"),
        ({"stages": parse_stages("1s@1")}, "--arrivals"),
        ({"burstiness": 0.5}, "--arrivals"),
        ({"arrivals": "constant", "stages": parse_stages("1s@1"), "duration_s": 1.0}, "own durations"),
        ({"repeat": True}, "needs an end"),
        ({"cancel": (1.5, 1.0)}, "0 to 1"),
        ({"warmup": 3}, "nothing is left"),
        ({"arrivals": "poisson", "stages": parse_stages("1ms@0.001")}, "not one arrival"),
    ],
)
def test_wishes_that_cannot_be(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        build(trace_of(tmp_path, *at(0, 0, 10)), tmp_path / "p", **{"closed": False, **options})
    assert [p.name for p in tmp_path.iterdir()] == ["trace.jsonl"]


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_vocabulary(tmp_path_factory) -> Vocabulary:
    words = [a + b + c for a in "bdfgklm" for b in "aeiou" for c in "bdfgklmnp"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return Vocabulary.from_tokenizer(path)


def test_every_row_has_one_prompt_and_the_traces_own_text_is_kept(tmp_path, text_vocabulary):
    records = list(sample("example.jsonl"))
    for as_text in (False, True):
        out = tmp_path / f"p{as_text}"
        info = build(sample("example.jsonl"), out, closed=False, vocabulary=text_vocabulary, as_text=as_text)
        assert info.tokenizer == text_vocabulary.name
        for request, record in zip(iter_requests(out), records, strict=True):
            prompts = [request.prompt_token_ids, request.prompt_text, request.messages]
            assert sum(p is not None for p in prompts) == 1
            assert request.output_tokens == record.output_tokens
            if record.text is not None:
                assert (request.prompt_text, request.input_tokens) == (record.text, None)
            elif record.messages is not None:
                assert json.loads(request.messages) == list(record.messages)
                assert request.input_tokens is None
            else:
                length = len(request.prompt_text.split() if as_text else request.prompt_token_ids)
                assert length == request.input_tokens == record.input_tokens


def test_shared_prefixes_of_the_trace_are_shared_tokens(tmp_path):
    build(sample("mooncake-conversation.jsonl"), tmp_path / "p", closed=False, limit=3, vocabulary=VOCABULARY)
    one, two, three = (r.prompt_token_ids for r in iter_requests(tmp_path / "p"))
    # hash_ids 0 1 ..., 0 14 ..., 0 28 ...: the first block is common, the second is not.
    assert one[:512] == two[:512] == three[:512]
    assert one[512:528] != two[512:528] != three[512:528]
    assert (len(one), len(two), len(three)) == (6758, 7322, 7236)


def test_seed_changes_prompts_and_nothing_else(tmp_path):
    plans = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(sample("azure-code-2023.csv"), tmp_path / name, closed=False, seed=seed, vocabulary=VOCABULARY)
        plans[name] = list(iter_requests(tmp_path / name))
    assert plan_sha256(tmp_path / "a") == plan_sha256(tmp_path / "b") != plan_sha256(tmp_path / "c")
    for old, new in zip(plans["a"], plans["c"], strict=True):
        assert old.prompt_token_ids[:8] != new.prompt_token_ids[:8] or old.input_tokens < 8
        assert replace(old, prompt_token_ids=None) == replace(new, prompt_token_ids=None)


def test_limit_rate_and_batch_size_do_not_change_a_prompt(tmp_path, monkeypatch):
    build(sample("azure-code-2023.csv"), tmp_path / "a", closed=False, vocabulary=VOCABULARY)
    monkeypatch.setattr(batches, "_BATCH_ROWS", 7)
    monkeypatch.setattr(batches, "_BATCH_SIZE", 10_000)
    build(sample("azure-code-2023.csv"), tmp_path / "b", closed=False, vocabulary=VOCABULARY, limit=100, rate=50.0)
    for a, b in zip(iter_requests(tmp_path / "a"), iter_requests(tmp_path / "b"), strict=False):
        assert a == replace(b, scheduled_ns=a.scheduled_ns)
    with pa.OSFile(str(tmp_path / "b")) as source:
        assert pa.ipc.open_file(source).num_record_batches > 14
    monkeypatch.setattr(batches, "_BATCH_ROWS", 1000)
    build(sample("azure-code-2023.csv"), tmp_path / "c", closed=False, vocabulary=VOCABULARY, limit=100)
    with pa.OSFile(str(tmp_path / "c")) as source:
        reader = pa.ipc.open_file(source)
        tokens = [sum(reader.get_batch(i).column("input_tokens").to_pylist()) for i in range(reader.num_record_batches)]
    assert len(tokens) > 5 and max(tokens) < 10_000 + 8192, "memory is bounded in tokens as well as in rows"


def test_lengths_need_a_vocabulary_and_text_does_not(tmp_path, text_vocabulary):
    with pytest.raises(PlanError, match=r"trace.jsonl:2: .*tokenizer"):
        build(trace_of(tmp_path, {"prompt": "a"}, {"input_tokens": 5}), tmp_path / "p", closed=True)
    with pytest.raises(PlanError, match="need a tokenizer"):
        build(trace_of(tmp_path, {"input_tokens": 5}), tmp_path / "p", closed=True, vocabulary=VOCABULARY, as_text=True)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.jsonl"]
    info = build(trace_of(tmp_path, {"prompt": "a"}), tmp_path / "p", closed=True, vocabulary=text_vocabulary)
    assert info.tokenizer is None  # it shaped nothing


def test_output_lengths(tmp_path):
    rows = [{"prompt": "a", "output_tokens": n} for n in (5, 500, None)]
    build(trace_of(tmp_path, *rows), tmp_path / "p", closed=True)
    assert [r.output_tokens for r in iter_requests(tmp_path / "p")] == [5, 500, None]


# --- files -----------------------------------------------------------------------------------------------------------


def test_info_is_in_the_file_and_the_books_balance(tmp_path):
    trace = trace_of(
        tmp_path, {"arrival_s": 0, "prompt": "a"}, {"arrival_s": 1, "prompt": "a", "output_tokens": 0},
        {"arrival_s": 0.5}, {"arrival_s": 2, "prompt": "b"}, skip_bad=True,
    )  # fmt: skip
    info = build(trace, tmp_path / "p", closed=False)
    assert read_plan_info(tmp_path / "p") == info
    assert (info.rows_read, info.rows_kept, sum(info.rows_dropped.values())) == (4, 2, 2)
    assert info.trace == "trace.jsonl"
    assert info.notes[2:] == [OPEN_ENDED.format(2)]
    assert next(iter_requests(tmp_path / "p")) == Request(
        request_id=0, phase="measured", scheduled_ns=0, slice=0, after=None, think_ns=None, input_tokens=None,
        output_tokens=None, prompt_token_ids=None, prompt_text="a", messages=None,
    )  # fmt: skip


def test_columns(tmp_path):
    build(sample("azure-code-2023.csv"), tmp_path / "p", closed=False, vocabulary=VOCABULARY)
    assert read_plan_columns(tmp_path / "p", ["output_tokens", "request_id"]).column_names == [
        "output_tokens",
        "request_id",
    ]
    with pytest.raises(UsageError, match="did you mean request_id"):
        read_plan_columns(tmp_path / "p", ["requestid"])
    with pytest.raises(UsageError, match="worker 2 of 2"):
        next(iter_requests(tmp_path / "p", 2, 2))


def test_a_plan_is_never_overwritten(tmp_path):
    out = tmp_path / "p"
    out.write_text("mine")
    with pytest.raises(PlanError, match="never overwritten"):
        build(trace_of(tmp_path, *at(0, 1)), out, closed=False)
    assert out.read_text() == "mine"


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    trace = sample("azure-conv-2023.csv")
    with pytest.raises(PlanError, match="cannot write"):
        build(trace, tmp_path / "none" / "p", closed=False, vocabulary=VOCABULARY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what a full disk looks like
    try:
        with pytest.raises(PlanError, match="cannot write"):
            build(trace, tmp_path / "p", closed=False, vocabulary=VOCABULARY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_shrinks_meanwhile(tmp_path, monkeypatch):
    trace = trace_of(tmp_path, *at(0, 1, 2))
    survey = build_module.survey

    def survey_then_cut(*args, **options):
        found = survey(*args, **options)
        trace_of(tmp_path, *at(0, 1))
        return found

    monkeypatch.setattr(build_module, "survey", survey_then_cut)
    with pytest.raises(PlanError, match="changed while it was read"):
        build(trace, tmp_path / "p", closed=False)
    assert not (tmp_path / "p").exists()


def readers(path: Path) -> list[object]:
    """What reading says, by every way in."""
    ways = (read_plan_info, lambda p: list(iter_requests(p)), lambda p: read_plan_columns(p, ["request_id"]))
    outcomes: list[object] = []
    for way in ways:
        try:
            outcomes.append(way(path))
        except PlanError as e:
            outcomes.append(e)
    return outcomes


def test_files_that_are_no_plans(tmp_path):
    good = tmp_path / "p"
    build(sample("azure-code-2023.csv"), good, closed=False, vocabulary=VOCABULARY)
    whole = good.read_bytes()
    bad = tmp_path / "bad"
    for content in (b"", b"nonsense", whole[:1000], whole[: len(whole) // 2], whole[:-1], whole[:-12] + b"\xff" * 12):
        bad.write_bytes(content)
        assert all(isinstance(outcome, PlanError) for outcome in readers(bad)), content[:20]
    assert all(isinstance(outcome, PlanError) for outcome in readers(tmp_path))
    assert all("no such plan" in str(outcome) for outcome in readers(tmp_path / "none"))
    with pytest.raises(PlanError):
        plan_sha256(tmp_path / "none")


def test_time_limits_of_the_trace_are_in_the_plan(tmp_path):
    rows = [{"prompt": "a", "timeout_s": t} for t in (0.25, None, 1e-12, 1e6)]
    info = build(trace_of(tmp_path, *rows), tmp_path / "p", closed=True)
    assert [r.timeout_ns for r in iter_requests(tmp_path / "p")] == [250_000_000, None, 1, 10**15]
    assert any("3 rows of the trace bring a time limit of their own" in note for note in info.notes)
    assert not any("time limit" in note for note in build(sample_text(tmp_path), tmp_path / "q", closed=True).notes)


@pytest.mark.parametrize("timeout_s", ["0", "-1", "1e7", "NaN", "Infinity", '"5"', "true", "[1]"])
def test_a_time_limit_that_is_none_is_refused_with_its_line(tmp_path, timeout_s):
    path = tmp_path / "trace.jsonl"
    path.write_text(f'{{"prompt": "a", "timeout_s": 2}}\n{{"prompt": "b", "timeout_s": {timeout_s}}}\n')
    with pytest.raises(TraceError, match=r"trace\.jsonl:2"):
        list(open_trace(path))
    assert len(list(open_trace(path, skip_bad=True))) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_time_limits_go_through_the_trace_verbs(tmp_path, capsys, suffix):
    """Convert to each of our formats, then anonymize and sample: none loses one."""
    rows = [{"arrival_s": i, "input_tokens": 5, "output_tokens": 2, "timeout_s": 1.5 + i} for i in range(4)]
    trace = trace_of(tmp_path, *rows, {"arrival_s": 4, "input_tokens": 5, "output_tokens": 2})
    names = [tmp_path / f"{name}{suffix}" for name in ("converted", "anonymous", "sampled")]
    verbs = (["convert"], ["anonymize"], ["sample", "--limit", "5"])
    for verb, source, out in zip(verbs, [trace.path, *names], names, strict=False):
        with pytest.raises(SystemExit) as end:
            main(["trace", verb[0], str(source), "-o", str(out), *verb[1:]])
        assert end.value.code == 0, capsys.readouterr().err
        assert [r.timeout_s for r in open_trace(out)] == [1.5, 2.5, 3.5, 4.5, None]


def test_other_schemas_are_refused(tmp_path):
    path = tmp_path / "p"
    info = build(trace_of(tmp_path, *at(0, 1)), path, closed=False)
    cases = {
        "not a plan": SCHEMA,
        "plan schema 99": SCHEMA.with_metadata({INFO_KEY: msgspec.json.encode(replace(info, schema_version="99"))}),
        "plan schema 1, this harness reads 2; make the plan again": SCHEMA.with_metadata(
            {INFO_KEY: msgspec.json.encode(replace(info, schema_version="1"))}
        ),
        "damaged plan description": SCHEMA.with_metadata({INFO_KEY: b'{"schema_version": "2"}'}),
        "columns are not those": pa.schema(
            [pa.field("request_id", pa.string())], {INFO_KEY: msgspec.json.encode(info)}
        ),
    }
    for words, schema in cases.items():
        with pa.OSFile(str(path), "wb") as sink:
            pa.ipc.new_file(sink, schema).close()
        assert all(words in str(outcome) for outcome in readers(path)), words


def test_a_flipped_byte_is_a_plan_error_or_harmless(tmp_path):
    good = tmp_path / "p"
    build(sample("azure-code-2023.csv"), good, closed=False, vocabulary=VOCABULARY, limit=20)
    whole = good.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 400)):
        bad = bytearray(whole)
        bad[position] ^= 0xFF
        good.write_bytes(bytes(bad))
        readers(good)  # must not raise anything but PlanError, nor crash


def test_rows_that_leave_the_length_to_the_server_are_said(tmp_path):
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt": "a"}\n{"arrival_s": 1, "prompt": "b", "output_tokens": 4}\n')
    info = build_plan(open_trace(trace), tmp_path / "p.arrow", PlanSpec(closed=False))
    assert [note for note in info.notes if note.startswith("1 rows do not say")]
