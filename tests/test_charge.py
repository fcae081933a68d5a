"""Prices follow from costs by arithmetic that anybody can repeat, add up to the bill, and say what they rest on."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from run_files import SPEC, TIER, good, write_run

from harness.analysis.cost.split import TokenMix, by_ratio, not_identifiable, token_mix
from harness.analysis.pricing.list_prices import find_list_prices, read_list_prices
from harness.analysis.pricing.rate_card import HOURS_PER_MONTH, api_usd, charge, compare_with_api, slo_words
from harness.analysis.pricing.terms import (
    Terms,
    TokenWeights,
    VolumeTier,
    declared,
    from_split,
    parse_volume,
    unit_prices,
)
from harness.analysis.rows.read import read_run
from harness.analysis.stats.intervals import Quantity
from harness.analysis.summary import summarise
from harness.cli.price import parse_tier_price, price
from harness.cli.select_runs import find_runs
from harness.errors import HarnessError, ResultsError, UsageError
from harness.record.manifest import MANIFEST, Replica, RunDir
from harness.record.samples import SERVER_SCHEMA

TERMS = Terms(margin=0.4, utilisation=0.3)
TODAY = dt.date(2026, 11, 22)
MODEL = "llama-3.1-8b-instruct"
CLOSED = replace(SPEC, mode="closed", concurrency=1)


def rows(n=400, cached=None, **kw):
    return [replace(good(i, **kw), cached_tokens=cached) for i in range(n)]


def summary(path, results=None, slo=None, **manifest):
    run = write_run(path, rows() if results is None else results, **({"model": MODEL} | manifest))
    return summarise(read_run(run), slo=slo)


def decide(*summaries, terms=TERMS, structure=None, **kw):
    return charge(summaries, terms, structure or declared(4.0), **({"today": TODAY} | kw))


def run_price(*args):
    done = CliRunner().invoke(price, [str(a) for a in args], standalone_mode=False)
    if done.exception and not isinstance(done.exception, HarnessError):
        raise done.exception
    return done


def numbers(value):
    """Every number in a JSON document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float | int) else []


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_by_hand(tmp_path):
    """3.6 USD/h is 0.001 USD a second; 400 requests of 8 in, 4 out, 39.98 s: 0.03998 USD for 4,800 tokens."""
    (made,) = decide(summary(tmp_path / "r"))
    full = 0.03998 / 4800 * 1e6
    assert made.cost_full.total.value == pytest.approx(full)
    assert made.cost.total.value == pytest.approx(full / 0.3)
    standard = made.offers[0]
    assert standard.prices.total.value == pytest.approx(full / 0.3 / 0.6)
    assert standard.margin == pytest.approx(0.4)
    asked, cost = standard.prices.total.value, made.cost.total.value
    assert (asked - cost) / asked == pytest.approx(0.4), "gross margin, of the price"
    assert standard.break_even_utilisation == pytest.approx(made.cost_full.total.value / asked)
    assert made.fleet_usd_per_month == pytest.approx(3.6 * 730)
    assert made.capacity_tokens_per_month == pytest.approx(4800 / 39.98 * 3600 * HOURS_PER_MONTH)
    earned = made.break_even_tokens_per_month * asked / 1e6
    assert earned == pytest.approx(made.fleet_usd_per_month), "at the break-even volume the price pays for the fleet"
    assert sum(made.bill_nanousd) == 39_980_000


@given(
    st.floats(1e-6, 1e4), st.integers(0, 10**12), st.one_of(st.none(), st.integers(0, 10**12)), st.integers(1, 10**12),
    st.floats(0, 100), st.one_of(st.none(), st.floats(0, 10)), st.floats(0.01, 100),
)  # fmt: skip
def test_the_parts_add_up_to_the_bill(usd, uncached, cached, out, w_in, w_cached, w_out):
    mix = TokenMix(uncached_input=uncached, cached_input=cached, output=out)
    total = Quantity(value=usd, low=usd * 0.9, high=usd * 1.2, n=9, unit="", evidence="measured x list price")
    structure = TokenWeights(method="declared ratio", input=w_in, cached_input=w_cached, output=w_out)
    prices = unit_prices(total, mix, structure)
    for end in ("value", "low", "high"):
        into, out_price = getattr(prices.input, end), getattr(prices.output, end)
        hit = into if prices.cached_input.value is None else getattr(prices.cached_input, end)
        parts = uncached * into + (cached or 0) * hit + out * out_price
        assert parts == pytest.approx(getattr(total, end) * mix.total, rel=1e-9)
    assert (prices.cached_input.value is None) == (cached is None or w_cached is None)


@given(
    st.floats(0, 0.99), st.floats(0.01, 1), st.floats(0, 0.99), st.floats(0, 0.99)
)  # fmt: skip
def test_margin_and_break_even_agree(margin, utilisation, discount, batch):
    from harness.analysis.pricing.rate_card import _offers

    q = Quantity(value=2.0, low=1.0, high=3.0, n=9, unit="", evidence="measured")
    full = unit_prices(q, TokenMix(uncached_input=10, cached_input=5, output=5), declared(4.0, 1.0, 0.25))
    terms = Terms(
        margin=margin, utilisation=utilisation, volume=(VolumeTier(from_tokens=1e9, discount=discount),),
        batch_discount=batch,
    )  # fmt: skip
    offers = _offers(full, terms)
    assert len(offers) == 2 + (discount > 0), "standard, batch, and volume where it has a discount"
    for offer in offers:
        asked, cost = offer.prices.total.value, 2.0 / utilisation
        assert (asked - cost) / asked == pytest.approx(offer.margin, abs=1e-9)
        assert asked * offer.break_even_utilisation == pytest.approx(2.0)
        assert offer.prices.total.low == pytest.approx(asked / 2) and math.isfinite(offer.prices.output.high)


def test_doubt_about_the_division_is_added_to_that_about_the_bill():
    """3 % and 4 % that know nothing of each other are 5 %; the total knows nothing of the division."""
    total = Quantity(value=1.0, low=0.97, high=1.03, n=9, unit="", evidence="measured")
    weights = TokenWeights(method="step model", input=1.0, cached_input=None, output=4.0, spread=(0.0, 0.0, 0.04))
    prices = unit_prices(total, TokenMix(uncached_input=10, cached_input=None, output=10), weights)
    assert prices.output.high / prices.output.value == pytest.approx(1.05)
    assert prices.output.low / prices.output.value == pytest.approx(0.95)
    assert prices.input.high / prices.input.value == pytest.approx(1.03)
    assert prices.total == total


def test_a_split_brings_its_own_doubt():
    split = by_ratio(1.0, token_mix(10, None, 10), 4.0, evidence="measured")
    out = split.usd_per_1m_output
    wide = replace(split, usd_per_1m_output=replace(out, low=out.value * 0.9, high=out.value * 1.2))
    assert from_split(wide).spread == pytest.approx((0.0, 0.0, 0.2))


def test_cached_input_has_its_own_price(tmp_path):
    (made,) = decide(summary(tmp_path / "r", rows(cached=6)), structure=declared(4.0, 1.0, 0.25))
    p = made.cost_full
    assert (made.mix.uncached_input, made.mix.cached_input, made.mix.output) == (800, 2400, 1600)
    assert p.cached_input.value == pytest.approx(p.input.value / 4)
    assert p.output.value == pytest.approx(p.input.value * 4)
    bill = (800 * p.input.value + 2400 * p.cached_input.value + 1600 * p.output.value) / 1e6
    assert bill == pytest.approx(0.03998)
    (plain,) = decide(summary(tmp_path / "p", rows(cached=6)))
    assert plain.cost_full.cached_input.value is None
    assert any("declare its weight" in note for note in plain.notes)


def test_a_measured_split_gives_the_weights(tmp_path):
    s = summary(tmp_path / "r", rows(cached=6))
    split = by_ratio(1.0, token_mix(3200, 2400, 1600), 5.0, evidence="measured", cached_ratio=0.1)
    assert from_split(split).output / from_split(split).input == pytest.approx(5)
    with_split = replace(s, cost=replace(s.cost, splits=[replace(split, method="step model")]))
    (made,) = decide(with_split, split_method="step model")
    assert made.structure.method == "step model"
    assert made.cost_full.output.value == pytest.approx(5 * made.cost_full.input.value)
    assert made.cost_full.cached_input.value == pytest.approx(made.cost_full.input.value / 10)
    assert sum(made.bill_nanousd) == 39_980_000


def test_the_servers_own_counters_divide_the_bill(tmp_path):
    """Engine time of a known law (1 ms an input token, 5 ms an output token): 5 is found in what was sampled."""
    results = [good(i, i * 300 * 10**6) for i in range(400)]
    path = write_run(tmp_path / "r", results, model=MODEL)
    rng, samples, prompt, output = np.random.default_rng(0), [], 0.0, 0.0
    for second in range(120):
        share = float(rng.uniform(0.1, 0.9))
        prompt, output = prompt + share * 1000, output + (1 - share) * 200
        samples.append({"t_ns": second * 10**9, "took_ns": 1, "running": 8.0, "prompt_tokens_total": prompt,
                        "generation_tokens_total": output})  # fmt: skip
    with pa.OSFile(str(RunDir(path).server_metrics(0)), "wb") as sink, pa.ipc.new_stream(sink, SERVER_SCHEMA) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(samples, schema=SERVER_SCHEMA))
    found = json.loads(run_price(path, "--split", "step-model", "--format", "json").stdout)["charges"][0]
    prices = found["cost_full"]
    assert found["structure"]["method"] == "step model"
    assert prices["output"]["value"] / prices["input"]["value"] == pytest.approx(5, rel=0.05)
    assert sum(found["bill_nanousd"]) == pytest.approx(0.120 * 1e9, rel=0.01)
    phase = json.loads(run_price(path, "--split", "phase-time", "--format", "json").stdout)["charges"][0]
    assert phase["structure"]["method"] == "declared ratio"
    assert any("do not count time by phase" in note for note in phase["notes"])
    RunDir(path).server_metrics(0).unlink()
    none = json.loads(run_price(path, "--split", "step-model", "--format", "json").stdout)["charges"][0]
    assert any("a server was not sampled" in note for note in none["notes"])


def test_a_split_that_is_not_identifiable_is_said(tmp_path):
    s = summary(tmp_path / "r")
    none = not_identifiable("step model", "the mix hardly varies", evidence="measured", n=9)
    (made,) = decide(replace(s, cost=replace(s.cost, splits=[none])), split_method="step model")
    assert made.structure.method == "declared ratio"
    assert any("the mix hardly varies" in note for note in made.notes)
    with pytest.raises(UsageError, match="hardly varies"):
        from_split(none)


# --------------------------------------------------------------------------------------------------- which run decides


def at_rate(path, rate, slow=0, slo=None, tier=TIER, cached=None, tokens=4, requests=400, **spec):
    """A run of 400 requests at ``rate``, the ``slow`` ones with a ttft of 900 ms."""
    results = [
        replace(good(i, round(i * 1e9 / rate), ttft_ms=900 if i < slow else 50, tokens=tokens), cached_tokens=cached)
        for i in range(requests)
    ]
    s = summary(path, results, {"ttft": 0.5} if slo is None else slo or None, spec=replace(SPEC, **spec), tier=tier)
    return replace(s, plan=replace(s.plan, speed=rate / 10, planned_rate=float(rate)))


def test_several_loads_are_quoted_at_the_highest_that_keeps_the_slo(tmp_path):
    """100 % at 20 req/s and 90 % at 40: 99 % a tenth of the way, at 22, and so are the tokens/s."""
    runs = [at_rate(tmp_path / f"{rate}", rate, slow, cached=4) for rate, slow in ((5, 0), (20, 0), (40, 40))]
    (made,) = decide(*runs, structure=declared(4.0, 1.0, 0.25))
    between = [s.rates.total_token_throughput.value for s in runs[1:]]
    per_s = 0.9 * between[0] + 0.1 * between[1]
    assert made.quoted_at == "capacity" and made.slo_met
    assert (made.offered.value, made.offered.unit) == (pytest.approx(22), "req/s")
    assert made.cost_full.total.value == pytest.approx(0.001 / per_s * 1e6, rel=1e-5)
    assert made.cost_full.total.low < made.cost_full.total.value < made.cost_full.total.high
    assert made.runs == tuple(s.run for s in runs[1:]), "the two loads around it, and no other"
    assert made.mix.total == pytest.approx(per_s * 3600, abs=2), "the tokens of an hour there"
    assert made.mix.cached_input == pytest.approx(made.mix.uncached_input, abs=1), "4 of 8 were cached at both loads"
    assert abs(sum(made.bill_nanousd) - 3_600_000_000) <= 1, "an hour costs 3.6 USD, whole tokens or not"
    parts = [(made.cost_full.input, made.mix.uncached_input), (made.cost_full.cached_input, made.mix.cached_input),
             (made.cost_full.output, made.mix.output)]  # fmt: skip
    assert sum(q.value * n for q, n in parts) / 1e6 == pytest.approx(3.6, rel=1e-9)
    assert made.fleet_usd_per_month == pytest.approx(3.6 * 730)
    assert made.capacity_tokens_per_month == pytest.approx(per_s * 3600 * 730, rel=1e-5)
    assert made.floor_load == 40 and made.floor.total.value == pytest.approx(0.001 / between[1] * 1e6)
    said = " ".join(made.notes)
    assert "between 20 req/s (kept): " in said and "40 req/s (missed): " in said and "nothing is extrapolated" in said
    halved = {TIER.name: replace(TIER, usd_per_hour=1.8, date="2026-11-20", source="contract")}
    (again,) = decide(*runs, structure=declared(4.0, 1.0, 0.25), new_prices=halved)
    assert again.cost_full.total.value == pytest.approx(made.cost_full.total.value / 2)
    assert again.floor.total.value == pytest.approx(made.floor.total.value / 2)


def test_where_capacity_has_no_figure_a_measured_load_is_quoted_or_none(tmp_path):
    low, high = at_rate(tmp_path / "a", 10), at_rate(tmp_path / "b", 20)
    (beyond,) = decide(low, high)
    assert (beyond.quoted_at, beyond.runs) == ("a measured load", (high.run,)), "the highest, all keep it"
    assert any("may carry more" in note for note in beyond.notes)
    missed = at_rate(tmp_path / "c", 5, 200), at_rate(tmp_path / "d", 10, 300)
    (none,) = decide(*missed)
    assert none.cost is None and "no measured load kept the SLO" in none.reason
    assert none.against == () and none.offers == () and none.slo_met is False
    assert none.offered is None and none.load == "open loop, 5 to 10 req/s", "both missed: neither load is quoted"
    (plain,) = decide(at_rate(tmp_path / "e", 10, slo={}), at_rate(tmp_path / "f", 20, slo={}))
    assert plain.runs[0].endswith("f") and any("the cheapest of 2 measured loads" in note for note in plain.notes)
    (free,) = decide(at_rate(tmp_path / "g", 20, tier=None), at_rate(tmp_path / "h", 40, 8, tier=None))
    assert free.cost is None and "no tier" in free.reason


def test_one_load_is_a_quote_of_that_load_and_says_so(tmp_path):
    (made,) = decide(at_rate(tmp_path / "a", 10))
    assert made.quoted_at == "a measured load"
    assert any(note.startswith("a quote of this one load, not of capacity") for note in made.notes)


def test_a_search_that_missed_its_promise_is_not_priced_by_its_ladder(tmp_path):
    """A closed loop has no queue of arrivals to miss a promise by: beside an open loop it never sets a price."""
    for name, spec, ttft in (("open", SPEC, 900), ("closed", replace(SPEC, mode="closed", concurrency=4), 50)):
        write_run(tmp_path / "s" / name, rows(ttft_ms=ttft), model=MODEL, spec=replace(spec, slo={"ttft": 0.5}))
    done = run_price(tmp_path / "s")
    assert done.return_value == 4 and "Charge " not in done.stdout


def test_repeats_are_added_up_and_the_best_is_not_picked(tmp_path):
    one = summary(tmp_path / "a", [good(i, i * 10**8) for i in range(400)], spec=CLOSED)
    two = summary(tmp_path / "b", [good(i, i * 12 * 10**7) for i in range(400)], spec=CLOSED)
    (made,) = decide(one, two)
    seconds = one.window.duration_s + two.window.duration_s
    assert made.cost_full.total.value == pytest.approx(seconds / 1000 / 9600 * 1e6)
    a, b = one.cost.usd_per_1m_total.value, two.cost.usd_per_1m_total.value
    assert made.cost_full.total.high - made.cost_full.total.value == pytest.approx(12.706 * (b - a) / 2, rel=0.01)
    assert len(made.runs) == 2 and any("2 repeats" in note for note in made.notes)


def test_a_load_counts_only_when_all_its_repeats_kept_the_slo(tmp_path):
    kept = summary(tmp_path / "a", slo={"ttft": 0.5})
    missed = summary(tmp_path / "b", rows(ttft_ms=900), {"ttft": 0.5})
    (made,) = decide(kept, missed)
    assert made.cost is None and made.slo_met is False and "(best: 100.0%" in made.reason


def test_cached_input_that_one_repeat_did_not_count_is_not_known(tmp_path):
    counted, silent = summary(tmp_path / "a", rows(cached=6)), summary(tmp_path / "b", rows(cached=None))
    (made,) = decide(counted, silent, structure=declared(4.0, 1.0, 0.25))
    assert made.mix.cached_input is None and made.mix.uncached_input == 6400
    assert made.cost_full.cached_input.value is None


def test_every_replica_is_paid_for(tmp_path):
    replicas = [Replica(index=k, base_url=f"http://127.0.0.1:{k + 1}/v1") for k in range(3)]
    (made,), (one,) = decide(summary(tmp_path / "a", replicas=replicas)), decide(summary(tmp_path / "b"))
    assert made.replicas == 3 and made.fleet_usd_per_month == pytest.approx(3 * 3.6 * 730)
    assert made.cost_full.total.value == pytest.approx(3 * one.cost_full.total.value)
    assert made.capacity_tokens_per_month == pytest.approx(one.capacity_tokens_per_month), "the same tokens came out"


def test_tiers_and_models_are_apart_and_cheapest_first(tmp_path):
    dear = summary(tmp_path / "a", tier=replace(TIER, name="dear", usd_per_hour=9.0))
    cheap = summary(tmp_path / "b", tier=replace(TIER, name="cheap", usd_per_hour=1.0))
    simulated = summary(tmp_path / "c", evidence="simulated")
    none = summary(tmp_path / "d", tier=None)
    made = decide(none, dear, simulated, cheap)
    assert [c.tier for c in made] == ["cheap", TIER.name, "dear", None]
    assert made[1].evidence == "simulated x list price"
    assert "no tier" in made[-1].reason


def test_a_closed_loop_or_other_traffic_is_another_decision(tmp_path):
    """A closed loop slows down with its server, short answers are other work: neither may be the cheap load."""
    plain = summary(tmp_path / "a")
    closed = summary(tmp_path / "b", spec=replace(SPEC, mode="closed", concurrency=4))
    capped = replace(plain, run="c", plan=replace(plain.plan, max_output_tokens=4))
    chat = replace(plain, run="d", load=replace(plain.load, endpoint="chat"))
    made = decide(plain, closed, capped, chat)
    assert sorted(c.runs for c in made) == sorted((s.run,) for s in (plain, closed, capped, chat))
    (loop,) = [c for c in made if c.runs == (closed.run,)]
    assert any(note.startswith("closed loop") for note in loop.notes)
    assert any("one run: the interval" in note for note in loop.notes)


def test_a_closed_loop_beside_an_open_one_makes_no_price_list(tmp_path):
    write_run(tmp_path / "a", rows(), model=MODEL)
    write_run(tmp_path / "b", rows(), model=MODEL, spec=replace(SPEC, mode="closed", concurrency=4))
    both = run_price(tmp_path / "a", tmp_path / "b").output
    assert both.count("What to charge") == 1
    assert "closed-loop runs of this system were left out" in " ".join(both.split())
    alone = run_price(tmp_path / "b").output
    assert alone.count("What to charge") == 1 and "left out" not in alone


def test_what_is_doubtful_about_the_chosen_load_is_said(tmp_path):
    (sure,) = decide(at_rate(tmp_path / "sure", 20))
    assert not any("doubt" in note for note in sure.notes)
    assert any("may carry more" in note for note in sure.notes)
    assert any("the cost at this load, which was given" in note for note in sure.notes)
    (kept,) = decide(at_rate(tmp_path / "kept", 20, 3))
    assert any("kept, but not beyond doubt: ttft <= 500 ms" in note and "by 99.25%" in note for note in kept.notes)
    (made,) = decide(at_rate(tmp_path / "low", 20), at_rate(tmp_path / "high", 40, 100, tokens=6))
    assert "other parts of the trace" in " ".join(made.notes)


def test_dummy_weights_and_the_terms_of_a_price_are_said_before_it(tmp_path):
    tier = replace(TIER, note="3 years, all upfront")
    write_run(tmp_path / "r", rows(), model="m:dummy", model_facts={"source": "dummy"}, tier=tier)
    text = " ".join(run_price(tmp_path / "r").output.split())
    assert text.index("CAUTION. Dummy weights") < text.index("Charge ")
    assert "a price list; 3 years, all upfront" in text
    assert "limit of the measurement, duration: 40.0 s; ramp and drain weigh much" in text, "a price from 40 s says so"


def test_a_floor_is_no_lower_bound_where_nothing_was_saturated(tmp_path):
    """The cheapest load that was tried is no proof that none is cheaper."""
    for rate, slow in ((20, 0), (40, 100)):
        folder = tmp_path / "sweep" / f"r{rate}"
        at_rate(folder, rate, slow)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["plan"]["planned_rate"], manifest["spec"]["slo"] = float(rate), {"ttft": 0.5}
        (folder / MANIFEST).write_text(json.dumps(manifest))
    text = " ".join(run_price(tmp_path / "sweep").output.split())
    assert "no honest price" not in text
    assert re.search(r"floor: all tokens \S+ USD per 1M, 100 % utilisation at 40 req/s", text)
    assert "a higher load may cost less unless this one saturated the servers" in text


def test_the_slo_is_named_as_it_was_judged(tmp_path):
    s = summary(tmp_path / "r", slo={"ttft_p95": 0.5, "tpot": 0.08})
    assert slo_words(s) == "tpot <= 80 ms for 99 % of requests, ttft_p95 <= 500 ms"


def test_invalid_runs_never_come_in(tmp_path):
    with pytest.raises(ValueError, match="INVALID"):
        decide(summary(tmp_path / "r", status="stopped"))


# ----------------------------------------------------------------------------------------------------------- re-pricing


def test_a_new_price_is_stamped_and_nothing_is_measured_again(tmp_path):
    s = summary(tmp_path / "r")
    new = replace(TIER, usd_per_hour=1.8, source="contract", date="2026-11-20", purchase="reserved")
    (before,), (after,) = decide(s), decide(s, new_prices={TIER.name: new})
    assert after.cost_full.total.value == pytest.approx(before.cost_full.total.value / 2)
    assert after.capacity_tokens_per_month == pytest.approx(before.capacity_tokens_per_month), "the measurement stands"
    assert after.measured == before.measured
    assert (after.basis.date, after.basis.purchase, after.basis.source) == ("2026-11-20", "reserved", "contract")
    assert (after.basis.measured_with.date, after.basis.measured_with.usd_per_hour) == (TIER.date, 3.6)
    with pytest.raises(UsageError, match="other hardware"):
        decide(s, new_prices={TIER.name: replace(new, vcpu=64)})


@pytest.mark.parametrize(("date", "old"), [("2026-11-01", False), ("2026-01", True), ("2025-11-20", True), ("?", True)])
def test_an_old_price_is_marked(tmp_path, date, old):
    (made,) = decide(summary(tmp_path / "r", tier=replace(TIER, date=date)), today=dt.date(2026, 11, 22))
    assert made.basis.old == old
    assert any(note.startswith("OLD") for note in made.notes) == old


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("test.large=1", "NAME=USD@SOURCE@DATE"), ("test.large=1@a@soon", "day it was read"),
        ("test.large=0@a@2026-11-01", "above 0"), ("test.large=nan@a@2026-11-01", "above 0"),
        ("test.large=x@a@2026-11-01", "above 0"), ("test.large=1@@2026-11-01", "source"),
        ("test.large=1@a@2999-01-01", "day it was read"), ("test.larg=1@a@2026-11-01", "test.large"),
    ],
)  # fmt: skip
def test_a_tier_price_without_its_facts_is_refused(text, words):
    with pytest.raises(UsageError, match=words.replace(".", r"\.")):
        parse_tier_price(text, {TIER.name: TIER})


def test_a_tier_price():
    name, tier = parse_tier_price("test.large=0.62@mail of a@b.example@2026-11-20@spot", {TIER.name: TIER})
    assert (name, tier.usd_per_hour, tier.source) == ("test.large", 0.62, "mail of a@b.example")
    assert (tier.date, tier.purchase) == ("2026-11-20", "spot")
    assert parse_tier_price("test.large=1@a@2026-11-20", {TIER.name: TIER})[1].purchase == TIER.purchase


def test_a_tiers_file_prices_old_runs_again(tmp_path):
    write_run(tmp_path / "r", rows(), model=MODEL)
    tiers = tmp_path / "tiers.toml"
    entry = {
        "instance": "test.large", "provider": "test", "accelerator_count": 0, "vcpu": 2, "memory_gib": 8.0,
        "usd_per_hour": 1.8, "purchase": "reserved", "region": "nowhere-1", "source": "contract", "date": "2026-11-20",
    }  # fmt: skip
    tiers.write_text('["test.large"]\n' + "".join(f"{k} = {json.dumps(v)}\n" for k, v in entry.items()))
    before = json.loads(run_price(tmp_path / "r", "--format", "json").stdout)["charges"][0]
    after = json.loads(run_price(tmp_path / "r", "--format", "json", "--re-price", tiers).stdout)["charges"][0]
    assert after["cost_full"]["total"]["value"] == pytest.approx(before["cost_full"]["total"]["value"] / 2)
    assert (after["basis"]["date"], after["basis"]["measured_with"]["date"]) == ("2026-11-20", TIER.date)
    assert "priced again, not measured again" in " ".join(run_price(tmp_path / "r", "--re-price", tiers).stdout.split())
    tiers.write_text(tiers.read_text().replace("test.large", "other"))
    assert isinstance(run_price(tmp_path / "r", "--re-price", tiers).exception, UsageError)


# --------------------------------------------------------------------------------------------------------- build or buy


def test_build_or_buy(tmp_path):
    s = summary(tmp_path / "r", rows(cached=6), spec=CLOSED)
    prices = read_list_prices()
    found = find_list_prices(prices, MODEL, ["gpt-5-mini"])
    mix = decide(s)[0].mix
    (llama, mini) = (next(p for p in found if p.name == "meta.llama3-1-8b-instruct-v1:0"), prices.prices["gpt-5-mini"])
    assert api_usd(llama, mix) == pytest.approx(4800 * 0.22 / 1e6), "no cached price: the input price"
    assert api_usd(mini, mix) == pytest.approx((800 * 0.25 + 2400 * 0.025 + 1600 * 2.0) / 1e6)
    for usd, verdict in ((3.6, "buy"), (0.01, "build")):
        tier = replace(TIER, usd_per_hour=usd)
        (made,) = decide(s, new_prices={TIER.name: tier})
        made = compare_with_api(made, TERMS, found, llama.family)
        offer = next(a for a in made.against if a.price is llama)
        assert offer.verdict == verdict
        even = made.cost_full.total.value / 0.22
        assert offer.break_even_utilisation.value == pytest.approx(even)
        assert offer.own_share.value == pytest.approx(even / 0.3)
        if even <= 1:
            assert offer.break_even_tokens_per_month == pytest.approx(made.fleet_usd_per_month / 0.22 * 1e6)
        else:
            assert offer.break_even_tokens_per_month is None, "no volume helps a fleet that costs more at full load"
        value = made.cost_full.total.value
        unsure = replace(made.cost_full.total, low=min(0.05, value), high=max(0.5, value))
        doubt = replace(made, cost_full=replace(made.cost_full, total=unsure))
        (close,) = compare_with_api(doubt, TERMS, [llama], llama.family).against
        assert close.verdict == "too close to call", "the interval lies on both sides of the API's price"
        doubt = replace(made, cost_full=replace(made.cost_full, total=replace(unsure, low=0.01, high=None)))
        (unknown,) = compare_with_api(doubt, TERMS, [llama], llama.family).against
        assert unknown.verdict == "not known", "how dear own tokens may be is not known"
        assert [a.same_model for a in made.against] == sorted((a.same_model for a in made.against), reverse=True)
        assert not made.against[-1].same_model and "another model" in made.against[-1].notes[0]


# ----------------------------------------------------------------------------------------------------------- the terms


@pytest.mark.parametrize(
    "change",
    [
        {"margin": 1.0}, {"margin": -0.1}, {"margin": math.nan}, {"utilisation": 0.0}, {"utilisation": 1.1},
        {"batch_discount": 1.0}, {"volume": parse_volume("1e9:-10%,1e8:-20%")}, {"volume": parse_volume("0:-100%")},
        {"volume": parse_volume("-5:-10%")},
    ],
)  # fmt: skip
def test_terms_that_make_no_sense(change):
    with pytest.raises(UsageError):
        Terms(**({"margin": 0.4, "utilisation": 0.3} | change))


@pytest.mark.parametrize("text", ["", "many", "1e9:10%", "1e9:-10", "1e9:-ten%", "inf:-10%", "1e9:-nan%"])
def test_volume_tiers_that_nobody_can_read(text):
    with pytest.raises(UsageError, match="volume tier"):
        parse_volume(text)


def test_a_given_load_is_not_held_against_an_api(tmp_path):
    """What a token costs at the load of an open loop is no estimate of what it costs on servers that are used."""
    prices = read_list_prices()
    found = find_list_prices(prices, MODEL, ["gpt-5-mini"])
    (made,) = decide(summary(tmp_path / "r"))
    assert {a.verdict for a in compare_with_api(made, TERMS, found, "llama").against} == {"not known"}


def test_volume_tiers():
    assert [(v.from_tokens, v.discount) for v in parse_volume("0, 1e9:-10%,1e10:-20%")] == [
        (0, 0),
        (1e9, 0.1),
        (1e10, 0.2),
    ]


@pytest.mark.parametrize("weights", [(0, 0, 0), (-1, 0, 4), (1, 0, math.nan), (math.inf, 0, 1)])
def test_weights_that_make_no_sense(weights):
    with pytest.raises(UsageError):
        TokenWeights(method="declared ratio", input=weights[0], cached_input=weights[1], output=weights[2])


# -------------------------------------------------------------------------------------------------------- command line


def test_what_is_printed(tmp_path):
    write_run(tmp_path / "r", rows(), model=MODEL, spec=CLOSED)
    text = run_price(tmp_path / "r", "--volume", "0,1e9:-50%", "--batch-discount", "50%").output
    for words in ("Charge 46.273 USD (95 %: 4", "at 30 % utilisation is 27.764 USD (95 %: 2", "30 % utilisation",
                  "40 % of the price is gross margin", "BELOW COST", "Build or buy", "on-demand", "2026-11-01",
                  "declared ratio 1 : 4", "whole run", "no markup", "an opinion", "litellm",
                  "input + output tokens"):  # fmt: skip
        assert words in " ".join(text.split()), words
    markdown = run_price(tmp_path / "r", "--format", "md").output
    assert "| USD per 1M tokens |" in markdown and "\n\n\n" not in markdown


def test_csv_is_what_is_printed_with_numbers_in_full(tmp_path):
    write_run(tmp_path / "r", rows(), model="=cmd|evil")
    asked = (tmp_path / "r", "--against", "gpt-5-mini")
    table = list(csv.reader(io.StringIO(run_price(*asked, "--format", "csv").stdout)))
    whole = json.loads(run_price(*asked, "--format", "json").stdout)["charges"][0]
    prices = dict(zip(table[0], table[4], strict=True))
    assert float(prices["PRICE (95 %)"]) == whole["offers"][0]["prices"]["total"]["value"]
    assert all("=cmd|evil" in row[0] and not row[0].startswith("=") for row in table if row[0])
    assert next(row for row in table if "gpt-5-mini" in row[1])[2] == "0.25/0.025/2"


@pytest.mark.parametrize(
    ("name", "results", "manifest", "code", "words"),
    [
        ("invalid", rows(30), {"status": "stopped"}, 3, "status: stopped"),
        ("empty", [], {}, 5, "min_requests: "),
        ("one request", rows(1), {}, 1, "needs 5 requests"),
        ("no tier", rows(30), {"tier": None}, 1, "no tier"),
        ("no usage", [replace(r, input_tokens=None, output_tokens=None) for r in rows(30)], {}, 1, "usage missing"),
        (
            "no usage, tpot promised",
            [replace(r, input_tokens=None, output_tokens=None) for r in rows(30)],
            {"spec": replace(SPEC, slo={"tpot": 0.1})},
            1,
            "usage missing on 30 of 30 requests",
        ),
        ("slo missed", rows(30), {"spec": replace(SPEC, slo={"ttft": 0.001})}, 4, "kept the SLO"),
    ],
)
def test_what_has_no_price_says_why(tmp_path, name, results, manifest, code, words):
    write_run(tmp_path / "r", results, **manifest)
    for kind in ("text", "json", "csv", "md"):
        done = run_price(tmp_path / "r", "--format", kind)
        assert done.exception is None, (name, kind)
        assert done.return_value == code, (name, kind)
        if kind == "text" or (kind == "json" and words != "Charge"):
            assert words in " ".join(done.stdout.split()), (name, kind)
        assert not re.search(r"\b(nan|NaN|inf|None|Infinity)\b", done.stdout), (name, kind)
        if kind == "json":
            assert all(math.isfinite(n) for n in numbers(json.loads(done.stdout)))


def test_prices_of_the_kinds_add_up_to_the_bill(tmp_path):
    """With cached input apart or not, and at the price of an API, too."""
    write_run(tmp_path / "r", rows(cached=6), model=MODEL)
    for ratio in ("1:4:0.25", "4"):
        made = json.loads(run_price(tmp_path / "r", "--ratio", ratio, "--format", "json").stdout)["charges"][0]
        mix, cost = made["mix"], {kind: q["value"] for kind, q in made["cost_full"].items()}
        kinds = ("uncached_input", "cached_input", "output")
        own = [cost["input"], cost["input"] if cost["cached_input"] is None else cost["cached_input"], cost["output"]]
        whole = sum(mix[kind] for kind in kinds)
        assert sum(usd * mix[kind] for usd, kind in zip(own, kinds, strict=True)) == pytest.approx(39_980)
        assert cost["total"] * whole == pytest.approx(39_980)
        assert made["denominator"].startswith("input + output tokens of successful")


def test_an_invalid_run_does_not_hide_the_others(tmp_path):
    write_run(tmp_path / "sweep" / "a", rows(), model=MODEL)
    write_run(tmp_path / "sweep" / "b", rows(), model=MODEL, status="stopped")
    done = run_price(tmp_path / "sweep", "--format", "json")
    document = json.loads(done.stdout)
    assert done.return_value == 3
    assert len(document["charges"]) == 1 and document["charges"][0]["reason"] is None
    assert "status" in document["refused"][0][1][0]


def test_runs_are_found(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / "sweep" / name, rows(5))
    assert [p.name for p in find_runs(tmp_path / "sweep")] == ["one", "two"]
    assert [p.name for p in find_runs(tmp_path / "sweep" / "t*")] == ["two"]
    assert [p.name for p in find_runs(tmp_path / "sw*")] == ["one", "two"]
    assert [p.name for p in find_runs(tmp_path / "sweep" / "one")] == ["one"]
    for nothing in (tmp_path / "none", tmp_path / "none*", tmp_path / "sweep" / "one" / "run.json"):
        with pytest.raises(ResultsError):
            find_runs(nothing)
    twice = run_price(tmp_path / "sweep", tmp_path / "sweep" / "one")
    assert isinstance(twice.exception, UsageError)


@pytest.mark.parametrize(
    "args",
    [
        ("--margin", "40"), ("--margin", "markup"), ("--margin", "100%"), ("--utilisation", "0%"), ("--ratio", "0:0"),
        ("--ratio", "1:2:3:4"), ("--ratio", "x"), ("--ratio", "-1"), ("--against", "gpt-nope"), ("--volume", "lots"),
    ],
)  # fmt: skip
def test_wrong_options_end_with_2(tmp_path, args):
    import click

    write_run(tmp_path / "r", rows(30))
    done = CliRunner().invoke(price, [str(tmp_path / "r"), *args], standalone_mode=False)
    assert isinstance(done.exception, UsageError | click.UsageError), done.output
    assert done.exception.exit_code == 2
