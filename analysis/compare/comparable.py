"""What may be compared, in what two sides differ, and which run is held against which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.analysis.capacity.system import Key, grouped, load_of, load_words, servers_of, slo_words, tier_words
from harness.analysis.compare.paired import PairedRun
from harness.analysis.summary import Summary
from harness.analysis.validity.prefix_cache import NAME as WARM
from harness.plan.spec import load_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that may differ, and does."""

    name: str
    a: str
    b: str


_SAME: dict[str, tuple[Callable[[Summary], object], str]] = {
    "trace": (lambda s: (s.plan.trace, s.plan.trace_sha256[:12]), "replay the same trace on both"),
    "evidence": (lambda s: s.evidence, "measured and simulated figures are not held against each other"),
    "SLO": (lambda s: slo_words(s) or "none", "judge both by one SLO (--slo)"),
    "loop": (lambda s: s.load.mode, "replay both in the same kind of loop"),
    "API": (lambda s: (s.load.endpoint, "streamed" if s.load.stream else "not streamed"), "ask both the same way"),
    "request body": (lambda s: str(sorted(s.load.extra_body.items(), key=str)), "give both the same --extra-body"),
    "output lengths": (lambda s: s.load.output_lengths, "give both the same --output-lengths"),
    "duration": (lambda s: s.load.duration_s, "give both the same --duration"),
    "time limits": (lambda s: (s.load.timeout_s, s.load.stall_s), "give both the same --timeout and --stall"),
    "retries": (lambda s: s.load.retries, "give both the same --retries"),
    "sessions": (lambda s: s.plan.sessions, "give both the same --sessions"),
    "conversation": (lambda s: s.plan.conversation, "give both the same --conversation"),
    "warm-up": (lambda s: (s.plan.warmup_requests, s.load.warmup_s, s.load.ramp_s), "give both the same --warmup"),
}
"""What must be the same in all runs, and what to do when it is not."""

SUBJECT: dict[str, Callable[[Summary], object]] = {
    "label": lambda s: s.label or "none",
    "servers": lambda s: " ".join(servers_of(s)) or "started for the run",
    "model": lambda s: s.model,
    "tier": lambda s: tier_words(s) or "none",
    "replicas": lambda s: s.cost.replicas,
    "price": lambda s: (
        f"{s.tier.usd_per_hour:g} USD/h, {s.tier.purchase}, {s.tier.region}, {s.tier.date}" if s.tier else "none"
    ),
    "engine": lambda s: f"{s.engine} {s.server.version or ''}".strip(),
    "engine arguments": lambda s: " ".join(s.server.args) or "none",
    "balance": lambda s: s.load.balance,
    "harness": lambda s: f"{s.versions.get('harness', '?')} {s.git or ''}".strip(),
    "load generator's machine": lambda s: f"{s.host.cores} x {s.host.cpu}, {s.host.memory_gib:g} GiB",
}
"""What may differ, and is named."""
_ANY = ("harness", "load generator's machine")
"""What may differ within a side, too."""


def differences(a: Summary, b: Summary) -> list[Difference]:
    """The subjects in which two runs differ, the facts of their models (weights, number format) one by one."""
    asked = [(name, str(ask(a)), str(ask(b))) for name, ask in SUBJECT.items()]
    facts_a, facts_b = a.server.model_facts, b.server.model_facts
    asked += [
        (fact, facts_a.get(fact, "not said"), facts_b.get(fact, "not said")) for fact in sorted({*facts_a, *facts_b})
    ]
    return [Difference(name=name, a=in_a, b=in_b) for name, in_a, in_b in asked if in_a != in_b]


def refusals(a: Sequence[Summary], b: Sequence[Summary]) -> list[str]:
    """Why two sides may not be compared, whatever their loads: each with what to do."""
    reasons = []
    for side, runs in (("A", a), ("B", b)):
        reasons += [
            f"{side}: {s.run} is {s.verdict}: {'; '.join(s.reasons) or 'no reason given'}"
            for s in runs
            if s.verdict != "VALID"
        ]
        reasons += [
            f"{side}: {s.run}: its costs and latencies are lower bounds, by the chip's data sheet, which are "
            "compared with nothing: simulate a tier whose kernels are known, or measure"
            for s in runs
            if s.costs_at_least
        ]
        warm = [(s, c) for s in runs for c in s.checks if c.name == WARM and c.ok is False]
        reasons += [f"{side}: {s.run}: {c.observed}: {c.advice}" for s, c in warm]
        others = ([d.name for d in differences(runs[0], s) if d.name not in _ANY] for s in runs[1:])
        if other := next(filter(None, others), None):
            reasons.append(f"{side} holds runs of different systems ({', '.join(other)} differ): name one system")
    for name, (ask, advice) in _SAME.items():
        answers = {side: list(dict.fromkeys(_words(ask(s)) for s in runs)) for side, runs in (("A", a), ("B", b))}
        if answers["A"] != answers["B"] or len(answers["A"]) > 1:
            reasons.append(f"{name}: A {' / '.join(answers['A'])}, B {' / '.join(answers['B'])}; {advice}")
    return reasons


def _words(answer: object) -> str:
    if isinstance(answer, tuple):
        return " ".join("-" if part is None else str(part) for part in answer)
    return "not set" if answer is None else str(answer)


Pairs = Mapping[Key, list[tuple[PairedRun, PairedRun]]]


def pair_runs(a: Sequence[PairedRun], b: Sequence[PairedRun]) -> tuple[Pairs, list[str], list[str]]:
    """(pairs by load, loads that only one side has, why nothing can be paired)."""

    def place(o: PairedRun) -> tuple[int, str, str]:
        return load_seed(o.summary.plan.seed), o.summary.created, o.summary.run

    sides = [grouped(sorted(side, key=place), lambda o: load_of(o.summary)) for side in (a, b)]
    shared = [load for load in sides[0] if load in sides[1]]
    left = [
        f"left out: only {name} has {load_words(side[load][0].summary)}"
        for name, side in zip("AB", sides, strict=True)
        for load in side
        if load not in shared
    ]
    if not shared:
        said = [
            f"{name} {' / '.join(load_words(group[0].summary) for group in side.values())}, "
            + " / ".join(f"{group[0].summary.plan.requests} requests" for group in side.values())
            for name, side in zip("AB", sides, strict=True)
        ]
        return {}, left, [f"load: {', '.join(said)}; replay both with the same rate, arrivals and length"]
    pairs, reasons = {}, []
    for load in shared:
        runs = [side[load] for side in sides]
        seeds = [[load_seed(o.summary.plan.seed) for o in side] for side in runs]
        if seeds[0] == seeds[1]:
            pairs[load] = list(zip(*runs, strict=True))
        else:
            in_a, in_b = (", ".join(map(str, side)) for side in seeds)
            reasons.append(f"seed: A {in_a}, B {in_b}; each repeat needs one of the same seed")
    return pairs, left, reasons


def plans_differ(a: PairedRun, b: PairedRun) -> list[str]:
    """Why two runs of one trace, load and seed were not asked for the same requests all the same."""
    if a.summary.plan_sha256 == b.summary.plan_sha256:
        return []
    _, in_a, in_b = np.intersect1d(a.request_id, b.request_id, assume_unique=True, return_indices=True)
    out_a, out_b = a.planned_output_tokens[in_a], b.planned_output_tokens[in_b]
    if a.summary.plan.requests != b.summary.plan.requests or not np.array_equal(out_a, out_b, equal_nan=True):
        return ["plan: same trace, load and seed, but other requests or output tokens; run one and the same plan"]
    return []
