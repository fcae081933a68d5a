"""Is this run evidence? Gates make it INVALID or TOO SMALL (then it has no price); limits only narrow its conclusions.

A failing *server* is a valid measurement with bad goodput; a failing *measurement* is INVALID. Source of the idea:
MLPerf Inference LoadGen, which ends every run with VALID or INVALID and advice.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date

import numpy as np

from analysis import metrics
from analysis.check import MIN_REQUESTS, Check, check, limit
from analysis.metrics import Counts, Window
from analysis.offered_load import KIND_WORDS
from analysis.price_age import OLD_DAYS, age_days
from analysis.rows.read import Run
from analysis.stats.intervals import samples_needed
from analysis.validity.cold_start import cold_start
from analysis.validity.counters import server_counters, server_restarts, shared_addresses, token_books
from analysis.validity.delivery import delivery
from analysis.validity.generator import (
    arrival_process,
    generator_cpu,
    generator_lag,
    generator_stall,
    lag,
    lag_bound_s,
    littles_law,
    stamps,
)
from analysis.validity.lengths import answer_fields, input_tokens, output_tokens, recorded_tokens
from analysis.validity.starved import starved
from analysis.validity.usage import prompt_text, usage_text

FAILED_BOUND = 0.01
SUCCESS_BOUND = 0.5
SHORT_S = 60.0
HARDWARE_BOUND = 0.25
RATE_BOUND = 0.05
WASTED_BOUND = 0.05
HELD_BOUND = 0.8
UNFINISHED_BOUND = 0.01


def check_run(
    run: Run, counts: Counts, window: Window | None, slo: Mapping[str, float] | None = None, least: int | None = None
) -> list[Check]:
    """All checks, gates first. ``slo``: limits to judge by, s; ``least``: requests that a verdict needs. None: as the
    run was made.
    """
    bound_s = lag_bound_s(run, run.manifest.spec.slo if slo is None else slo)
    shared = shared_addresses(run)
    return [
        min_requests(counts, run.manifest.spec.min_requests if least is None else least),
        status(run), files(run), rows(run, counts), success(run, counts), lag(run, bound_s), arrival_process(run),
        workers(run), generator_cpu(run), generator_lag(run, bound_s), littles_law(run), replicas(run),
        starved(run, window), server_restarts(run, shared), engine_fits_tier(run), input_tokens(run),
        prompt_text(run), usage_text(run), token_books(run, shared),
        server_counters(run, shared), output_tokens(run), usage(run), answer_fields(run),
        recorded_tokens(run), *delivery(run),
        failures(run, counts), unfinished(counts), cold_start(run), sent_again(run, counts), sample_size(run),
        duration(window), stamps(run), generator_stall(run, bound_s), planned_rate(run), arrivals(run),
        concurrency(run, window), wasted_time(run, window), shared_host(run), hardware(run), price_date(run),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- gates


def min_requests(counts: Counts, least: int) -> Check:
    """Enough measured requests for a verdict: 29 good ones are compatible with a server that fails one in ten."""
    observed, bound = f"{counts.offered} measured requests", f"at least {least} (--min-requests)"
    return check(MIN_REQUESTS, counts.offered >= least, observed, bound, "too small to judge: send more requests")


def status(run: Run) -> Check:
    """The run went to its end."""
    said = run.manifest.status
    observed = said if run.manifest.reason is None else f"{said}: {run.manifest.reason}"
    return check("status", said == "complete", observed, "complete", "run it again and let it end by itself")


def files(run: Run) -> Check:
    """Every worker's result file is there and readable, and the plan is the manifest's."""
    observed = "; ".join(run.problems) or f"{len(run.sources)} result files"
    return check("files", not run.problems, observed, "all readable", "look at the worker logs, then run again")


def rows(run: Run, counts: Counts) -> Check:
    """Every planned request has exactly one row, and the row can be true."""
    lost = counts.lost + run.lost_warmup
    bad = {"lost": lost, "duplicated": run.duplicates, "not in the plan": run.unknown, "impossible": run.impossible}
    observed = ", ".join(f"{n} {what}" for what, n in bad.items() if n) or "one row for each request"
    advice = "a load worker lost or spoiled its record: look at the worker logs, then run again"
    return check("rows", not any(bad.values()), observed, "one row for each request", advice)


def success(run: Run, counts: Counts) -> Check:
    """Most requests were answered, or refused for overload (429, 503): a server that turns most of a workload away for
    any other reason was not measured on it. One that answers nothing was not measured at all.
    """
    refused = _refused(run)
    ok = counts.succeeded > 0 and counts.succeeded + refused >= SUCCESS_BOUND * counts.offered
    observed = f"{counts.succeeded} of {counts.offered} succeeded"
    observed += f", {refused:.0f} refused as overloaded (429, 503)" if refused else ""
    advice = "see the errors, try one request by hand, then run again"
    if counts.unfinished and not counts.failed:
        advice = "none failed, the others had not ended: let the run end by itself"
    bound = f"at least {SUCCESS_BOUND:.0%}" + (", refusals for overload among them" if refused else "")
    return check("success", ok, observed, bound, advice)


def _refused(run: Run) -> float:
    """Requests that the server turned away for overload. Turns that were not sent because the one before them failed
    are shared out like the failures that were sent.
    """
    failed = metrics.by_error(run)[1]
    ours = {"cancelled", "stopped", "unsent", "no_history"}
    refused, sent = failed.get("overloaded", 0), sum(n for name, n in failed.items() if name not in ours)
    return refused * (1 + failed.get("no_history", 0) / sent) if sent else 0.0


def workers(run: Run) -> Check:
    """Every load worker ended as asked."""
    ended = {w.index: w.exit for w in run.manifest.workers}
    bad = [f"worker {k}: {why}" for k, why in ended.items() if why is not None]
    bad += [f"worker {k}: no last words" for k in range(run.manifest.spec.workers) if k not in ended]
    observed = "; ".join(bad) or f"{len(ended)} ended as asked"
    return check("workers", not bad, observed, "all ended as asked", "look at that worker's log, then run again")


def replicas(run: Run) -> Check:
    """Every replica lived to the end of the run."""
    bad = [f"replica {r.index}: {r.exit}" for r in run.manifest.replicas if r.exit is not None]
    observed = "; ".join(bad) or f"{len(run.manifest.replicas)} lived"
    return check("replicas", not bad, observed, "all live to the end", "look at that server's log, then run again")


def engine_fits_tier(run: Run) -> Check:
    """The priced hardware is of the kind that was measured: no accelerator's price on a CPU engine's speed."""
    tier, engine = run.manifest.tier, run.manifest.engine
    if tier is None or engine == "url":
        why = "no tier" if tier is None else "server not started by us"
        return check("engine_fits_tier", None, why, "same kind", "nothing to do")
    observed = f"{engine} on {tier.accelerator or 'CPU'}"
    fits = (engine == "vllm-cpu") == (tier.accelerator is None)
    return check("engine_fits_tier", fits, observed, "same kind", "choose the tier that the server really ran on")


# --------------------------------------------------------------------------------------------------------------- limits


def usage(run: Run) -> Check:
    """The server said how many tokens each successful request had."""
    missing, total = metrics.tokens(run.rows).missing, int(run.rows.success.sum())
    advice = "tokens are not known, so there is no token price: use a server that honours stream_options.include_usage"
    share = missing / total if total else None
    observed = f"missing on {missing} of {total} successful requests"
    bound = f"missing on at most {metrics.MISMATCH_BOUND:.0%}"
    return limit("usage", None if share is None else share <= metrics.MISMATCH_BOUND, observed, bound, advice)


def failures(run: Run, counts: Counts) -> Check:
    """Few requests failed. Latency percentiles speak of successes only."""
    bad, offered = counts.failed + counts.lost, counts.offered
    share = bad / offered if offered else None
    advice = "latency and tokens are those of the successes, a flattering choice when many fail; see the errors"
    refused = metrics.by_error(run)[1].get("overloaded", 0)
    observed = f"{bad} of {offered} failed"
    observed += f", {refused} of them refused as overloaded (429, 503)" if refused else ""
    ok = None if share is None else share <= FAILED_BOUND
    return limit("failures", ok, observed, f"at most {FAILED_BOUND:.0%}", advice)


def sent_again(run: Run, counts: Counts) -> Check:
    """Few requests were sent more than once. Their latency counts from the first time."""
    bound = f"at most {FAILED_BOUND:.0%}"
    observed = f"{run.resent} of {counts.sent} sent again"
    advice = (
        "no connection, 429 or 503, as --retries wants it: their latency holds the pause"
        if run.manifest.spec.retries
        else "kept connections were closed as they were used: a balancer or server closes them sooner than it says "
        "(Keep-Alive: timeout); no fault of the model's, and their latency holds the second try"
    )
    return limit("sent_again", run.resent <= FAILED_BOUND * counts.sent, observed, bound, advice)


def unfinished(counts: Counts) -> Check:
    """Few requests were cut off by the end of the run: those are the slow ones, and no latency has them."""
    share = counts.unfinished / counts.offered if counts.offered else None
    advice = "the slowest answers are missing from every latency: a longer drain, or less load than the server's queue"
    observed = f"{counts.unfinished} of {counts.offered} in flight or unsent at the end"
    ok = None if share is None else share <= UNFINISHED_BOUND
    return limit("unfinished", ok, observed, f"at most {UNFINISHED_BOUND:.0%}", advice)


def sample_size(run: Run) -> Check:
    """Enough successful requests for every percentile that is printed."""
    n = int(run.rows.success.sum())
    short = [f"p{p * 100:.0f} needs {samples_needed(p)}" for p in (0.5, 0.9, 0.95, 0.99) if n < samples_needed(p)]
    observed = f"{n} succeeded" + (f": {', '.join(short)}" if short else "")
    bound = f"{samples_needed(0.99)} for p99"
    return limit("sample_size", not short, observed, bound, "send more requests (a longer trace or a higher --limit)")


def duration(window: Window | None) -> Check:
    """The run lasted long enough to call its rates typical."""
    ok = None if window is None else window.duration_s >= SHORT_S
    observed = "no window" if window is None else f"{window.duration_s:.1f} s"
    advice = "ramp and drain weigh much in a short run: send more requests"
    return limit("duration", ok, observed, f"at least {SHORT_S:.0f} s", advice)


def planned_rate(run: Run) -> Check:
    """Requests went out at the planned rate (open loop)."""
    asked = metrics.planned_rate(run)
    sent_s = run.rows.sent_s
    sent = np.isfinite(sent_s)
    n, span_s = int(sent.sum()), float(sent_s.max(where=sent, initial=0) - sent_s.min(where=sent, initial=np.inf))
    bound = f"within {RATE_BOUND:.0%} of the plan"
    if asked is None or n < 2 or span_s <= 0:
        return limit("planned_rate", None, "no planned rate", bound, "nothing to do")
    got = (n - 1) / span_s
    advice = (
        "a slow server slowed sessions that wait for it: judge it by sessions started per second and by session lag"
        if run.load_kind == "sessions"
        else "the offered load was not the planned one: more --workers, or let the run end by itself"
    )
    observed = f"{got:.3g} of {asked:.3g} req/s"
    return limit("planned_rate", abs(got / asked - 1) <= RATE_BOUND, observed, bound, advice)


def arrivals(run: Run) -> Check:
    """Requests came at times of their own, as users do, not when a slot was free."""
    kind = run.load_kind
    advice = "a slow server slows its own load here, so queueing is hidden: replay the trace's times for latency claims"
    if kind == "sessions":
        advice = (
            "turns wait for the answer before them, so a slow server slows its own load: what users wait there is in "
            "no latency but in session lag, and the load is sessions started per second"
        )
    return limit("arrivals", kind == "open", KIND_WORDS[kind], KIND_WORDS["open"], advice)


def concurrency(run: Run, window: Window | None) -> Check:
    """A closed loop kept its slots busy."""
    asked = run.manifest.spec.concurrency
    bound = f"at least {HELD_BOUND:.0%} of the slots, on average"
    if run.manifest.spec.mode == "open" or not asked or window is None:
        return limit("concurrency", None, "open loop or no window", bound, "nothing to do")
    held = float(metrics.in_flight(run.rows, window).mean())
    advice = "ramp, drain or an idle generator took much of the window: send more requests per slot"
    return limit("concurrency", held >= HELD_BOUND * asked, f"{held:.2f} of {asked} in flight", bound, advice)


def wasted_time(run: Run, window: Window | None) -> Check:
    """Little time in flight went into requests that did not succeed."""
    spent = metrics.service_e2e(run.rows)
    known = np.isfinite(spent)
    bound = f"at most {WASTED_BOUND:.0%} of the time in flight"
    if window is None or not known.any():
        return limit("wasted_time", None, "no window", bound, "nothing to do")
    held = float(metrics.in_flight(run.rows, window).sum()) * window.bin_s
    wasted = 1 - float(spent.sum(where=known)) / held if held > 0 else 0.0
    advice = "servers spent time on requests that did not succeed; the price carries it"
    return limit("wasted_time", wasted <= WASTED_BOUND, f"{max(0.0, wasted):.1%}", bound, advice)


def shared_host(run: Run) -> Check:
    """Load workers did not take processor time from the server they measure."""
    shared, cores = run.manifest.load_shares_server_host, run.manifest.load_shares_server_cores
    observed = {None: "not known", True: "same machine", False: "other machine"}[shared]
    if shared and cores is False:
        shared, observed = False, "same machine, processors apart"
    advice = "the server had less processor than its tier sells, so its price comes out too high: load from elsewhere"
    return limit("shared_host", None if shared is None else not shared, observed, "load and server apart", advice)


def hardware(run: Run) -> Check:
    """The machine that was measured is the size of the tier whose price is used."""
    tier, host = run.manifest.tier, run.manifest.host
    bound = f"cores as the tier, memory within {HARDWARE_BOUND:.0%}"
    if tier is None or run.manifest.load_shares_server_host is not True:
        return limit("hardware", None, "server's machine not known", bound, "nothing to do")
    ok = host.cores == tier.vcpu and abs(host.memory_gib / tier.memory_gib - 1) <= HARDWARE_BOUND
    observed = f"{host.cores} cores, {host.memory_gib:g} GiB; {tier.instance} has {tier.vcpu}, {tier.memory_gib:g} GiB"
    advice = f"speed is this machine's, the price {tier.instance}'s: an approximation until run on that instance"
    if (why := run.manifest.model_facts.get("dtype_reason")) is not None:
        ok, observed = False, f"{observed}; {why}"
    return limit("hardware", ok, observed, bound, advice)


def price_date(run: Run) -> Check:
    """The price was read not long before the run."""
    tier = run.manifest.tier
    bound = f"at most {OLD_DAYS} days before the run"
    if tier is None:
        return limit("price_date", None, "no tier", bound, "nothing to do")
    age = age_days(tier.date, date.fromisoformat(run.manifest.created[:10]))
    if age is None:
        return limit("price_date", False, f"date {tier.date!r} cannot be read", bound, "give the price a date")
    return limit("price_date", age <= OLD_DAYS, f"{age} days", bound, "look the price up again")
