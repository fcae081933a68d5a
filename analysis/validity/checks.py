"""Is this run evidence? Gates make it INVALID or TOO SMALL (then it has no price); limits only narrow its conclusions.

A failing *server* is a valid measurement with bad goodput; a failing *measurement* is INVALID. Source of the idea:
MLPerf Inference LoadGen, which ends every run with VALID or INVALID and advice. What each check asks, and why, is in
METRICS.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import date

import numpy as np

from harness.analysis import metrics
from harness.analysis.check import MIN_REQUESTS, Check, check, limit
from harness.analysis.metrics import MISMATCH_BOUND, Counts, Window
from harness.analysis.price_age import OLD_DAYS, age_days
from harness.analysis.rates import KIND_WORDS
from harness.analysis.rows.read import Run
from harness.analysis.stats.intervals import samples_needed
from harness.analysis.validity import generator, tokens
from harness.analysis.validity.counters import server_counters, server_restarts, shared_addresses, token_books
from harness.analysis.validity.servers import cold_start, starved

FAILED_BOUND = 0.01
SUCCESS_BOUND = 0.5
SHORT_S = 60.0
HARDWARE_BOUND = 0.25
RATE_BOUND = 0.05
WASTED_BOUND = 0.05
HELD_BOUND = 0.8
UNFINISHED_BOUND = 0.01
ORDER = (
    MIN_REQUESTS, "status", "files", "rows", "success", "lag", "arrival_process", "workers", "generator_cpu",
    "generator_lag", "littles_law", "replicas", "starved", "server_restarts", "engine_fits_tier", "input_tokens",
    "prompt_text", "usage_text", "token_books", "server_counters", "output_tokens", "usage", "answer_fields",
    "recorded_tokens", "bulk_delivery", "chunk_tokens", "failures", "unfinished", "cold_start", "sent_again",
    "sample_size", "duration", "stamps", "generator_stall", "planned_rate", "arrivals", "concurrency", "wasted_time",
    "shared_host", "hardware", "price_date",
)  # fmt: skip


def check_run(
    run: Run, counts: Counts, window: Window | None, slo: Mapping[str, float] | None = None, least: int | None = None
) -> list[Check]:
    """All checks, gates first. ``slo``: limits to judge by, s; ``least``: requests that a verdict needs. None: as the
    run was made.
    """
    bound_s = generator.lag_bound_s(run, run.manifest.spec.slo if slo is None else slo)
    shared = shared_addresses(run)
    found = [
        *_whole(run, counts, run.manifest.spec.min_requests if least is None else least),
        *_kept_back(run, counts), *_typical(run, window), *_load(run, window), *_machine(run),
        *generator.checks(run, bound_s), *tokens.checks(run), starved(run, window), cold_start(run),
        server_restarts(run, shared), token_books(run, shared), server_counters(run, shared),
    ]  # fmt: skip
    return sorted(found, key=lambda one: ORDER.index(one.name))


def _whole(run: Run, counts: Counts, least: int) -> list[Check]:
    """Gates: the run went to its end, with a row that can be true for each request, and workers and servers lived."""
    manifest, tier, logs = run.manifest, run.manifest.tier, "look at that {}'s log, then run again"
    status = manifest.status if manifest.reason is None else f"{manifest.status}: {manifest.reason}"
    wrong = {
        "lost": counts.lost + run.lost_warmup, "duplicated": run.duplicates, "not in the plan": run.unknown,
        "impossible": run.impossible,
    }  # fmt: skip
    rows = ", ".join(f"{n} {what}" for what, n in wrong.items() if n)
    ended = {w.index: w.exit for w in manifest.workers}
    workers = [f"worker {k}: {why}" for k, why in ended.items() if why is not None]
    workers += [f"worker {k}: no last words" for k in range(manifest.spec.workers) if k not in ended]
    replicas = [f"replica {r.index}: {r.exit}" for r in manifest.replicas if r.exit is not None]
    # no accelerator's price on a CPU engine's speed
    fits, kind = None, "no tier" if tier is None else "server not started by us"
    if manifest.engine == "simulated":
        kind = "simulated"
    elif tier is not None and manifest.engine != "url":
        fits = (manifest.engine == "vllm-cpu") == (tier.accelerator is None)
        kind = f"{manifest.engine} on {tier.accelerator or 'CPU'}"
    files = "; ".join(run.problems) or f"{len(run.sources)} result files"
    return [
        # 29 good requests are compatible with a server that fails one in ten
        check(MIN_REQUESTS, counts.offered >= least, f"{counts.offered} measured requests",
              f"at least {least} (--min-requests)", "too small to judge: send more requests"),
        check("status", manifest.status == "complete", status, "complete", "run it again and let it end by itself"),
        check("files", not run.problems, files, "all readable", "look at the worker logs, then run again"),
        check("rows", not rows, rows or "one row for each request", "one row for each request",
              "a load worker lost or spoiled its record: look at the worker logs, then run again"),
        check("workers", not workers, "; ".join(workers) or f"{len(ended)} ended as asked", "all ended as asked",
              logs.format("worker")),
        check("replicas", not replicas, "; ".join(replicas) or f"{len(manifest.replicas)} lived",
              "all live to the end", logs.format("server")),
        check("engine_fits_tier", fits, kind, "same kind",
              "nothing to do" if fits is None else "choose the tier that the server really ran on"),
    ]  # fmt: skip


def _kept_back(run: Run, counts: Counts) -> list[Check]:
    """What became of the requests. Most must be answered, or refused for overload (429, 503): a server that turns most
    of a workload away for another reason was not measured on it.
    """
    failed = metrics.by_error(run)[1]
    overloaded, offered, succeeded = failed.get("overloaded", 0), counts.offered, counts.succeeded
    # turns not sent since the one before them failed are shared out like the failures that were sent
    sent = sum(n for name, n in failed.items() if name not in {"cancelled", "stopped", "unsent", "no_history"})
    refused = overloaded * (1 + failed.get("no_history", 0) / sent) if sent else 0.0
    advice = "see the errors, try one request by hand, then run again"
    if counts.unfinished and not counts.failed:
        advice = "none failed, the others had not ended: let the run end by itself"
    again = (
        "no connection, 429 or 503, as --retries wants it: their latency holds the pause"
        if run.manifest.spec.retries
        else "kept connections were closed as they were used: a balancer or server closes them sooner than it says "
        "(Keep-Alive: timeout); no fault of the model's, and their latency holds the second try"
    )

    def few(name: str, n: int, of: int, words: str, most: float, advice: str, more: str = "") -> Check:
        ok = n / of <= most if of else None
        return limit(name, ok, f"{n} of {of} {words}{more}", f"at most {most:.0%}", advice)

    missing = metrics.tokens(run.rows).missing
    usage = few(
        "usage", missing, succeeded, "successful requests", MISMATCH_BOUND,
        "tokens are not known, so there is no token price: use a server that honours stream_options.include_usage",
    )  # fmt: skip
    return [
        check(
            "success", succeeded > 0 and succeeded + refused >= SUCCESS_BOUND * offered,
            f"{succeeded} of {offered} succeeded"
            + (f", {refused:.0f} refused as overloaded (429, 503)" if refused else ""),
            f"at least {SUCCESS_BOUND:.0%}" + (", refusals for overload among them" if refused else ""), advice,
        ),
        replace(usage, observed=f"missing on {usage.observed}", bound=f"missing on {usage.bound}"),
        few("failures", counts.failed + counts.lost, offered, "failed", FAILED_BOUND,
            "latency and tokens are those of the successes, a flattering choice when many fail; see the errors",
            f", {overloaded} of them refused as overloaded (429, 503)" if overloaded else ""),
        few("unfinished", counts.unfinished, offered, "in flight or unsent at the end", UNFINISHED_BOUND,
            "the slowest answers are missing from every latency: a longer drain, or less load than the server's queue"),
        limit("sent_again", run.resent <= FAILED_BOUND * counts.sent, f"{run.resent} of {counts.sent} sent again",
              f"at most {FAILED_BOUND:.0%}", again),
    ]  # fmt: skip


def _typical(run: Run, window: Window | None) -> list[Check]:
    """Limits: long enough, of enough requests, and little time in flight lost on what did not succeed."""
    n = int(run.rows.success.sum())
    short = [f"p{p * 100:.0f} needs {samples_needed(p)}" for p in (0.5, 0.9, 0.95, 0.99) if n < samples_needed(p)]
    spent = metrics.service_e2e(run.rows)
    known = np.isfinite(spent)
    ok, wasted, advice = None, "no window", "nothing to do"
    if window is not None and known.any():
        held = float(metrics.in_flight(run.rows, window).sum()) * window.bin_s
        share = 1 - float(spent.sum(where=known)) / held if held > 0 else 0.0
        ok, wasted = share <= WASTED_BOUND, f"{max(0.0, share):.1%}"
        advice = "servers spent time on requests that did not succeed; the price carries it"
    return [
        limit("sample_size", not short, f"{n} succeeded" + (f": {', '.join(short)}" if short else ""),
              f"{samples_needed(0.99)} for p99", "send more requests (a longer trace or a higher --limit)"),
        limit("duration", None if window is None else window.duration_s >= SHORT_S,
              "no window" if window is None else f"{window.duration_s:.1f} s", f"at least {SHORT_S:.0f} s",
              "ramp and drain weigh much in a short run: send more requests"),
        limit("wasted_time", ok, wasted, f"at most {WASTED_BOUND:.0%} of the time in flight", advice),
    ]  # fmt: skip


def _load(run: Run, window: Window | None) -> list[Check]:
    """Limits: the planned rate went out, at times of its own as users send, or the slots of a closed loop were busy."""
    kind, slots = run.load_kind, run.manifest.spec.concurrency
    advice = "a slow server slows its own load here, so queueing is hidden: replay the trace's times for latency claims"
    slowed = "the offered load was not the planned one: more --workers, or let the run end by itself"
    if kind == "sessions":
        advice = (
            "turns wait for the answer before them, so a slow server slows its own load: what users wait there is in "
            "no latency but in session lag, and the load is sessions started per second"
        )
        slowed = (
            "a slow server slowed sessions that wait for it: judge it by sessions started per second and by session lag"
        )
    asked, sent_s = metrics.planned_rate(run), run.rows.sent_s[metrics.was_sent(run.rows)]
    rate, busy = f"within {RATE_BOUND:.0%} of the plan", f"at least {HELD_BOUND:.0%} of the slots, on average"
    planned = limit("planned_rate", None, "no planned rate", rate, "nothing to do")
    if asked is not None and len(sent_s) >= 2 and (span_s := float(np.ptp(sent_s))) > 0:
        got = (len(sent_s) - 1) / span_s
        ok = abs(got / asked - 1) <= RATE_BOUND
        planned = limit("planned_rate", ok, f"{got:.3g} of {asked:.3g} req/s", rate, slowed)
    held = limit("concurrency", None, "open loop or no window", busy, "nothing to do")
    if kind == "closed" and slots and window is not None:
        mean = float(metrics.in_flight(run.rows, window).mean())
        idle = "ramp, drain or an idle generator took much of the window: send more requests per slot"
        held = limit("concurrency", mean >= HELD_BOUND * slots, f"{mean:.2f} of {slots} in flight", busy, idle)
    return [planned, limit("arrivals", kind == "open", KIND_WORDS[kind], KIND_WORDS["open"], advice), held]


def _machine(run: Run) -> list[Check]:
    """Limits: the machine is the tier's, free of load workers, and its price is not old."""
    manifest, tier, host = run.manifest, run.manifest.tier, run.manifest.host
    shared = manifest.load_shares_server_host
    where = {None: "not known", True: "same machine", False: "other machine"}[shared]
    if shared and manifest.load_shares_server_cores is False:
        shared, where = False, "same machine, processors apart"
    size = f"cores as the tier, memory within {HARDWARE_BOUND:.0%}"
    age = f"at most {OLD_DAYS} days before the run"
    hardware = limit("hardware", None, "server's machine not known", size, "nothing to do")
    price = limit("price_date", None, "no tier", age, "nothing to do")
    if tier is not None:
        days = age_days(tier.date, date.fromisoformat(manifest.created[:10]))
        price = limit("price_date", (days or 0) <= OLD_DAYS, f"{days} days", age, "look the price up again")
        if days is None:
            price = limit("price_date", False, f"date {tier.date!r} cannot be read", age, "give the price a date")
    if tier is not None and manifest.load_shares_server_host is True:
        ok = host.cores == tier.vcpu and abs(host.memory_gib / tier.memory_gib - 1) <= HARDWARE_BOUND
        has = f"{host.cores} cores, {host.memory_gib:g} GiB; {tier.instance} has {tier.vcpu}, {tier.memory_gib:g} GiB"
        if (why := manifest.model_facts.get("dtype_reason")) is not None:
            ok, has = False, f"{has}; {why}"
        advice = f"speed is this machine's, the price {tier.instance}'s: an approximation until run on that instance"
        hardware = limit("hardware", ok, has, size, advice)
    advice = "the server had less processor than its tier sells, so its price comes out too high: load from elsewhere"
    apart = limit("shared_host", None if shared is None else not shared, where, "load and server apart", advice)
    return [apart, hardware, price]
