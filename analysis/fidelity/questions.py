"""Is what was planned the trace, and what was sent the plan? Each question with a number, a bound and a verdict.

What is changed on purpose is judged against what was asked: a plan on a faster clock is laid back onto the trace's
clock; of a thinned or superposed one its demand is asked for, with the room that chance needs; a cap on output lengths
is applied to the trace first. A question that the run cannot answer is "not comparable", and says why.

=======================  =============================================================================================
arrivals over time       share of requests in another part of the time than they belong in: half the sum of the absolute
                         differences of counts per part, over the requests
dispersion               variance / mean of counts in windows of 1, 10, 60 s; worst minute over mean; cv of the gaps
gaps                     mean distance of the sorted gaps (Wasserstein-1): Kolmogorov-Smirnov would take a jitter of
                         microseconds on an even rate for another distribution
lengths                  Kolmogorov-Smirnov distance of the token lengths
prefix reuse             share of input tokens found in an unlimited prefix cache
=======================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.fidelity.inputs import Fidelity, read_plan, read_reuse
from analysis.fidelity.planned import planned_against_source
from analysis.fidelity.sent import sent_against_planned
from analysis.rows.read import Run
from analysis.validity.prefix_cache import read_served
from harness.errors import PlanError

__all__ = ["Fidelity", "fidelity", "fidelity_text"]


def fidelity(run: Run) -> list[Fidelity]:
    """All questions to one run: planned against source, then sent against planned.

    Reads the plan's columns, and its prompts where the trace states prefixes. A plan that cannot be read leaves the one
    answer that nothing can be compared.
    """
    info = run.manifest.plan
    try:
        plan, (own, at_server) = read_plan(run), read_reuse(run)
    except PlanError as e:
        return [Fidelity(name="plan", ok=None, observed="", bound="", said=str(e))]
    return planned_against_source(info, plan, own) + sent_against_planned(
        plan, [run.rows, run.warmup], at_server, read_served(run), chat=run.manifest.spec.endpoint == "chat"
    )


def fidelity_text(answers: Sequence[Fidelity]) -> str:
    """The answers as lines of plain text, one each."""
    words = {True: "ok", False: "DIFFERS", None: "-"}
    lines = []
    for a in answers:
        bound = f"  (bound: {a.bound})" if a.ok is not None else ""
        why = f"  {a.said}" if a.said and a.ok is not True else ""
        lines.append(f"{words[a.ok]:8} {a.name:34} {a.observed}{bound}{why}".rstrip())
    return "\n".join(lines)
