"""A against B: what may be compared, in what they differ, each figure with a paired interval, and a verdict in words.

Runs are paired by load and seed, and must have been asked the same: trace, arrivals, SLO, evidence. What is allowed to
differ (tier, price, model, engine, its arguments, replicas) is the subject and is named. What two runs of one system
differ by from run to run is known from three pairs on: fewer are shown and not judged. `harness.compare/1` is the JSON
shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from harness.analysis.capacity.system import all_met, load_words, slo_words
from harness.analysis.compare.comparable import Difference, Pairs, differences, pair_runs, plans_differ, refusals
from harness.analysis.compare.paired import FIGURES, SHARES, Ends, PairedRun, PairFigure, pair_figures
from harness.analysis.stats.intervals import Evidence, Quantity
from harness.analysis.stats.replicates import FEWEST_PAIRS, over_pairs
from harness.errors import UsageError, unknown_name

SCHEMA = "harness.compare/1"
BY_CHANCE = 0.05
LOADS_OWN = ("cost", "throughput")
"""Figures that an open loop gives: its load sets tokens/s, and the hourly price does the rest."""
NOT_SIMULATED = ("cost", "ttft_p50", "ttft_p95", "ttft_p99", "goodput", "attainment")
"""Figures of two simulations at one load that are not judged: near saturation a step time that is a little off decides
them, and the cost has an error of its own that no pair of runs shows."""
EQUAL_SHARE = (
    "simulated at one load; compare costs by capacity (harness price A B) and latencies at an equal share of each "
    "system's own capacity"
)
INSTEAD = "measure capacity of both (harness capacity), then: harness price A B"
Verdict = Literal["better", "worse", "no difference shown", "not judged", "not known"]
JUDGED: tuple[Verdict, ...] = ("better", "worse", "no difference shown")
Outcome = Literal["fails", "holds", "undecided", "not judged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition under which a comparison fails, like ``cost > +5%``, and what became of it at each load."""

    text: str
    metric: str
    above: bool
    """True: fails when the figure moved by more than ``bound``; False: by less."""
    bound: float
    relative: bool
    """``bound`` is of B / A - 1; else of B - A in the figure's unit."""
    outcome: Outcome = "not judged"
    """fails: the whole interval lies beyond the bound. holds: none of it does. undecided: part of it does, which does
    not fail. not judged: the figure has no interval, for the reason ``why``."""
    why: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of A and B, ``difference`` = B - A and ``change`` = B / A - 1."""

    name: str
    unit: str
    a: float | None
    b: float | None
    difference: Quantity
    change: Quantity
    verdict: Verdict
    """Of B, by the interval of the difference. not judged: there is a figure and no such interval; not known: none of
    both."""
    given: bool = False
    """It is the load's own, so no run can judge it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadComparison:
    """A and B under one load."""

    load: str
    pairs: int
    """Pairs of runs."""
    a_runs: tuple[str, ...]
    b_runs: tuple[str, ...]
    requests: int
    """Paired requests over all pairs."""
    left_out: int
    """Requests that only one run of a pair was offered."""
    a_slo_met: bool | None
    b_slo_met: bool | None
    figures: tuple[Figure, ...]
    gates: tuple[Gate, ...]
    verdict: tuple[str, ...]
    """Sentences, the most important first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All of it. Not comparable: ``reasons``, and nothing else."""

    schema: str = SCHEMA
    comparable: bool
    reasons: tuple[str, ...] = ()
    differs: tuple[Difference, ...] = ()
    evidence: Evidence | None = None
    trace: str | None = None
    slo: str | None = None
    loads: tuple[LoadComparison, ...] = ()
    compared: int = 0
    """Figures with an interval, over all loads."""
    expected_by_chance: float = 0.0
    """Of these, how many would show a difference where there is none."""
    shown: int = 0
    """How many show one."""
    caution: str | None = None
    """What must be read before any verdict; None when there is nothing."""
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """A gate fails at some load."""
        return any(gate.outcome == "fails" for load in self.loads for gate in load.gates)

    @property
    def unjudged(self) -> list[str]:
        """Gates that could not be judged at some load."""
        return sorted({gate.text for load in self.loads for gate in load.gates if gate.outcome == "not judged"})


_GATE = re.compile(r"\s*([a-z_0-9]+)\s*([<>])\s*([+-]?\d+(?:\.\d+)?)\s*(%|pp|ms|s)?\s*")


def parse_gate(text: str) -> Gate:
    """A gate from ``cost > +5%``, ``ttft_p99 > +20ms`` or ``throughput < -3%``.

    ``%`` is of A's figure; of a share (attainment, error_rate) it is percentage points, as is ``pp``. Raises
    `UsageError`.
    """
    match = _GATE.fullmatch(text)
    if not match:
        raise UsageError(f"--fail-if {text!r}: write a figure, > or <, and a change, like 'cost > +5%'")
    metric, sign, number, unit = match.groups()
    if metric not in FIGURES:
        raise unknown_name("figure", metric, FIGURES)
    share, seconds = metric in SHARES, FIGURES[metric][0] == "s"
    if unit is None or (unit in ("ms", "s") and not seconds) or (unit == "pp" and not share):
        allowed = "% or pp" if share else "%, ms or s" if seconds else "%"
        raise UsageError(f"--fail-if {text!r}: the change of {metric} is in {allowed}")
    scale = {"%": 0.01, "pp": 0.01, "ms": 0.001, "s": 1.0}[unit]
    return Gate(
        text=" ".join(text.split()), metric=metric, above=sign == ">", bound=float(number) * scale,
        relative=unit == "%" and not share,
    )  # fmt: skip


def compare(a: Sequence[PairedRun], b: Sequence[PairedRun], gates: Sequence[Gate] = ()) -> Comparison:
    """A against B. Never raises on what runs contain: what cannot be compared is a reason."""
    reasons = refusals([o.summary for o in a], [o.summary for o in b])
    pairs, left, unpaired = ({}, [], []) if reasons else pair_runs(a, b)
    reasons += unpaired
    if not reasons:
        reasons = [reason for group in pairs.values() for pair in group for reason in plans_differ(*pair)]
    if reasons:
        return Comparison(comparable=False, reasons=tuple(dict.fromkeys(reasons)))
    first = a[0].summary
    loads = tuple(_at_load(group, gates) for group in pairs.values())
    judged = [f for load in loads for f in load.figures if f.verdict in JUDGED]
    return Comparison(
        comparable=True, differs=tuple(differences(first, b[0].summary)), evidence=first.evidence,
        trace=first.plan.trace, slo=slo_words(first), loads=loads, compared=len(judged),
        expected_by_chance=len(judged) * BY_CHANCE, shown=sum(f.verdict in ("better", "worse") for f in judged),
        caution=_caution(pairs), notes=tuple(_notes(pairs, left)),
    )  # fmt: skip


def _caution(pairs: Pairs) -> str | None:
    """Few pairs: what differs between any two runs of one system is not known, and would look like a finding."""
    fewest = min(len(group) for group in pairs.values())
    if fewest >= FEWEST_PAIRS:
        return None
    return (
        f"{few_words(fewest)}: two runs of one system differ, too, and by how much is known from {FEWEST_PAIRS} pairs "
        f'on. Make them in turns, A B B A: a sweep file with A and B, order = "abba" and repeats = {FEWEST_PAIRS} '
        "(harness sweep FILE), then: harness compare FOLDER"
    )


def few_words(pairs: int) -> str:
    """That so few pairs of runs are not judged."""
    return "one pair: not judged" if pairs == 1 else f"{pairs} pairs: not judged"


def _notes(pairs: Pairs, left: Sequence[str]) -> list[str]:
    notes, every = list(left), [pair for group in pairs.values() for pair in group]
    for a, b in every:
        if a.summary.plan_sha256 == b.summary.plan_sha256:
            continue
        totals = [float(np.nansum(o.planned_input_tokens)) for o in (a, b)]
        notes.append(
            "the plans were made apart from one trace and seed"
            + (f"; input tokens of B: {totals[1] / totals[0] - 1:+.1%}" if totals[0] and totals[0] != totals[1] else "")
        )
        break
    if any(a.summary.plan.conversation == "live" for a, _ in every):
        served = [sum(pair[k].summary.tokens.input or 0 for pair in every) for k in (0, 1)]
        notes.append(
            "live conversations: each turn carries the answers of its own run, so the two sides were not asked word "
            "for word the same" + (f"; input tokens served, B: {served[1] / served[0] - 1:+.1%}" if all(served) else "")
        )
    if any(a.summary.load.mode == "open" for a, _ in every):
        notes.append(
            "open loop: the load is given, so throughput is the load's own and cost that at this load, not at the most "
            f"that the hardware can carry: neither is judged; {INSTEAD}"
        )
    return notes


def _at_load(pairs: Sequence[tuple[PairedRun, PairedRun]], gates: Sequence[Gate]) -> LoadComparison:
    found = [pair_figures(a, b) for a, b in pairs]
    evidence = pairs[0][0].summary.evidence
    first_a = pairs[0][0]
    given = LOADS_OWN if first_a.summary.load.mode == "open" else ()
    unsure = NOT_SIMULATED if "step_source" in first_a.summary.server.model_facts else ()
    by_name = {name: [figs[name] for figs, _, _ in found] for name in FIGURES}
    spread = _run_to_run({name: pair for name, pair in by_name.items() if name not in (*SHARES, *given)})
    figures = {
        name: _over(
            name,
            by_name[name],
            evidence,
            given=name in given,
            spread=0.0 if name in SHARES else spread,
            unsure=EQUAL_SHARE if name in unsure else None,
        )
        for name in FIGURES
    }
    met_a, met_b = (all_met([pair[k].summary for pair in pairs]) for k in (0, 1))
    judged = tuple(judge(gate, figures[gate.metric]) for gate in gates)
    return LoadComparison(
        load=load_words(first_a.summary), pairs=len(pairs), a_runs=tuple(a.summary.run for a, _ in pairs),
        b_runs=tuple(b.summary.run for _, b in pairs), requests=sum(n for _, n, _ in found),
        left_out=sum(left for _, _, left in found), a_slo_met=met_a, b_slo_met=met_b, figures=tuple(figures.values()),
        gates=judged,
        verdict=tuple(_sentences(figures, met_a, met_b, len(pairs), slo=first_a.summary.slo is not None)),
    )  # fmt: skip


def _run_to_run(figures: Mapping[str, Sequence[PairFigure]]) -> float:
    """Standard deviation of the change over the pairs, as a share: the median of all figures that have one.

    A run that is fast is so in most figures. Of a dozen figures over three pairs some agree by luck, and would show a
    difference where there is none: none is taken to be steadier than this.
    """
    spreads = [
        float(np.std([p.b / p.a - 1 for p in pairs if p.a and p.b is not None], ddof=1))
        for pairs in figures.values()
        if len(pairs) >= FEWEST_PAIRS and all(p.a and p.a > 0 and p.b is not None for p in pairs)
    ]
    return float(np.median(spreads)) if spreads else 0.0


def _over(
    name: str, pairs: Sequence[PairFigure], evidence: Evidence, *, given: bool, spread: float, unsure: str | None = None
) -> Figure:  # fmt: skip
    """One figure over the pairs of runs.

    ``given``: the load's own, which no run can judge; ``spread``: of its change from pair to pair, at least;
    ``unsure``: why it is not judged, whatever the runs say.
    """
    unit, less_is_better = FIGURES[name]
    n = sum(p.n for p in pairs)
    blank = Quantity(value=None, n=n, unit=unit, evidence=evidence, note=next((p.note for p in pairs if p.note), None))
    known = [(p.a, p.b) for p in pairs if p.a is not None and p.b is not None]
    if len(known) < len(pairs):
        change = replace(blank, unit="share of A")
        return Figure(
            name=name, unit=unit, a=None, b=None, difference=blank, change=change, verdict="not known", given=given
        )  # fmt: skip
    why = few_words(len(pairs)) if len(pairs) < FEWEST_PAIRS else None
    why = f"the load's own; {INSTEAD}" if given else unsure or why
    blank = replace(blank, note=why or blank.note)

    def over(values: Sequence[float], ends: Sequence[Ends], unit: str, spread: float) -> Quantity:
        value, low, high = over_pairs(values, ends, spread)
        return replace(blank, unit=unit, value=value, low=None if why else low, high=None if why else high)

    mean_a, mean_b = (sum(values) / len(known) for values in zip(*known, strict=True))
    difference = over([b - a for a, b in known], [p.difference for p in pairs], unit, spread * mean_a)
    change = replace(blank, unit="share of A", note="A is 0")
    if all(a > 0 for a, _ in known):
        change = over([b / a - 1 for a, b in known], [p.change for p in pairs], "share of A", spread)
    verdict: Verdict = "not judged"
    if difference.low is not None and difference.high is not None:
        less, more = difference.high < 0, difference.low > 0
        verdict = "no difference shown" if not (less or more) else "better" if less == less_is_better else "worse"
    return Figure(
        name=name, unit=unit, a=mean_a, b=mean_b, difference=difference, change=change, verdict=verdict, given=given
    )  # fmt: skip


def judge(gate: Gate, figure: Figure) -> Gate:
    """What became of a gate: only an interval that lies wholly beyond the bound fails it."""
    q = figure.change if gate.relative else figure.difference
    if q.low is None or q.high is None:
        return replace(gate, outcome="not judged", why=q.note or figure.difference.note or "no interval")
    beyond = (q.low > gate.bound, q.high > gate.bound) if gate.above else (q.high < gate.bound, q.low < gate.bound)
    return replace(gate, outcome="fails" if beyond[0] else "undecided" if beyond[1] else "holds")


def _sentences(
    figures: Mapping[str, Figure], met_a: bool | None, met_b: bool | None, pairs: int, *, slo: bool
) -> list[str]:
    said = [] if pairs >= FEWEST_PAIRS else [f"{few_words(pairs).capitalize()}; the figures stand below."]
    cost = _cost_sentence(figures["cost"], both_kept=bool(met_a and met_b), slo=slo)
    said += [cost] if cost else []
    said += [_slo_sentence(met_a, met_b)] if slo and not (met_a and met_b) else []
    for metric in ("ttft", "tpot"):
        known = [f for p in (99, 95, 50) if (f := figures[f"{metric}_p{p}"]).verdict in JUDGED]
        # the furthest percentile that is known, and where it shows nothing the furthest that does
        shown = next((f for f in known if f.verdict != "no difference shown"), None)
        said += [_figure_sentence(f) for f in dict.fromkeys((known[0], shown or known[0]))] if known else []
    others = (figures[name] for name in ("throughput", "goodput", "error_rate"))
    return said + [_figure_sentence(f) for f in others if f.verdict in ("better", "worse")]


def _slo_sentence(met_a: bool | None, met_b: bool | None) -> str:
    """Of an SLO that not both are known to have kept; None: it could not be judged."""
    words = {True: "kept the SLO", False: "missed the SLO", None: "could not be judged by the SLO"}
    unfit = " and ".join(name for name, met in (("A", met_a), ("B", met_b)) if not met)
    return f"A {words[met_a]} and B {words[met_b]}: the cost of {unfit} is none to sell at."


def _cost_sentence(f: Figure, *, both_kept: bool, slo: bool) -> str | None:
    if f.a is None or f.b is None:
        return f"Cost cannot be compared: {f.difference.note or f.change.note or 'no interval'}."
    if f.verdict == "not judged":
        if not f.given:
            return None  # for want of pairs, as everything here
        return (
            f"At this load A costs {f.a:.3g} and B {f.b:.3g} USD per 1M tokens. That is not judged: in an open loop "
            f"the load is given, and below capacity both could carry more for the same money. Instead, {INSTEAD}."
        )
    value, low, high = _ends(f.change)
    at = " at the same load and SLO, which both kept" if both_kept else "" if slo else " (no SLO was given)"
    if f.verdict == "no difference shown":
        within = f"{_percent(1 + low)} % to {_percent(1 + high)} %"
        return f"No difference in cost is shown{at}: B costs {within} of A's (95 %)."
    word = "less" if f.verdict == "better" else "more"
    return f"B costs {_percent(abs(value))} % +- {_percent(max(high - value, value - low))} % {word}{at}."


def _figure_sentence(f: Figure) -> str:
    """How much better or worse B is: in ms, in percentage points, or in percent of A."""
    metric, _, percentile = f.name.partition("_p")
    name = f"{metric.upper()} p{percentile}" if percentile else f.name.replace("_", " ").capitalize()
    relative = (100, "%") if f.change.low is not None else (1, f.unit)
    factor, unit = {"s": (1000, "ms"), "share of requests": (100, "points")}.get(f.unit, relative)
    q = f.change if unit == "%" else f.difference
    value, low, high = (end * factor for end in _ends(q))
    ends = f"95 %: {low:+.3g} to {high:+.3g} {unit}"
    if f.verdict == "no difference shown":
        return f"{name}: no difference shown ({ends})."
    return f"{name} of B is {abs(value):.3g} {unit} {f.verdict} ({ends})."


def _ends(q: Quantity) -> tuple[float, float, float]:
    """Value and interval of a figure that was judged."""
    assert q.value is not None and q.low is not None and q.high is not None
    return q.value, q.low, q.high


def _percent(share: float) -> str:
    return f"{share * 100:.0f}" if abs(share) >= 0.1 else f"{share * 100:.2g}"
