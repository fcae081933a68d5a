"""More, fewer or finer arrivals: whole sessions, the same clock, the trace's bursts; and the figures that say so."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import PlanError, UsageError
from harness.plan.arrivals import MOST_SHIFT_NS, parse_growth, spread
from harness.plan.build import build_plan
from harness.plan.file import PlanInfo, iter_requests, plan_sha256, read_plan_info
from harness.plan.prompts import Vocabulary
from harness.plan.spec import PlanSpec
from harness.trace import stats as stats_module
from harness.trace.io import open_trace
from harness.trace.stats import arrival_stats, counts_between, length_stats

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"
VOCABULARY = Vocabulary.from_ids(range(100, 5000))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(trace: Path, out: Path, **spec: object) -> PlanInfo:
    return build_plan(open_trace(trace), out, PlanSpec(closed=False, **spec), VOCABULARY)  # type: ignore[arg-type]


def poisson(n: int, rate: float = 5.0, seed: int = 0) -> list[float]:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n)).round(6).tolist()


def rows_at(times: list[float], sessions: int | None = None) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {"arrival_s": t, "input_tokens": 10 + i, "output_tokens": 5}
        | ({} if sessions is None else {"session_id": f"s{rng.integers(sessions)}"})
        for i, t in enumerate(times)
    ]


def by_row(out: Path) -> dict[int, list]:
    """Requests by the row they come from: input lengths are unique."""
    found = defaultdict(list)
    for request in iter_requests(out):
        found[request.input_tokens - 10].append(request)
    return found


# --- whole sessions, every row as often as asked ---------------------------------------------------------------------


@given(
    growth=st.sampled_from([0.3, 0.5, 1.0, 1.7, 2.0, 3.25]),
    sessions=st.sampled_from([None, 3, 40]),
    n=st.integers(2, 120),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_unit_is_whole_and_keeps_its_own_times(tmp_path_factory, growth, sessions, n, seed):
    folder = tmp_path_factory.mktemp("g")
    rows = rows_at(poisson(n, seed=seed), sessions)
    trace = write(folder / "t.jsonl", rows)
    try:
        info = build(trace, folder / "p", grow=growth, seed=seed)
    except UsageError as e:
        assert growth < 1 and "left no request" in str(e)
        return
    requests = list(iter_requests(folder / "p"))
    assert [r.scheduled_ns for r in requests] == sorted(r.scheduled_ns for r in requests)
    assert info.requests == len(requests)
    assert info.grow == growth
    counts = Counter(r.input_tokens - 10 for r in requests)
    whole, part = int(growth), growth % 1
    assert all(whole <= counts[i] <= whole + (part > 0) for i in range(n))
    # A slice is one unit of one copy: all its rows, in order, shifted by one and the same time.
    units = defaultdict(list)
    for i, row in enumerate(rows):
        units[row.get("session_id", f"row {i}")].append(i)
    slices = defaultdict(list)
    for request in requests:
        slices[request.slice].append(request)
    assert len(slices) == sum(counts[unit[0]] for unit in units.values())
    for turns in slices.values():
        found = [r.input_tokens - 10 for r in turns]
        assert found == units[rows[found[0]].get("session_id", f"row {found[0]}")]
        shifts = {r.scheduled_ns - round((rows[i]["arrival_s"] - rows[0]["arrival_s"]) * 1e9) for r, i in
                  zip(turns, found, strict=True)}  # fmt: skip
        assert max(shifts) - min(shifts) <= 2
        assert min(shifts) <= MOST_SHIFT_NS


def test_the_trace_itself_is_the_first_copy(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(200), 20))
    build(trace, tmp_path / "p")
    build(trace, tmp_path / "q", grow=2.0)
    alone = {(r.input_tokens, r.scheduled_ns) for r in iter_requests(tmp_path / "p")}
    assert alone <= {(r.input_tokens, r.scheduled_ns) for r in iter_requests(tmp_path / "q")}


def test_growth_of_one_is_the_trace(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(100), 20))
    build(trace, tmp_path / "p")
    info = build(trace, tmp_path / "q", grow=1.0)
    assert list(iter_requests(tmp_path / "p")) == list(iter_requests(tmp_path / "q"))
    assert (info.rescale, info.grow) == ("superpose", 1.0)


def test_equal_arguments_make_equal_plans_and_a_seed_another(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(300), 30))
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        build(trace, tmp_path / name, grow=1.5, seed=seed)
    assert plan_sha256(tmp_path / "a") == plan_sha256(tmp_path / "b") != plan_sha256(tmp_path / "c")


# --- shape -----------------------------------------------------------------------------------------------------------


def day(seed: int = 3) -> list[float]:
    """A day in an hour: a busy noon, a quiet night, Poisson within."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, 86_400, 40_000))
    return times[rng.random(40_000) < 0.5 - 0.45 * np.cos(times / 86_400 * 2 * np.pi)].round(6).tolist()


@pytest.mark.parametrize("growth", [0.4, 3.0, 2.5])
def test_the_time_of_day_stays(tmp_path, growth):
    times = day()
    trace = write(tmp_path / "t.jsonl", [row | {"input_tokens": 8} for row in rows_at(times)])
    info = build(trace, tmp_path / "p", grow=growth)
    assert info.requests == pytest.approx(growth * len(times), rel=0.03)
    planned = np.array([r.scheduled_ns for r in iter_requests(tmp_path / "p")])
    span_ns = round((times[-1] - times[0]) * 1e9)
    hours = [counts_between(t, 0, span_ns, 24) for t in (np.array(times) * 1e9 - times[0] * 1e9, planned)]
    assert np.corrcoef(*hours)[0, 1] > 0.99
    assert np.abs(hours[1] / hours[0].clip(1) - growth).max() < 0.35 * growth


def bursts() -> list[float]:
    """Ten at once, every 30 s or so."""
    starts = np.cumsum(np.random.default_rng(0).exponential(30, 400))
    return (starts[:, None] + np.arange(10) * 0.01).ravel().round(6).tolist()


def test_bursts_are_not_laid_onto_bursts(tmp_path):
    trace = write(tmp_path / "t.jsonl", sorted(rows_at(sorted(bursts())), key=lambda row: row["arrival_s"]))
    info = build(trace, tmp_path / "p", grow=3.0)
    before, after = info.source.arrivals, info.planned
    assert before.dispersion["1s"] > 8
    # Three users with bursts of their own are as bursty as one; bursts three times as big would have three times that.
    assert after.dispersion["1s"] == pytest.approx(before.dispersion["1s"], rel=0.15)
    thin = build(trace, tmp_path / "q", grow=0.5).planned
    assert thin.dispersion["1s"] == pytest.approx(1 + 0.5 * (before.dispersion["1s"] - 1), rel=0.15)
    assert any("variance/mean at 1s" in note for note in info.notes)
    short = build(trace, tmp_path / "s", grow=3.0, limit=9)
    assert any("shape" in note for note in short.notes)
    assert not any("variance/mean" in note for note in short.notes), "what nine requests cannot say is not said"


def test_thinning_draws_the_rate_and_superposition_too(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(4000, rate=8.0)))
    thin = build(trace, tmp_path / "p", rescale="thin", rate=2.0)
    more = build(trace, tmp_path / "q", rescale="superpose", rate=20.0)
    assert thin.planned_rate == pytest.approx(2.0, rel=0.1)
    assert more.planned_rate == pytest.approx(20.0, rel=0.05)
    assert (thin.rescale, more.rescale) == ("thin", "superpose")
    assert thin.speed == more.speed == 1.0
    assert build(trace, tmp_path / "r", rate=20.0).rescale == "compress"


@pytest.mark.filterwarnings("error")
def test_a_clock_too_slow_is_refused_in_words_alone(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(20)))
    with pytest.raises(UsageError, match="292 years"):
        build(trace, tmp_path / "p", speed=1e-300)


def test_growth_then_a_faster_clock_and_a_cut(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(2000, rate=8.0)))
    slow = build(trace, tmp_path / "p", grow=2.0)
    fast = build(trace, tmp_path / "q", grow=2.0, speed=10.0)
    assert fast.planned_rate == pytest.approx(10 * slow.planned_rate, rel=1e-6)
    cut = build(trace, tmp_path / "r", grow=2.0, duration_s=60.0)
    assert cut.span_s <= 60
    assert cut.requests == pytest.approx(960, rel=0.15)
    some = build(trace, tmp_path / "s", grow=2.0, limit=100)
    assert (some.requests, some.cut) == (100, True)
    assert [r.scheduled_ns for r in iter_requests(tmp_path / "s")] == [
        r.scheduled_ns for r in iter_requests(tmp_path / "p")
    ][:100]


def test_copies_share_nothing_and_keep_what_they_share_within(tmp_path):
    rows = [
        {"arrival_s": i, "input_tokens": 64, "output_tokens": 1, "prefix_ids": [7, i], "block_tokens": 32}
        for i in range(20)
    ]
    build(write(tmp_path / "t.jsonl", rows), tmp_path / "p", grow=3.0)
    starts = Counter(tuple(r.prompt_token_ids[:32]) for r in iter_requests(tmp_path / "p"))
    assert sorted(starts.values()) == [20, 20, 20], "one shared block in each copy, none between them"


def test_turns_of_copies_wait_for_their_own(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(100), 10))
    build(trace, tmp_path / "p", grow=2.0, sessions="wait")
    requests = list(iter_requests(tmp_path / "p"))
    assert any(r.after is not None for r in requests)
    for r in requests:
        if r.after is not None:
            assert requests[r.after].slice == r.slice
            assert r.after < r.request_id


def test_a_trace_that_shrinks_while_it_is_laid_over_itself(tmp_path, monkeypatch):
    from harness.plan import build as build_module

    rows = rows_at(poisson(50))
    trace = write(tmp_path / "t.jsonl", rows)
    survey = build_module.survey

    def survey_then_cut(*args, **options):
        found = survey(*args, **options)
        write(trace, rows[:20])
        return found

    monkeypatch.setattr(build_module, "survey", survey_then_cut)
    with pytest.raises(PlanError, match="changed while it was read"):
        build(trace, tmp_path / "p", grow=2.0)


# --- coarse clocks ---------------------------------------------------------------------------------------------------


def test_spreading_fills_the_step_in_order():
    arrivals = np.repeat(np.arange(300) * 3_000_000_000, 10).astype(np.int64)
    moved = spread(arrivals, 3.0, 1)
    assert (np.diff(moved) >= 0).all()
    off = moved - arrivals
    assert 0 <= off.min() <= off.max() < 3_000_000_000
    assert abs(off.mean() / 1.5e9 - 1) < 0.05
    assert (moved != spread(arrivals, 3.0, 2)).any()
    assert (moved == spread(arrivals, 3.0, 1)).all()


def test_spreading_never_passes_the_next_instant():
    arrivals = np.sort(np.concatenate([np.arange(100) * 3_000_000_000 + jitter for jitter in (0, 0, 1_000_000)]))
    moved = spread(arrivals, 3.0, 1)
    assert (np.diff(moved) >= 0).all()
    assert (moved[arrivals % 3_000_000_000 == 0] % 3_000_000_000 <= 1_000_000).all()


def test_spreading_goes_no_further_than_a_step_into_a_quiet_time():
    arrivals = np.array([0, 0, 0, 3, 3, 60, 60, 60]) * 1_000_000_000
    off = spread(arrivals, 3.0, 1) - arrivals
    assert 0 <= off.min() <= off.max() < 3_000_000_000


def test_a_mooncake_trace_is_spread_only_when_asked(tmp_path):
    trace = SAMPLES / "mooncake-conversation.jsonl"
    asis, spread_ = build(trace, tmp_path / "p", limit=100), build(trace, tmp_path / "q", limit=100, spread=True)
    assert asis.spread_s is None
    assert any("--spread" in note for note in asis.notes)
    assert spread_.spread_s == pytest.approx(3.0, abs=0.01)
    assert spread_.source == asis.source
    assert any("spread evenly" in note for note in spread_.notes)
    assert spread_.planned.gap_cv < 0.6 * asis.planned.gap_cv
    pairs = list(zip(iter_requests(tmp_path / "p"), iter_requests(tmp_path / "q"), strict=True))
    assert all(a.prompt_token_ids == b.prompt_token_ids for a, b in pairs)
    assert all(0 <= b.scheduled_ns - a.scheduled_ns < 3.1e9 for a, b in pairs)
    fine = build(SAMPLES / "azure-conv-2023.csv", tmp_path / "r", spread=True)
    assert fine.spread_s is None
    assert any("nothing to spread" in note for note in fine.notes)


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grow": 0.0}, "above 0"),
        ({"grow": 101.0}, "at most 100"),
        ({"grow": 2.0, "rate": 3.0}, "excludes"),
        ({"grow": 2.0, "rescale": "superpose"}, "excludes"),
        ({"grow": 2.0, "repeat": True, "limit": 5}, "exclude"),
        ({"grow": 2.0, "arrivals": "poisson", "stages": ()}, "request rate"),
        ({"rescale": "thin"}, "rate"),
        ({"rescale": "thin", "speed": 2.0}, "rate"),
        ({"rescale": "thin", "rate": 50.0}, "say superpose"),
        ({"rescale": "superpose", "rate": 0.1}, "say thin"),
        ({"grow": 1e-9}, "left no request"),
    ],
)
def test_wishes_that_cannot_be(tmp_path, options, words):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(50)))
    with pytest.raises(UsageError, match=words):
        build(trace, tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("options", [{"grow": 2.0}, {"spread": True}, {"rescale": "thin", "rate": 1.0}])
def test_a_closed_loop_has_no_times_to_change(tmp_path, options):
    trace = write(tmp_path / "t.jsonl", rows_at(poisson(50)))
    with pytest.raises(UsageError):
        build_plan(open_trace(trace), tmp_path / "p", PlanSpec(closed=True, **options), VOCABULARY)


def test_one_instant_cannot_be_superposed(tmp_path):
    trace = write(tmp_path / "t.jsonl", rows_at([1.0, 1.0, 1.0]))
    with pytest.raises(UsageError, match="one instant"):
        build(trace, tmp_path / "p", grow=2.0)
    assert build(trace, tmp_path / "q", grow=0.999999).requests == 3


@pytest.mark.parametrize("spec", [{"grow": 2.0}, {"grow": 0.9}, {"grow": 2.0, "speed": 1e6}])
def test_the_longest_times_there_are(tmp_path, spec):
    trace = write(tmp_path / "t.jsonl", rows_at([0.0, 1.0, 8_999_999_999.0]))
    info = build(trace, tmp_path / "p", **spec)
    assert all(0 <= r.scheduled_ns < 2**63 for r in iter_requests(tmp_path / "p"))
    assert info.requests == len(list(iter_requests(tmp_path / "p")))


def test_growth_in_words():
    said = {"3x": 3, "3": 3, "0.5x": 0.5, ".5": 0.5, "+200%": 3, "-20%": 0.8, "+0%": 1, " 2x ": 2}
    assert {text: parse_growth(text) for text in said} == said
    for bad in ("", "x", "150%", "-100%", "0x", "101x", "3 x", "1e3", "nan", "+x%", "٣x"):
        with pytest.raises(UsageError, match="write 3x"):
            parse_growth(bad)


# --- what is kept of the trace ---------------------------------------------------------------------------------------


def test_what_the_plan_keeps_of_its_trace(tmp_path):
    rows = rows_at(poisson(500), 40)
    info = build(write(tmp_path / "t.jsonl", rows), tmp_path / "p", speed=3.0)
    assert read_plan_info(tmp_path / "p") == info
    source = info.source
    turns = Counter(row["session_id"] for row in rows)
    assert (source.requests, source.sessions, source.session_rows) == (500, len(turns), 500)
    assert source.most_turns == max(turns.values())
    assert source.unit_rows == pytest.approx(sum(n * n for n in turns.values()) / 500)
    assert source.input_tokens.mean == pytest.approx(np.mean([row["input_tokens"] for row in rows]))
    assert source.input_tokens.quantiles[0] == 10
    assert source.input_tokens.quantiles[25] == 259
    assert source.input_tokens.quantiles[-1] == 509
    assert (source.output_tokens.rows, set(source.output_tokens.quantiles)) == (500, {5})
    assert source.arrivals.rate == pytest.approx(info.source_rate)
    assert info.planned.rate == pytest.approx(3 * info.source_rate, rel=1e-6)
    assert sum(source.arrivals.counts) == 500
    alone = rows_at(poisson(10))
    assert build(write(tmp_path / "u.jsonl", alone), tmp_path / "q").source.unit_rows == 1


@given(gaps=st.lists(st.integers(0, 5_000_000_000), min_size=1, max_size=300))
@settings(deadline=None)
def test_figures_of_arrivals_are_those_of_their_gaps(gaps):
    times = np.cumsum(gaps).astype(np.int64)
    whole = arrival_stats(times)
    if len(times) > 1:
        want = np.quantile(np.diff(times), np.linspace(0, 1, stats_module.POINTS), method="inverted_cdf")
        assert whole.gap_quantiles_s == [int(gap) / 1e9 for gap in want]
    if len(times) > 2 and whole.gap_cv is not None:
        steps = np.diff(times)
        assert whole.gap_cv == pytest.approx(steps.std() / steps.mean())
    assert sum(whole.counts) in (0, len(times))


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_length_quantiles_are_those_of_the_rows(lengths):
    found = length_stats(Counter(lengths))
    assert (found.rows, found.mean) == (len(lengths), pytest.approx(np.mean(lengths)))
    want = np.quantile(lengths, np.linspace(0, 1, stats_module.POINTS), method="inverted_cdf")
    assert found.quantiles == want.astype(int).tolist()
    assert length_stats({}) is None
