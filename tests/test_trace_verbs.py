"""What the trace verbs say and write, against slow and simple reckonings of the same."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import trace_record
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from harness.cli.trace import trace as verbs
from harness.errors import HarnessError, TraceError, UsageError
from harness.plan.tokenizers import load_tokenizer
from harness.trace import prefix as prefix_module
from harness.trace.edit import Selection, anonymize, count_tokens, sample, write_trace
from harness.trace.io import TraceRecord, open_trace
from harness.trace.shape import described, measure
from harness.trace.synth import daily, drawn_apart, parse_arrivals, parse_lengths, read_servegen, synthesize

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "scenarios" / "traces"


def run(*args: object) -> Result:
    return CliRunner().invoke(verbs, [str(a) for a in args])


def ok(*args: object) -> Result:
    result = run(*args)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def refused(*args: object) -> str:
    result = run(*args)
    assert result.exit_code != 0
    return str(result.exception) if isinstance(result.exception, HarnessError) else result.output


def without_line(record: TraceRecord) -> tuple[object, ...]:
    return record._replace(line=0)


# --- shape -----------------------------------------------------------------------------------------------------------


def slow_burstiness(times: list[float], window: int) -> float | None:
    windows = int((times[-1] - times[0]) // window)
    if windows < 10:
        return None
    counts = Counter(int((t - times[0]) // window) for t in times)
    values = [counts[i] for i in range(windows)]
    mean = sum(values) / windows
    return sum((v - mean) ** 2 for v in values) / windows / mean


def slow_prefix(records: list[TraceRecord]) -> tuple[int, int, int, int]:
    seen: set[tuple[int, ...]] = set()
    blocks = hits = tokens = hit_tokens = 0
    for record in records:
        for i in range(len(record.prefix_ids)):
            size = min(record.block_tokens, record.input_tokens - i * record.block_tokens)
            blocks, tokens = blocks + 1, tokens + size
            key = (record.block_tokens, *record.prefix_ids[: i + 1])
            if key in seen:
                hits, hit_tokens = hits + 1, hit_tokens + size
            seen.add(key)
    return blocks, hits, tokens, hit_tokens


@pytest.mark.parametrize(
    "name", ["azure-code-2023.csv", "azure-conv-2023.csv", "mooncake-conversation.jsonl", "burstgpt-v1.csv"]
)
def test_burstiness_and_worst_windows(name):
    records = list(open_trace(SAMPLES / name))
    times = [r.arrival_s for r in records]
    shape = measure(records)
    for window in (1, 10, 60):
        want = slow_burstiness(times, window)
        assert shape.burstiness[f"{window}s"] == (None if want is None else pytest.approx(want))
    rate = (len(times) - 1) / (times[-1] - times[0])
    assert shape.mean_rate == pytest.approx(rate)
    worst = max(sum(t <= u < t + 60 for u in times) for t in times)
    assert shape.worst_minute["requests"] == worst
    assert shape.worst_minute["ratio_to_mean"] == pytest.approx(worst / rate / 60)


def test_golden_figures_of_the_samples():
    """Pinned; each was once computed from the rows with the csv module alone."""
    code = measure(open_trace(SAMPLES / "azure-code-2023.csv"))
    assert code.burstiness == {"1s": pytest.approx(13.090169), "10s": pytest.approx(71.330087), "60s": None}
    assert (code.worst_second["requests"], code.worst_minute["requests"]) == (33, 237)
    conv = measure(open_trace(SAMPLES / "azure-conv-2023.csv"))
    assert conv.burstiness == {"1s": pytest.approx(1.400115), "10s": pytest.approx(3.911460), "60s": None}
    assert (conv.worst_second["requests"], conv.worst_minute["requests"]) == (12, 289)
    mooncake = measure(open_trace(SAMPLES / "mooncake-conversation.jsonl"))
    assert (mooncake.prefix.blocks, mooncake.prefix.hit_blocks) == (5537, 322)
    assert (mooncake.prefix.tokens, mooncake.prefix.hit_tokens) == (2_782_179, 164_864)
    assert (mooncake.instants, mooncake.rows) == (25, 200)
    ragpulse = measure(open_trace(SAMPLES / "ragpulse" / "0_trace.jsonl", part=1))
    assert ragpulse.prefix.hit_rate_blocks == pytest.approx(0.301934, abs=1e-6)


@pytest.mark.parametrize("name", ["mooncake-conversation.jsonl", "bailian-constructed.jsonl", "vllm-requests.log"])
@pytest.mark.parametrize("batch", [1, 1000, 2**20])
def test_ideal_prefix_hit(monkeypatch, name, batch):
    monkeypatch.setattr(prefix_module, "_BATCH_BLOCKS", batch)
    records = list(open_trace(SAMPLES / name))
    found = measure(records).prefix
    want = slow_prefix([r for r in records if r.prefix_ids])
    assert (found.blocks, found.hit_blocks, found.tokens, found.hit_tokens, found.sampled) == (*want, 1)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
            st.sampled_from([1, 4, 16]),
            st.integers(0, 15),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_prefix_hits_count_leading_runs_only(requests):
    records = [
        trace_record(1, None, max(1, len(ids) * size - min(cut, size - 1)), 1, prefix_ids=tuple(ids), block_tokens=size)
        for ids, size, cut in requests
    ]
    found = measure(records).prefix
    assert (found.blocks, found.hit_blocks, found.tokens, found.hit_tokens) == slow_prefix(records)


def test_prefix_is_estimated_when_blocks_are_too_many(monkeypatch):
    rng = random.Random(2)
    records = []
    for _ in range(4000):
        head = rng.choice([0, 1, 2, 3])
        ids = tuple([head * 100 + i for i in range(10)] + [rng.getrandbits(60) for _ in range(10)])
        records.append(trace_record(1, None, 20 * 16, 1, prefix_ids=ids, block_tokens=16))
    exact = measure(records).prefix
    monkeypatch.setattr(prefix_module, "MAX_BLOCKS", 4096)
    monkeypatch.setattr(prefix_module, "_BATCH_BLOCKS", 2000)
    rough = measure(records).prefix
    assert exact.sampled == 1 < rough.sampled
    assert rough.hit_rate_blocks == pytest.approx(exact.hit_rate_blocks, abs=0.03)
    assert exact.hit_rate_blocks == pytest.approx(0.5, abs=0.001)


def test_sessions_quantiles_and_correlation():
    rng = np.random.default_rng(1)
    records = []
    for i in range(500):
        session = None if i % 5 == 0 else f"s{i % 7}"
        into = int(rng.integers(1, 1000))
        records.append(trace_record(i, i * 0.5, into, 2 * into, session_id=session))
    shape = measure(records)
    assert (shape.sessions.sessions, shape.sessions.rows) == (7, 400)
    per_session = Counter(r.session_id for r in records if r.session_id)
    assert shape.sessions.turns_max == max(per_session.values())
    gaps = [
        b - a
        for s in per_session
        for a, b in zip(
            [r.arrival_s for r in records if r.session_id == s],
            [r.arrival_s for r in records if r.session_id == s][1:],
            strict=False,
        )
    ]
    assert shape.sessions.gap_quantiles_s["p50"] == pytest.approx(float(np.quantile(gaps, 0.5)))
    assert shape.rank_correlation == pytest.approx(1.0)
    assert shape.input_tokens.quantiles["p90"] == pytest.approx(
        float(np.quantile([r.input_tokens for r in records], 0.9))
    )
    assert sum(shape.input_tokens.histogram.values()) == 500
    falling = measure([trace_record(i, None, i + 1, 600 - i) for i in range(500)])
    assert falling.rank_correlation == pytest.approx(-1.0)
    assert (falling.span_s, falling.mean_rate, falling.rate_over_time) == (None, None, None)


def test_rate_over_time_adds_up():
    shape = measure(open_trace(SAMPLES / "azure-conv-2023.csv"))
    width = shape.span_s / len(shape.rate_over_time["rate"])
    assert sum(shape.rate_over_time["rate"]) * width == pytest.approx(600)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 2**24), st.integers(1, 2**24)), min_size=1, max_size=40),
    st.booleans(),
)
def test_any_trace_can_be_described(rows, timed):
    rows.sort()
    records = [trace_record(1, t if timed else None, i, o) for t, i, o in rows]
    trace = SimpleNamespace(
        sources=SimpleNamespace(name="f"), format="x", rows_read=1, rows_kept=1, rows_dropped={}, rows_failed=0,
        examples={}, clock="x in seconds" if timed else None, blocks=None, grid_s=None, notes=[],
    )  # fmt: skip
    assert described(trace, measure(records))


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(SAMPLES.glob("*.*")) if p.suffix in (".csv", ".jsonl", ".json", ".log")],
    ids=lambda p: p.name,
)
def test_inspect_every_sample(path):
    facts = json.loads(ok("inspect", path, "--format", "json").stdout)
    assert facts["rows_read"] == facts["rows_kept"] + sum(facts["rows_dropped"].values())
    assert facts["rows_failed"] == sum(n for why, n in facts["rows_dropped"].items() if "failed call" in why)
    assert (facts["clock"] is None) is (facts["span_s"] is None)
    assert (facts["blocks"] is not None) or facts["prefix"] is None or facts["prefix"]["continued_turns"] is not None
    assert {
        "format",
        "span_s",
        "mean_rate",
        "burstiness",
        "input_tokens",
        "sessions",
        "prefix",
        "notes",
    } <= facts.keys()
    text = ok("inspect", path).stdout
    assert f": {facts['format']}\n" in text
    assert f"{facts['rows_read']} read, {facts['rows_kept']} kept" in text


def test_inspect_standard_input_and_a_terminal_of_ascii():
    code = (
        "from harness.cli import cli, main\nfrom harness.cli.trace import trace\n"
        "'trace' in cli.commands or cli.add_command(trace)\nmain(['trace', 'inspect', '-'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=(SAMPLES / "azure-conv-2023.csv").read_bytes(),
        capture_output=True, timeout=60, check=False, env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"<stdin>: azure\nrows      600 read, 600 kept\n" in done.stdout


def test_inspect_finds_the_prefixes_of_text(tmp_path, tokenizer):
    rows = [{"prompt": "one two three four " * 8 + tail} for tail in ("five", "six", "seven")]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    facts = json.loads(ok("inspect", path, "--format", "json").stdout)
    assert facts["prefix"] is None
    facts = json.loads(ok("inspect", path, "--format", "json", "--tokenizer", tokenizer, "--block-tokens", "8").stdout)
    assert (facts["prefix"]["blocks"], facts["prefix"]["hit_blocks"]) == (15, 8)
    assert facts["input_tokens"]["quantiles"]["p50"] == 33


# --- convert ---------------------------------------------------------------------------------------------------------

CONVERTED = [
    "azure-code-2023.csv", "bailian-constructed.jsonl", "burstgpt-v3.csv", "example.jsonl", "langfuse-constructed.json",
    "litellm-spend-constructed.csv", "mooncake-conversation.jsonl", "openai-batch-constructed.jsonl",
    "otel-genai-constructed.jsonl", "sharegpt-constructed.json", "vllm-requests.log",
]  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_converted_is_the_same_trace(tmp_path, name, suffix):
    out = tmp_path / f"t{suffix}"
    result = ok("convert", SAMPLES / name, "-o", out)
    assert result.stdout == f"{out}\n"
    want = list(map(without_line, open_trace(SAMPLES / name)))
    assert list(map(without_line, open_trace(out))) == want
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_convert_is_repeatable_and_overwrites_nothing(tmp_path):
    a, b = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    ok("convert", SAMPLES / "example.jsonl", "-o", a)
    ok("convert", SAMPLES / "example.jsonl", "-o", b)
    assert a.read_bytes() == b.read_bytes()
    assert "exists already" in refused("convert", SAMPLES / "example.jsonl", "-o", a)
    assert "must end in" in refused("convert", SAMPLES / "example.jsonl", "-o", tmp_path / "t.csv")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert "bad.jsonl:2:" in refused("convert", bad, "-o", tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()
    assert "cannot write" in refused("convert", SAMPLES / "example.jsonl", "-o", tmp_path / "no" / "t.jsonl")


def test_convert_states_lengths_for_a_log_that_has_none(tmp_path):
    out = tmp_path / "t.jsonl"
    log = SAMPLES / "nginx-constructed.log"
    assert "State the lengths" in refused("convert", log, "-o", out)
    assert "go together" in refused("convert", log, "-o", out, "--input-tokens", "5")
    ok("convert", log, "-o", out, "--input-tokens", "lognormal:mean=500,cv=1", "--output-tokens", "64", "--seed", "1")
    records = list(open_trace(out))
    assert len(records) == 25
    assert {r.output_tokens for r in records} == {64}


def test_convert_counts_tokens_of_text(tmp_path, tokenizer):
    out = tmp_path / "t.jsonl"
    ok("convert", SAMPLES / "sharegpt-constructed.json", "-o", out, "--tokenizer", tokenizer)
    for record in open_trace(out):
        words = sum(len(m["content"].split()) + 1 for m in record.messages)
        assert record.input_tokens == words
        assert record.output_tokens == (len(record.answer.split()) if record.answer else None)


def test_convert_picks_a_part(tmp_path):
    out = tmp_path / "t.jsonl"
    ok("convert", SAMPLES / "ragpulse" / "0_trace.jsonl", "--part", "2", "-o", out)
    assert len(list(open_trace(out))) == 20


# --- sample ----------------------------------------------------------------------------------------------------------


def trace_of(tmp_path: Path, rows: list[dict[str, object]]):
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_trace(path)


def chatty(n: int, seed: int = 0) -> list[dict[str, object]]:
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for i in range(n):
        row: dict[str, object] = {"arrival_s": i * 1.0, "input_tokens": i + 1, "output_tokens": 1}
        if rng.random() < 0.8:
            row["session_id"] = f"s{rng.randrange(n // 4)}"
        rows.append(row)
    return rows


def split(records: list[TraceRecord], whole: list[TraceRecord]) -> set[str]:
    """Sessions that lost some of their turns."""
    kept, all_ = (Counter(r.session_id for r in some if r.session_id) for some in (records, whole))
    return {s for s in kept if kept[s] != all_[s]}


@pytest.mark.parametrize(
    "how",
    [
        Selection(window_s=(20, 60)),
        Selection(limit=37),
        Selection(thin=0.3),
        Selection(window_s=(0, 90), thin=0.5, limit=20),
    ],
)
def test_sessions_stay_whole(tmp_path, how):
    trace = trace_of(tmp_path, chatty(120))
    whole = list(trace)
    kept = list(sample(trace, how))
    assert kept
    assert split(kept, whole) == set()
    assert [r.line for r in kept] == sorted(r.line for r in kept)
    assert set(kept) < set(whole)
    if how.limit:
        assert len(kept) <= how.limit


def test_a_window_takes_what_begins_in_it(tmp_path):
    trace = trace_of(tmp_path, chatty(120))
    first = {}
    for record in trace:
        first.setdefault(record.session_id, record.arrival_s)
    want = [r for r in trace if 20 <= (r.arrival_s if r.session_id is None else first[r.session_id]) < 60]
    assert list(sample(trace, Selection(window_s=(20, 60)))) == want
    cut = list(sample(trace, Selection(window_s=(20, 60), cut_sessions=True)))
    assert [r.arrival_s for r in cut] == [float(t) for t in range(20, 60)]
    assert len(list(sample(trace, Selection(limit=10, cut_sessions=True)))) == 10


def test_thinning_keeps_its_share_and_its_choice(tmp_path):
    trace = trace_of(tmp_path, [{"arrival_s": i / 10, "input_tokens": 5} for i in range(20_000)])
    kept = [r.line for r in sample(trace, Selection(thin=0.1, seed=7))]
    assert len(kept) == pytest.approx(2000, abs=5 * math.sqrt(1800))
    assert kept == [r.line for r in sample(trace, Selection(thin=0.1, seed=7))]
    assert kept != [r.line for r in sample(trace, Selection(thin=0.1, seed=8))]
    assert set(kept) < {r.line for r in sample(trace, Selection(thin=0.2, seed=7))}, "thinner is a part of thicker"
    thirds = Counter((line - 1) * 3 // 20_000 for line in kept)
    assert all(count == pytest.approx(667, abs=130) for count in thirds.values()), "evenly over time"


def test_sample_command_keeps_a_window(tmp_path):
    out = tmp_path / "t.jsonl"
    result = ok("sample", SAMPLES / "azure-conv-2023.csv", "--window", "30s:90s", "-o", out)
    assert "600 rows read (azure)" in result.stderr
    records = list(open_trace(out))
    assert records[0].arrival_s == 0.0
    assert records[-1].arrival_s < 60
    whole = list(open_trace(SAMPLES / "azure-conv-2023.csv"))
    assert len(records) == sum(30 <= r.arrival_s < 90 for r in whole)


def test_sample_refusals(tmp_path):
    azure, out = SAMPLES / "azure-conv-2023.csv", tmp_path / "t.jsonl"
    assert "say what to keep" in refused("sample", azure, "-o", out)
    assert "no request is left" in refused("sample", azure, "-o", out, "--window", "1h:2h")
    assert "is not a window" in refused("sample", azure, "-o", out, "--window", "20m:10m")
    assert "is not a window" in refused("sample", azure, "-o", out, "--window", "20m")
    assert "--thin" in refused("sample", azure, "-o", out, "--thin", "0")
    assert "no times" in refused("sample", SAMPLES / "sharegpt-constructed.json", "-o", out, "--window", "0:5")
    assert not out.exists()
    long = trace_of(tmp_path, [{"input_tokens": 1, "session_id": "s"} for _ in range(3)])
    with pytest.raises(TraceError, match="first session has 3 requests"):
        list(sample(long, Selection(limit=2)))


# --- synth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mean", "cv"),
    [
        ("constant:128", 128, 0),
        ("64", 64, 0),
        ("uniform:low=10,high=30", 20, 10 / math.sqrt(3) / 20),
        ("exponential:mean=50", 50, 1),
        ("exponential:50", 50, 1),
        ("lognormal:mean=800,cv=1.2", 800, 1.2),
        ("gamma:mean=800,cv=0.5", 800, 0.5),
        ("gamma:mean=800,cv=0", 800, 0),
        ("weibull:mean=100,shape=0.7", 100, 1.4624),
    ],
)
def test_distributions_have_the_mean_and_spread_they_name(text, mean, cv):
    drawn = parse_lengths(text).draw(np.random.default_rng(0), 400_000)
    assert drawn.mean() == pytest.approx(mean, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)
    assert str(parse_lengths(str(parse_lengths(text)))) == str(parse_lengths(text))


@pytest.mark.parametrize(
    "text",
    ["", "normal:mean=5", "lognormal", "lognormal:mean=5", "lognormal:mean=-5,cv=1", "constant:0", "constant:nan", "-3",
     "uniform:low=9,high=2", "weibull:mean=5,shape=0.001", "constant:1e9", "lognormal:mean=5,mean=6,cv=1", "gamma:5"],
)  # fmt: skip
def test_bad_distributions_are_refused(text):
    with pytest.raises(UsageError):
        parse_lengths(text)


@pytest.mark.parametrize(
    ("arrivals", "burst"), [("poisson", 1), ("constant", 0), ("gamma:cv=2", 4), ("weibull:shape=1", 1)]
)
def test_synthetic_arrivals_have_rate_and_burstiness(arrivals, burst):
    # For windows much longer than a gap, variance / mean of counts tends to the squared cv of the gaps.
    records = synthesize(
        gaps=parse_arrivals(arrivals, 20.0), lengths=drawn_apart(parse_lengths("100"), parse_lengths("5")),
        requests=200_000, duration_s=None, seed=3,
    )  # fmt: skip
    shape = measure(records)
    assert shape.rows == 200_000
    assert shape.mean_rate == pytest.approx(20, rel=0.03)
    assert shape.burstiness["10s"] == pytest.approx(burst, rel=0.15, abs=0.02)


def test_synth_command(tmp_path):
    common = ("--rate", "8", "--input-tokens", "lognormal:mean=90,cv=1", "--output-tokens", "20", "--seed", "5")
    for name in ("a", "b"):
        ok("synth", *common, "--duration", "100", "-o", tmp_path / f"{name}.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    records = list(open_trace(tmp_path / "a.jsonl"))
    assert records[0].arrival_s == 0.0
    assert 95 < records[-1].arrival_s < 100
    assert len(records) == pytest.approx(800, abs=150)
    ok("synth", *common, "--requests", "7", "-o", tmp_path / "c.jsonl")
    assert len(list(open_trace(tmp_path / "c.jsonl"))) == 7
    assert "--requests or --duration" in refused("synth", *common, "-o", tmp_path / "d.jsonl")
    assert "--output-tokens" in refused("synth", "--rate", "1", "--input-tokens", "5", "-o", tmp_path / "d.jsonl")
    assert "poisson" in refused("synth", *common, "--arrivals", "poison", "--requests", "1", "-o", tmp_path / "d.jsonl")


def test_a_day_has_the_lengths_of_a_trace_and_its_busiest_hour(tmp_path):
    day, like = tmp_path / "day.jsonl", SAMPLES / "azure-conv-2023.csv"
    ok("synth", "--like", like, "--rate", "0.5", "--peak", "1.6", "--duration", "24h", "-o", day)
    records = list(open_trace(day))
    assert len(records) == pytest.approx(43_200, rel=0.02)
    hours = np.histogram([one.arrival_s / 3600 for one in records], 24, (0, 24))[0] / 1800
    assert hours[15:17].mean() == pytest.approx(1.6, rel=0.06) and hours[3:5].mean() == pytest.approx(0.4, rel=0.12)
    known = {(one.input_tokens, one.output_tokens) for one in open_trace(like)}
    assert {(one.input_tokens, one.output_tokens) for one in records} <= known, "input goes with its own output"
    assert "comes from the trace" in refused("synth", "--like", like, "--rate", "1", "--input-tokens", "5",
                                             "--requests", "1", "-o", tmp_path / "e.jsonl")  # fmt: skip
    with pytest.raises(UsageError, match="from 1 to 2"):
        daily(2.1)
    steady = np.linspace(0, 3 * 86_400, 5000)
    assert (np.diff(daily(2.0)(steady)) > 0).all() and daily(2.0)(steady)[-1] == pytest.approx(3 * 86_400)


def test_servegen_rate_lengths_and_seed():
    model = read_servegen(SAMPLES / "servegen")
    assert len(model.clients) == 2
    assert model.span_s == (0.0, 86_400.0)
    windows = [w for ws, _ in model.clients.values() for w in ws]
    expected = sum(w.rate * 600 for w in windows)
    counts = [sum(1 for _ in model.draw(0, 86_400, seed)) for seed in range(10)]
    # A stationary process has exactly the windows' rate in the mean; bursts (cv 2 to 5) widen the spread.
    assert np.mean(counts) == pytest.approx(expected, abs=5 * np.std(counts) / math.sqrt(10) + 1)
    records = list(model.draw(0, 21_600, 1))
    assert [without_line(r) for r in records] == [
        without_line(r) for r in read_servegen(SAMPLES / "servegen").draw(0, 21_600, 1)
    ]
    assert [r.arrival_s for r in records] == sorted(r.arrival_s for r in records)
    # Only the image client is awake then: text (mean 75.58) and image tokens (238.34) add up.
    assert np.mean([r.input_tokens for r in records]) == pytest.approx(75.58 + 238.34, rel=0.03)
    assert np.mean([r.output_tokens for r in records]) == pytest.approx(185.62, rel=0.1)


def test_servegen_command_and_bad_models(tmp_path):
    out = tmp_path / "t.jsonl"
    folder = SAMPLES / "servegen"
    assert "say how much of it" in refused("synth", "--servegen", folder, "-o", out)
    assert "comes from the model" in refused("synth", "--servegen", folder, "--rate", "3", "--duration", "9", "-o", out)
    ok("synth", "--servegen", folder, "--window", "1h:2h", "-o", out)
    assert open_trace(out).format == "jsonl"
    pair = next(folder.glob("multi*-trace.csv.gz"))
    ok("synth", "--servegen", pair, "--requests", "9", "-o", tmp_path / "nine.jsonl")
    assert "harness trace synth --servegen" in refused("inspect", pair)
    assert "no ServeGen client" in refused(
        "synth", "--servegen", tmp_path, "--requests", "1", "-o", tmp_path / "u.jsonl"
    )
    (tmp_path / "a-trace.csv").write_text("0,1,1,Gamma,1,1\n600,1,1,Gamma,1,1\n")
    args = ("synth", "--servegen", tmp_path, "--requests", "1", "-o", tmp_path / "u.jsonl")
    assert "a pair" in refused(*args)
    for lengths, words in (
        ('{"0": {"input_tokens": "{1: 1.0}", "output_tokens": "__import__(1)"}}', "not the lengths"),
        ('{"0": {"input_tokens": "{1: 0.5}", "output_tokens": "{1: 1.0}"}}', "add up to 0.5"),
        ('{"0": {"input_tokens": "{-1: 1.0}", "output_tokens": "{1: 1.0}"}}', "negative"),
        ('{"0": {"input_tokens": "' + "(" * 5000 + '", "output_tokens": "{1: 1.0}"}}', "not the lengths"),
        ("[]", "not the lengths"),
    ):
        (tmp_path / "a-dataset.json").write_text(lengths)
        assert words in refused(*args)
    (tmp_path / "a-dataset.json").write_text('{"0": {"input_tokens": "{1: 1.0}", "output_tokens": "{1: 1.0}"}}')
    for windows, words in (
        ("0,1,1,Gamma,1,1\n", "fewer than two windows"),
        ("0,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n", "a-trace.csv:2:"),
        ("0,nan,1,Gamma,1,1\n600,1,1,Gamma,1,1\n", "not a window"),
        ("0,1,1,Pareto,1,1\n600,1,1,Gamma,1,1\n", "not a window"),
        ("start,rate\n", "a-trace.csv:1: expected"),
    ):
        (tmp_path / "a-trace.csv").write_text(windows)
        assert words in refused(*args)


# --- anonymize -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    """Splits at spaces; unknown words get ids by chance of their letters, so that different words differ."""
    vocabulary = {chr(i): i for i in range(32, 127)} | {"[UNK]": 0}
    made = Tokenizer(models.WordLevel(vocabulary | {w: 200 + i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


WORDS = ["one", "two", "three", "four", "five", "six", "seven"] + [f"secretword{i}" for i in range(200)]
SALT = bytes(range(32))

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=80).map(" ".join)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"arrival_s": st.floats(0, 1e6), "session_id": texts | st.none(), "answer": texts | st.none()},
            optional={"output_tokens": st.integers(1, 50)},
        ).flatmap(
            lambda row: st.one_of(
                texts.map(lambda t: row | {"prompt": t}), messages.map(lambda m: row | {"messages": m})
            )
        ),
        min_size=1,
        max_size=12,
    )
)
def test_no_word_survives(tmp_path_factory, tokenizer, rows):
    folder = tmp_path_factory.mktemp("private")
    rows.sort(key=lambda row: row["arrival_s"])
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok("anonymize", folder / "in.jsonl", "--tokenizer", tokenizer, "-o", folder / "out.jsonl")
    text = (folder / "out.jsonl").read_text()
    assert not re.search(r"secretword|seven|three|prompt\"|content|answer", text)
    out = list(open_trace(folder / "out.jsonl"))
    assert len(out) == len(rows)
    first = rows[0]["arrival_s"]
    for row, record in zip(rows, out, strict=True):
        assert record.arrival_s == pytest.approx(row["arrival_s"] - first, abs=1e-6)
        said = row.get("prompt") or " ".join(f"{m['role']} {m['content']}" for m in row["messages"])
        assert record.input_tokens == len(said.split())
        answered = len(row["answer"].split()) if row["answer"] else None
        assert record.output_tokens == row.get("output_tokens", answered)
    names = {}
    assert [r.session_id for r in out] == [
        None if r["session_id"] is None else names.setdefault(r["session_id"], f"session-{len(names) + 1}")
        for r in rows
    ]


def leading(a: tuple[object, ...], b: tuple[object, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    st.lists(st.lists(st.sampled_from(WORDS[:3]), min_size=1, max_size=40), min_size=2, max_size=6), st.integers(1, 9)
)
def test_blocks_are_shared_as_far_as_the_text_is(tokenizer, prompts, size):
    records = [trace_record(1, None, None, None, text=" ".join(p)) for p in prompts]
    out = list(anonymize(records, salt=SALT, tokenizer=load_tokenizer(tokenizer), block_tokens=size))
    assert len(out) == len(prompts)
    for a, b in itertools.pairwise(range(len(out))):
        same = leading(tuple(prompts[a]), tuple(prompts[b]))
        whole = same // size + (prompts[a] == prompts[b] and len(prompts[a]) % size > 0)
        assert leading(out[a].prefix_ids, out[b].prefix_ids) == whole


def test_counts_of_the_source_stay_and_template_tokens_are_nobodys(tokenizer):
    text = "one two three four five six seven one two"
    records = [trace_record(i, None, n, 3, text=text) for i, n in enumerate((12, 12, 9, 5))]
    a, b, c, d = anonymize(records, salt=SALT, tokenizer=load_tokenizer(tokenizer), block_tokens=4)
    assert [r.input_tokens for r in (a, b, c, d)] == [12, 12, 9, 5]
    assert [len(r.prefix_ids) for r in (a, b, c, d)] == [3, 3, 3, 2]
    assert leading(a.prefix_ids, b.prefix_ids) == leading(a.prefix_ids, c.prefix_ids) == 2
    assert leading(a.prefix_ids, d.prefix_ids) == 1


def test_prefix_ids_are_keyed_and_reuse_is_the_same():
    records = list(open_trace(SAMPLES / "mooncake-conversation.jsonl"))
    out, other = (list(anonymize(records, salt=salt, tokenizer=None)) for salt in (SALT, bytes(32)))
    assert measure(out).prefix == measure(records).prefix
    ids = [{i for r in some for i in r.prefix_ids} for some in (records, out, other)]
    assert not (ids[0] & ids[1] or ids[1] & ids[2])
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in out] == [
        (r.arrival_s, r.input_tokens, r.output_tokens) for r in records
    ]


def test_anonymize_refusals(tmp_path, tokenizer):
    out = tmp_path / "t.jsonl"
    assert "--tokenizer FILE" in refused("anonymize", SAMPLES / "sharegpt-constructed.json", "-o", out)
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    assert "not a tokenizer.json" in refused("anonymize", SAMPLES / "example.jsonl", "--tokenizer", broken, "-o", out)
    assert not out.exists()
    two = [tmp_path / f"{i}.jsonl" for i in range(2)]
    for path in two:
        ok("anonymize", SAMPLES / "mooncake-conversation.jsonl", "-o", path)
    assert two[0].read_bytes() != two[1].read_bytes(), "the salt is new each time and nowhere to be found"


def test_count_tokens_fills_only_gaps(tokenizer):
    made = load_tokenizer(tokenizer)
    records = [
        trace_record(1, None, 50, None, text="one two", answer="three"),
        trace_record(2, None, None, 9, text="one two", answer="three"),
        trace_record(3, None, 5, 6),
    ]
    got = [(r.input_tokens, r.output_tokens) for r in count_tokens(records, made)]
    assert got == [(50, 1), (2, 9), (5, 6)]


# --- the writer ------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_nothing(tmp_path):
    def breaks():
        yield trace_record(1, 0.0, 1, 1)
        raise TraceError("x", 2, "broken")

    for name in ("t.jsonl", "t.jsonl.gz", "t.parquet"):
        with pytest.raises(TraceError, match="broken"):
            write_trace(breaks(), tmp_path / name)
        with pytest.raises(TraceError, match="no request is left"):
            write_trace([], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_written_gzip_is_gzip(tmp_path):
    write_trace([trace_record(1, 5.25, 1, 1), trace_record(2, 6.35, 1, 1)], tmp_path / "t.jsonl.gz")
    rows = [json.loads(line) for line in gzip.decompress((tmp_path / "t.jsonl.gz").read_bytes()).splitlines()]
    assert [row["arrival_s"] for row in rows] == [0.0, 1.1]
