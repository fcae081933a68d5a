"""Which of several systems or loads is the cheapest, where what was measured tells them apart, and no name where not.

Run against run only repeats know how much two runs of one system differ (`analysis.stats.replicates`), as in `harness
compare`; at capacity the interval over many probes does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from analysis.capacity.serving_config import ServingConfig
from analysis.capacity.system import Key, load_of, system_of
from analysis.report.figures import price, state_of, within
from analysis.stats.intervals import Quantity
from analysis.stats.replicates import FEWEST_PAIRS, over_replicates
from analysis.summary import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something with a price, and whether its interval knows what differs from run to run."""

    name: str
    cost: Quantity
    judged: bool


def cheapest(runs: Sequence[tuple[str, Summary]], found: Sequence[ServingConfig]) -> str:
    """One sentence or two on cost: at capacity where two systems or more have one, else of the runs by their labels."""
    priced = [s for s in found if s.loop == "open" and s.usd_per_1m_total.value is not None]
    if len(priced) > 1:
        at_capacity = [Candidate(name=s.name, cost=s.usd_per_1m_total, judged=True) for s in priced]
        return _words(at_capacity, "Cheapest at the load that just keeps the SLO")
    kept = [(label, s) for label, s in runs if state_of(s) == "valid" and s.cost.usd_per_1m_total.value is not None]
    # a closed loop hides the queue that users would see; figures of two kinds of evidence are not held together
    for prefer in _PREFERRED:
        kept = [run for run in kept if prefer(run[1])] or kept
    if not kept:
        return "No run has a price and kept its SLO."
    which = "that kept its SLO" if kept[0][1].slo is not None else "(no SLO was given)"
    groups: dict[tuple[Key, Key], list[tuple[str, Summary]]] = {}
    for label, s in kept:
        # repeats of a trace's own arrivals have one rate exactly; drawn ones have that of their stages in the load
        rate = None if s.plan.stages else s.rates.request_rate.value
        groups.setdefault((system_of(s), (*load_of(s), rate)), []).append((label, s))
    return _words(
        [_of_repeats(members) for members in groups.values()],
        f"The cheapest VALID run {which}",
        kept[0][1].load.mode,
    )


_PREFERRED: tuple[Callable[[Summary], bool], ...] = (
    lambda s: s.evidence == "measured", lambda s: s.load.mode == "open",
)  # fmt: skip


def _of_repeats(members: Sequence[tuple[str, Summary]]) -> Candidate:
    name = members[0][0] + (f" and {len(members) - 1} more of it" if len(members) > 1 else "")
    cost = over_replicates([s.cost.usd_per_1m_total for _, s in members])
    # in an open loop the load is given, and what it costs below capacity is not the cost of the system
    judged = len(members) >= FEWEST_PAIRS and members[0][1].load.mode == "closed"
    return Candidate(name=name, cost=cost, judged=judged)


def _words(candidates: Sequence[Candidate], what: str, loop: str = "closed") -> str:
    ranked = sorted(candidates, key=lambda c: c.cost.value or 0.0)
    best, rest = ranked[0], ranked[1:]
    if not rest:
        return f"{what} is {_price(best)}."
    if all(_below(best, other) for other in rest):
        return f"{what} is {_price(best)}; next is {_price(rest[0])}."
    near = next(other for other in rest if not _below(best, other))
    if loop == "open":
        return (
            f"{what}: not judged. {_price(best)}, {_price(near)}: in an open loop the load is given, and below "
            "capacity any of them could carry more for the same money; measure capacity of each (harness capacity)."
        )
    if best.judged and near.judged:
        return f"{what}: no difference shown between {_price(best)} and {_price(near)}; their intervals overlap."
    return (
        f"{what}: not judged. {_price(best)}, {_price(near)}: of one or two runs each it is not known how much two "
        f"runs of one system differ; {FEWEST_PAIRS} repeats of each would tell (harness compare)."
    )


def _below(best: Candidate, other: Candidate) -> bool:
    if not (best.judged and other.judged) or best.cost.high is None or other.cost.low is None:
        return False
    return best.cost.high < other.cost.low


def _price(c: Candidate) -> str:
    assert c.cost.value is not None
    return f"{c.name}: {price(c.cost.value)} USD per 1M tokens" + (within(c.cost, price) if c.judged else "")
