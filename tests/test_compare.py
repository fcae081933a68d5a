"""A against B: intervals that cover the truth, refusals that name the reason, one clear rule for failing a job."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import MS, SPEC, TIER, bad, good, write_run

from harness.analysis.compare.compare import LOADS_OWN, Figure, _slo_sentence, judge, parse_gate
from harness.analysis.compare.compare import compare as hold_against
from harness.analysis.compare.paired import FIGURES, RATE_BLOCKS, _figure, _percentiles, _share, block_counts, observe
from harness.analysis.report.decisions import comparison_sections
from harness.analysis.report.document import render_markdown
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import Quantity
from harness.analysis.stats.replicates import over_pairs
from harness.analysis.summary import summarise
from harness.cli.results import compare
from harness.errors import HarnessError, UsageError
from harness.record.host import Host
from harness.record.manifest import RunDir, read_manifest, write_manifest

SLO = {"ttft": 1.0}


def results(n=400, scale=1.0, seed=0, noise=0.05, who="a", fails=0):
    """Requests whose own difficulty (``seed``) both sides share; ``scale`` is how slow this side is."""
    hard, own = random.Random(seed), random.Random(f"{who}{seed}")
    made = []
    for i in range(n):
        ttft = 50 * scale * hard.lognormvariate(0, 0.5) * own.lognormvariate(0, noise)
        row = good(i, ttft_ms=ttft, itl_ms=10 * scale * hard.lognormvariate(0, 0.1), inputs=200, tokens=20)
        made.append(bad(i, scheduled_ns=row.scheduled_ns) if fails and i % fails == 0 else row)
    return made


def side(path, rows=None, usd=3.6, tier="tier-a", seed=0, **manifest):
    spec = manifest.pop("spec", replace(SPEC, slo=SLO))
    facts = {"tier": replace(TIER, name=tier, usd_per_hour=usd), "spec": spec} | manifest
    path = write_run(path, results() if rows is None else rows, **facts)
    if seed:
        change(path, plan={"seed": seed})
    return path


def change(path, plan=None, **manifest):
    """Edit the manifest in place, as another run would have it."""
    facts = read_manifest(path)
    if plan:
        facts.plan = replace(facts.plan, **plan)
    for key, value in manifest.items():
        setattr(facts, key, value)
    write_manifest(RunDir(path), facts)
    return path


def seen(path):
    run = read_run(path)
    return observe(run, summarise(run))


def against(a, b, *gates):
    a, b = ([seen(p) for p in (s if isinstance(s, list) else [s])] for s in (a, b))
    return hold_against(a, b, [parse_gate(g) for g in gates])


def three(path, who="a", **options):
    """Three runs of one system, each with a seed of its own."""
    made = {k: options.pop(k) for k in ("usd", "tier", "spec") if k in options}
    return [side(path / f"{who}{k}", results(seed=k, who=who, **options), seed=k, **made) for k in range(3)]


def figures(comparison, load=0):
    return {f.name: f for f in comparison.loads[load].figures}


def run_compare(*args):
    done = CliRunner().invoke(compare, [str(a) for a in args], standalone_mode=False)
    if done.exception and not isinstance(done.exception, HarnessError):
        raise done.exception
    return done


# ------------------------------------------------------------------------------------------------------ known truths


def test_what_is_known_is_found(tmp_path):
    """B takes 1.6 times as long; three pairs."""
    made = against(three(tmp_path), three(tmp_path, "b", scale=1.6, usd=2.2, tier="tier-b"))
    f = figures(made)
    assert made.comparable and set(f) == set(FIGURES)
    for name in ("ttft_p50", "ttft_p95", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50"):
        assert f[name].verdict == "worse"
        assert f[name].change.low < 0.61 and f[name].change.high > 0.59, name
    said = " ".join(made.loads[0].verdict)
    assert "TTFT p99 of B is" in said and "worse" in said
    assert [d.name for d in made.differs] == ["tier", "price"]
    assert made.compared == len(FIGURES) - len(LOADS_OWN)
    assert made.expected_by_chance == pytest.approx(0.05 * made.compared)
    assert made.shown == sum(v.verdict in ("better", "worse") for v in f.values())


def test_one_pair_shows_figures_and_has_no_verdict(tmp_path):
    """However far apart two runs lie: how far two runs of one system lie apart is not known from them."""
    made = against(side(tmp_path / "a"), side(tmp_path / "b", results(scale=1.6, who="b")))
    assert made.compared == made.shown == 0
    for f in made.loads[0].figures:
        assert f.a is not None and f.b is not None and f.difference.value is not None
        assert (f.verdict, f.difference.low, f.difference.high) == ("not judged", None, None)
    assert figures(made)["ttft_p50"].difference.note == "one pair: not judged"
    two = against(three(tmp_path / "2")[:2], three(tmp_path / "2", "b", scale=1.6)[:2])
    assert {f.verdict for f in two.loads[0].figures} == {"not judged"}
    assert figures(two)["ttft_p50"].difference.note == "2 pairs: not judged"


def test_an_open_loop_judges_no_cost_and_says_what_would(tmp_path):
    """The load is given: what B could carry beyond it is in none of these runs."""
    made = against(three(tmp_path), three(tmp_path, "b", usd=2.2, tier="tier-b"), "cost > +5%", "throughput < -3%")
    f = figures(made)
    for name in LOADS_OWN:
        assert f[name].verdict == "not judged" and f[name].difference.low is None
        assert f[name].a is not None and f[name].change.value is not None
        assert "harness capacity" in f[name].difference.note and "harness price A B" in f[name].difference.note
    assert f["e2e_p50"].verdict == "no difference shown"
    assert [g.outcome for g in made.loads[0].gates] == ["not judged"] * 2
    assert "harness capacity" in made.loads[0].gates[0].why
    assert "That is not judged" in made.loads[0].verdict[0] and "harness price A B" in made.loads[0].verdict[0]


def test_a_closed_loop_judges_cost(tmp_path):
    """B costs a bit more than two thirds an hour and is as fast."""
    spec = replace(SPEC, mode="closed", concurrency=1, slo=SLO)

    def runs(who, usd):
        for k in range(3):
            rng = np.random.default_rng([k, ord(who)])
            rows, at = [], 0
            for i in range(200):
                rows.append(good(i, at, ttft_ms=rng.normal(50, 2), inputs=200, tokens=20))
                at = rows[-1].finished_ns
            yield side(tmp_path / f"{who}{k}", rows, spec=spec, usd=usd, seed=k, tier=f"tier-{who}")

    made = against(list(runs("a", 3.6)), list(runs("b", 2.5)), "cost > +5%")
    f = figures(made)["cost"]
    assert f.verdict == "better" and f.change.low < 2.5 / 3.6 - 1 < f.change.high
    assert made.loads[0].gates[0].outcome == "holds"
    assert re.search(
        r"B costs 3\d % \+- [\d.]+ % less at the same load and SLO, which both kept", made.loads[0].verdict[0]
    )


def test_figures_are_those_of_the_report(tmp_path):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", results(scale=1.1, who="b"))
    f, s = figures(against(a, b)), seen(a).summary
    assert f["cost"].a == pytest.approx(s.cost.usd_per_1m_total.value)
    assert f["throughput"].a == pytest.approx(s.rates.total_token_throughput.value)
    assert f["goodput"].a == pytest.approx(s.rates.goodput.value)
    assert f["attainment"].a == pytest.approx(s.slo.attainment.value)
    assert f["ttft_p99"].a == pytest.approx(s.metrics.ttft.p99.value)
    assert f["tpot_p50"].a == pytest.approx(s.metrics.tpot.p50.value)


def test_pairing_sees_what_two_separate_intervals_cannot(tmp_path):
    """5 % slower under requests that vary tenfold: hidden between two intervals, plain request by request."""
    a, b = three(tmp_path), three(tmp_path, "b", scale=1.05, noise=0.01)
    f = figures(against(a, b))["ttft_p50"]
    one, two = (seen(p).summary.metrics.ttft.p50 for p in (a[0], b[0]))
    assert one.high > two.low, "the separate intervals overlap"
    assert f.verdict == "worse"


def test_the_interval_covers_the_truth():
    """Share of 100 experiments whose 95 % interval holds the true difference; a coin that lands wrong has room."""
    rng = np.random.default_rng(7)

    def draw(n):
        common = rng.lognormal(0, 0.5, n)
        return common * rng.lognormal(0, 0.3, n), 1.3 * common * rng.lognormal(0, 0.3, n)

    many_a, many_b = draw(1_000_000)
    truth = {p: float(np.quantile(many_b, p / 100) - np.quantile(many_a, p / 100)) for p in (50, 95, 99)}
    hits = dict.fromkeys([*truth, "share"], 0)
    for _ in range(100):
        for name, f in _percentiles("x", *draw(400)).items():
            p = int(name.removeprefix("x_p"))
            hits[p] += f.difference[0] <= truth[p] <= f.difference[1]
        low, high = _share(rng.random(400) < 0.10, rng.random(400) < 0.15).difference
        hits["share"] += low <= 0.05 <= high
    assert min(hits.values()) >= 0.90 * 100, hits


def test_the_interval_of_a_rate_covers_the_truth_when_stretches_of_time_are_alike():
    """Tokens per bin that remember each other for ten bins, as a queue has it: blocks of a tenth held 85 %."""
    rng, hits, counts = np.random.default_rng(1), 0, block_counts(200, RATE_BLOCKS)
    for _ in range(300):
        noise, level = rng.standard_normal((2, 400)), np.zeros((2, 400))
        for i in range(1, 400):
            level[:, i] = 0.9 * level[:, i - 1] + noise[:, i]
        a, b = np.array([[100.0], [110.0]]) + 20 * math.sqrt(1 - 0.9**2) * level[:, 200:]
        drawn = (counts @ side / counts.sum(axis=1) for side in (a, b))
        low, high = _figure(float(a.mean()), float(b.mean()), *drawn, 400, RATE_BLOCKS).difference
        hits += low <= 10 <= high
    assert 0.89 <= hits / 300 <= 0.98, hits


def test_nothing_different_shows_nothing_much(tmp_path):
    made = against(three(tmp_path), three(tmp_path, "b"))
    assert made.shown <= 1, [f for f in made.loads[0].figures if f.verdict in ("better", "worse")]
    assert made.differs == ()


def test_no_failure_at_all_is_no_certainty(tmp_path):
    """Three pairs of 400 requests without an event: each pair's own end, exact, and the mean of three."""
    f = figures(against(three(tmp_path), three(tmp_path, "b")))["error_rate"]
    assert (f.a, f.b, f.verdict) == (0, 0, "no difference shown")
    assert f.difference.high == pytest.approx((1 - 0.025 ** (1 / 400)) / 3**0.5)
    assert f.change.value is None and f.change.note == "A is 0"


def test_failures_are_shown_and_their_requests_left_out_of_latency(tmp_path):
    planned = {i: {"input_tokens": 200, "output_tokens": 20} for i in range(0, 400, 8)}
    b = []
    for k in range(3):
        rows = results(seed=k, who="b", fails=8)
        b.append(write_run(tmp_path / f"b{k}", rows, plan=planned, spec=replace(SPEC, slo=SLO)))
        change(b[-1], plan={"seed": k}, tier=replace(TIER, name="tier-a"))
    f = figures(against(three(tmp_path), b))
    assert f["error_rate"].verdict == "worse" and f["error_rate"].b == pytest.approx(0.125)
    assert f["attainment"].verdict == "worse"
    assert f["ttft_p50"].difference.n == 3 * 350


@given(st.integers(5, 400))
@settings(max_examples=30, deadline=None)
def test_every_resample_holds_whole_blocks_of_the_series(units):
    counts = block_counts(units)
    length = max(1, round(units / 10))
    assert (counts.sum(axis=1) == math.ceil(units / length) * length).all()
    assert counts.sum(axis=0).min() > 0


def test_a_request_that_one_run_was_never_offered_is_in_no_pair(tmp_path):
    """Every fourth client of A hung up: its requests are slow in B, and tell nothing of B against A."""
    mine = [bad(i, "cancelled") if i % 4 == 0 else row for i, row in enumerate(results())]
    slow = [good(i, ttft_ms=5000, inputs=200, tokens=20) if i % 4 == 0 else row for i, row in enumerate(results())]
    planned = {i: {"input_tokens": 200, "output_tokens": 20} for i in range(0, 400, 4)}
    a = write_run(tmp_path / "a", mine, plan=planned, spec=replace(SPEC, slo=SLO), tier=replace(TIER, name="tier-a"))
    made = against(a, side(tmp_path / "b", slow))
    assert (made.loads[0].requests, made.loads[0].left_out) == (300, 100)
    f = figures(made)
    assert f["error_rate"].a == f["error_rate"].b == 0 and f["attainment"].b == 1


def test_percentiles_of_large_samples_are_close_to_exact():
    values = np.random.default_rng(0).lognormal(0, 1, 50_000)
    for name, f in _percentiles("x", values, values * 2).items():
        p = int(name.removeprefix("x_p"))
        assert f.a == pytest.approx(np.quantile(values, p / 100, method="inverted_cdf"))
        assert f.change[0] == pytest.approx(1, abs=1e-9) and f.change[1] == pytest.approx(1, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- repeats


def test_repeats_pair_by_seed(tmp_path):
    a = [side(tmp_path / f"a{k}", results(seed=k), seed=k) for k in range(4)]
    b = [side(tmp_path / f"b{k}", results(scale=1.2, seed=k, who="b"), seed=k) for k in (2, 0, 3, 1)]
    made = against(a, b)
    (load,) = made.loads
    assert load.pairs == 4 and load.requests == 1600
    f = figures(made)["ttft_p50"]
    assert f.verdict == "worse" and f.change.low < 0.2 < f.change.high
    assert made.caution is None


def test_one_pair_is_cautioned_and_told_how_to_make_three(tmp_path):
    made = against([side(tmp_path / "a", results())], [side(tmp_path / "b", results(scale=1.2, who="b"))])
    text = render_markdown(comparison_sections(made))
    assert text.index("CAUTION. one pair: not judged") < text.index("A against B")
    assert 'order = "abba"' in text and "harness compare FOLDER" in text
    assert "better" not in text and "worse" not in text and "no difference" not in text


def test_intervals_over_pairs():
    assert over_pairs([1.0], [(0.5, 1.5)]) == (1.0, None, None), "what differs from run to run is not in it"
    assert over_pairs([1.0, 2.0], [(0.5, 1.5), (1.8, 2.2)]) == (1.5, None, None)
    mean, low, high = over_pairs([1.0, 2.0, 3.0], [(None, None)] * 3)
    assert (mean, low, high) == (2.0, pytest.approx(2 - 4.303 / 3**0.5, abs=0.01), pytest.approx(4.484, abs=0.01))
    # three pairs that agree by luck: what their requests know together is the least
    assert over_pairs([1.0] * 3, [(0.7, 1.5)] * 3) == (
        1.0,
        pytest.approx(1 - 0.3 / 3**0.5),
        pytest.approx(1 + 0.5 / 3**0.5),
    )


def test_seeds_that_do_not_pair(tmp_path):
    a = [side(tmp_path / "a0"), side(tmp_path / "a1", seed=1)]
    made = against(a, [side(tmp_path / "b0")])
    assert not made.comparable and "seed: A 0, 1, B 0" in made.reasons[0]
    other = against(side(tmp_path / "c"), side(tmp_path / "d", seed=5))
    assert "seed: A 0, B 5" in other.reasons[0]


def test_loads_are_compared_one_by_one(tmp_path):
    """A sweep against a sweep: pairs within each load; a load that only one side has is named."""
    spec = {k: replace(SPEC, slo=SLO, mode="open", concurrency=k) for k in (1, 2, 3)}
    a = [side(tmp_path / f"a{k}", results(60), spec=spec[k]) for k in (1, 2, 3)]
    b = [side(tmp_path / f"b{k}", results(60, who="b"), spec=spec[k]) for k in (1, 2)]
    made = against(a, b)
    assert len(made.loads) == 2 and any("only A has" in note for note in made.notes)
    assert made.compared == 0, "one pair at each load"
    assert made.caution.startswith("one pair: not judged")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda p: change(p, plan={"trace_sha256": "1" * 64}), "trace"),
        (lambda p: change(p, plan={"seed": 1}), "seed"),
        (lambda p: change(p, plan={"speed": 2.0, "planned_rate": 20.0}), "load: A open loop, 10 req/s"),
        (lambda p: change(p, plan={"arrivals": "poisson"}), "load"),
        (lambda p: change(p, plan={"sessions": "wait"}), "sessions"),
        (lambda p: change(p, plan={"conversation": "live"}), "conversation: A recorded, B live"),
        (lambda p: change(p, evidence="simulated"), "evidence: A measured, B simulated"),
        (lambda p: change(p, spec=replace(SPEC, slo={"ttft": 2.0})), "SLO: A ttft <= 1 s"),
        (lambda p: change(p, spec=replace(SPEC, slo=SLO, retries=2)), "retries: A 0, B 2"),
        (lambda p: change(p, spec=replace(SPEC, slo=SLO, extra_body={"top_k": 1})), "request body"),
        (lambda p: change(p, spec=replace(SPEC, slo=SLO, timeout_s=5.0)), "time limits"),
        (lambda p: change(p, status="stopped"), "is INVALID: status"),
    ],
)
def test_what_is_not_comparable_is_refused_with_the_reason(tmp_path, edit, words):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", results(who="b"))
    edit(b)
    made = against(a, b)
    assert not made.comparable and made.loads == () and made.compared == 0
    assert any(words in reason for reason in made.reasons), made.reasons
    done = run_compare(a, b)
    assert done.return_value == 1 and "Not comparable" in done.stdout
    document = json.loads(run_compare(a, b, "--format", "json").stdout)
    assert document["comparable"] is False and document["reasons"]


def test_two_live_conversations_are_compared_and_their_inputs_said_to_differ(tmp_path):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", results(who="b"))
    for path in (a, b):
        change(path, plan={"conversation": "live", "sessions": "wait"})
    made = against(a, b)
    assert made.comparable
    assert any("not asked word for word the same" in note for note in made.notes)


def test_one_slo_for_both_makes_them_comparable(tmp_path):
    a = side(tmp_path / "a")
    b = side(tmp_path / "b", results(who="b"), spec=replace(SPEC, slo={"ttft": 2.0}))
    assert run_compare(a, b).return_value == 1
    assert run_compare(a, b, "--slo", "ttft=1s").return_value == 0


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda p: change(p, model="other"), "model"),
        (lambda p: change(p, engine_args=["--max-num-seqs", "8"]), "engine arguments"),
        (lambda p: change(p, engine_version="0.33"), "engine"),
        (lambda p: change(p, tier=replace(TIER, purchase="spot", usd_per_hour=1.0)), "price"),
        (lambda p: change(p, host=Host(cpu="else", cores=64, memory_gib=1.0, os="x")), "load generator's machine"),
        (lambda p: change(p, spec=replace(SPEC, slo=SLO, balance="session")), "balance"),
        (lambda p: change(p, model_facts={"quantization": "int8"}), "quantization"),
    ],
)
def test_the_subject_of_a_comparison_is_named(tmp_path, edit, name):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", results(who="b"))
    edit(b)
    made = against(a, b)
    assert made.comparable, made.reasons
    assert name in [d.name for d in made.differs]
    shown = run_compare(a, b).stdout
    assert all(word in shown for word in name.split()), "a long name may stand on two lines"


def test_of_what_models_say_only_what_differs_is_named(tmp_path):
    facts = {"source": "a hub", "licence": "MIT"}
    a, b = side(tmp_path / "a", model_facts=facts), side(tmp_path / "b", results(who="b"), model_facts=facts)
    change(b, model_facts=facts | {"quantization": "int8"})
    assert [(d.name, d.a, d.b) for d in against(a, b).differs] == [("quantization", "not said", "int8")]
    assert not re.search(r"\de\+\d", run_compare(a, b).stdout), "no large figure as a power of ten"


def test_one_side_is_one_system(tmp_path):
    a = [side(tmp_path / "a0"), side(tmp_path / "a1", tier="tier-z", seed=1)]
    b = [side(tmp_path / "b0"), side(tmp_path / "b1", seed=1)]
    assert "A holds runs of different systems (tier" in against(a, b).reasons[0]


def test_other_requests_under_one_seed_are_refused(tmp_path):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", [good(i, tokens=30, inputs=200) for i in range(400)])
    assert any("other requests or output tokens" in reason for reason in against(a, b).reasons)


# ----------------------------------------------------------------------------------------------------------- --fail-if


@pytest.mark.parametrize(
    ("text", "bound", "above", "relative"),
    [
        ("cost > +5%", 0.05, True, True), ("cost>5%", 0.05, True, True), ("throughput < -3%", -0.03, False, True),
        ("ttft_p99 > +20ms", 0.02, True, False), ("e2e_p50 > 1.5s", 1.5, True, False),
        ("error_rate > +1%", 0.01, True, False), ("attainment < -0.5pp", -0.005, False, False),
    ],
)  # fmt: skip
def test_gates_are_read(text, bound, above, relative):
    gate = parse_gate(text)
    assert (gate.bound, gate.above, gate.relative) == (pytest.approx(bound), above, relative)


@pytest.mark.parametrize(
    "text",
    ["", "cost", "cost > 5", "cots > 5%", "cost >= 5%", "cost > 5ms", "cost > five%", "tpot_p99 > 5pp"],
)
def test_gates_that_nobody_can_read(text):
    with pytest.raises(UsageError):
        parse_gate(text)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.06, 0.08, "fails"), (0.04, 0.06, "undecided"), (0.01, 0.04, "holds"), (-0.4, -0.2, "holds"),
     (None, None, "not judged")],
)  # fmt: skip
def test_only_a_whole_interval_beyond_the_bound_fails(low, high, outcome):
    q = Quantity(value=None if low is None else (low + high) / 2, low=low, high=high, n=9, unit="", evidence="measured")
    f = Figure(name="cost", unit="", a=1.0, b=1.0, difference=q, change=q, verdict="")
    assert judge(parse_gate("cost > +5%"), f).outcome == outcome
    middle, *ends = (None if x is None else -x for x in (q.value, high, low))
    mirrored = replace(q, value=middle, low=ends[0], high=ends[1])
    f = replace(f, name="throughput", change=mirrored)
    assert judge(parse_gate("throughput < -5%"), f).outcome == outcome


def pattern(path, who):
    return str(path / f"{who}?")


def test_exit_codes_for_a_ci_job(tmp_path):
    three(tmp_path), three(tmp_path, "b", scale=1.6)
    a, b = pattern(tmp_path, "a"), pattern(tmp_path, "b")
    worse, fine = ("--fail-if", "ttft_p99 > +10ms"), ("--fail-if", "ttft_p99 > +1s")
    assert run_compare(a, b, *worse).return_value == 4
    assert run_compare(a, b, *fine).return_value == 0
    assert run_compare(a, b, *fine, *worse).return_value == 4
    assert "FAILS" in run_compare(a, b, *worse).stdout
    assert isinstance(run_compare(a, b, "--fail-if", "cots > 5%").exception, UsageError)
    assert isinstance(run_compare(a, a).exception, UsageError)


def test_what_is_not_judged_never_passes_in_silence(tmp_path):
    """Exit 5: fewer than three pairs, the cost of an open loop, or no price; a condition that fails comes first."""
    a, b = three(tmp_path), three(tmp_path, "b", scale=1.6)
    for side_a, side_b in ((a[:1], b[:1]), (a[:2], b[:2])):
        made = against(side_a, side_b, "ttft_p99 > +10ms")
        assert [g.outcome for g in made.loads[0].gates] == ["not judged"]
    one = run_compare(a[0], b[0], "--fail-if", "ttft_p99 > +10ms")
    assert one.return_value == 5 and "NOT JUDGED (one pair: not judged)" in " ".join(one.stdout.split())
    assert run_compare(a[0], b[0]).return_value == 0, "nothing was asked"
    cost = ("--fail-if", "cost > +5%")
    dear = run_compare(pattern(tmp_path, "a"), pattern(tmp_path, "b"), *cost)
    assert dear.return_value == 5 and "harness capacity" in dear.stdout and "harness price A B" in dear.stdout
    both = run_compare(pattern(tmp_path, "a"), pattern(tmp_path, "b"), *cost, "--fail-if", "ttft_p99 > +10ms")
    assert both.return_value == 4
    for path in b:
        change(path, tier=None)
    assert run_compare(pattern(tmp_path, "a"), pattern(tmp_path, "b"), *cost).return_value == 5


# --------------------------------------------------------------------------------------------------------- honest nulls


@pytest.mark.parametrize(
    ("rows", "manifest"),
    [
        (results(3), {}),
        (results(25), {"tier": None}),
        ([replace(r, input_tokens=None, output_tokens=None) for r in results(40)], {}),
        (results(40), {"spec": SPEC}),
        ([replace(r, chunk_ns=[], chunk_tokens=[]) for r in results(40)], {}),
    ],
    ids=["three requests", "no tier", "no usage", "no slo", "no chunks"],
)
def test_what_is_not_known_is_null_with_a_reason(tmp_path, rows, manifest):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        write_run(path, rows, **({"spec": replace(SPEC, slo=SLO)} | manifest))
    for kind in ("text", "md", "json"):
        done = run_compare(*paths, "--format", kind)
        assert done.exception is None and done.return_value == 0, (kind, done.output)
        assert not re.search(r"\b(nan|NaN|inf|None|Infinity)\b", done.stdout), done.stdout
    document = json.loads(done.stdout)
    unknown = [f for f in document["loads"][0]["figures"] if f["verdict"] == "not known"]
    assert unknown and all(f["difference"]["note"] for f in unknown)


def test_all_failed(tmp_path):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", [bad(i) for i in range(400)])
    made = against(a, b)
    assert not made.comparable and "INVALID" in made.reasons[0]


def test_closed_loops(tmp_path):
    """A faster server ends sooner: throughput is the hardware's here, and cost follows."""
    spec = replace(SPEC, mode="closed", concurrency=1, slo=SLO)
    a = [good(i, i * 80 * MS, tokens=4) for i in range(200)]
    b = [good(i, i * 40 * MS, ttft_ms=25, itl_ms=5, tokens=4) for i in range(200)]
    sides = [
        [side(tmp_path / f"{who}{k}", rows, spec=spec, seed=k) for k in range(3)] for who, rows in (("a", a), ("b", b))
    ]
    f = figures(against(*sides))
    assert f["throughput"].verdict == f["cost"].verdict == "better"
    assert f["throughput"].change.low == pytest.approx(1.0, abs=0.02)
    assert f["cost"].change.value == pytest.approx(-0.5, abs=0.02)


def test_the_document_is_json(tmp_path):
    a, b = side(tmp_path / "a"), side(tmp_path / "b", results(scale=1.2, who="b"), tier="tier-b")
    document = json.loads(run_compare(a, b, "--format", "json").stdout)
    assert document["schema"] == "harness.compare/1"
    assert document == json.loads(msgspec.json.encode(against(a, b)))
    assert {f["name"] for f in document["loads"][0]["figures"]} == set(FIGURES)


@pytest.mark.parametrize(
    ("met_a", "met_b", "said"),
    [
        (True, False, "A kept the SLO and B missed the SLO: the cost of B is none to sell at."),
        (None, True, "A could not be judged by the SLO and B kept the SLO: the cost of A is none to sell at."),
        (None, False, "A could not be judged by the SLO and B missed the SLO: the cost of A and B is none to sell at."),
        (False, False, "A missed the SLO and B missed the SLO: the cost of A and B is none to sell at."),
        (
            None,
            None,
            "A could not be judged by the SLO and B could not be judged by the SLO: "
            "the cost of A and B is none to sell at.",
        ),
    ],
)
def test_an_slo_that_could_not_be_judged_is_neither_kept_nor_missed(met_a, met_b, said):
    assert _slo_sentence(met_a, met_b) == said


@pytest.mark.parametrize("kept", [True, False])
def test_bulk_delivery_of_one_side_makes_nobody_a_winner(tmp_path, kept):
    """The times of A's tokens came in clumps, so nobody knows whether A kept its SLO; of B it is known."""
    spec = replace(SPEC, slo={"ttft": 1.0, "tpot": 1.0 if kept else 0.001})

    def runs(name, itl_ms):
        rows = [good(i, itl_ms=itl_ms, inputs=200, tokens=20) for i in range(400)]
        return [side(tmp_path / f"{name}{k}", rows, spec=spec, seed=k + 1) for k in range(3)]

    (load,) = against(runs("a", 0), runs("b", 10)).loads
    said = " ".join(load.verdict)
    assert (load.a_slo_met, load.b_slo_met) == (None, kept)
    assert f"A could not be judged by the SLO and B {'kept' if kept else 'missed'} the SLO" in said
    assert "no SLO was given" not in said
