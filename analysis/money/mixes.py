"""The bill divided by what runs of different mixes cost on the same hardware: rows for `split.by_load_regression`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.money.quoted import mix_of
from analysis.money.split import Split, Usage, by_load_regression, not_identifiable
from analysis.money.unit_prices import Mix
from analysis.sizing.at_slo import systems
from analysis.sizing.system import Key, hardware_of, offered, system_of
from analysis.summary import Summary

METHOD = "load regression"
FEWEST = 5
"""Runs, of at least two mixes."""


def busy_runs(summaries: Sequence[Summary]) -> dict[Key, list[Summary]]:
    """By `hardware_of`: the VALID runs that saturated their servers, whatever their traffic was.

    Those are runs at or beyond the load from which more load gives no more answers (`capacity.saturation`), judged
    among the runs of the same traffic: below it idle time would be laid on tokens.
    """
    groups: dict[Key, list[Summary]] = {}
    for s in summaries:
        groups.setdefault(system_of(s), []).append(s)
    found: dict[Key, list[Summary]] = {hardware_of(s): [] for s in summaries}
    for runs in groups.values():
        for system in systems(runs):
            if system.saturated_from is not None:
                found[hardware_of(runs[0])] += [s for s in runs if offered(s) >= system.saturated_from]
    return found


def split_by_mixes(usd: float, mix: Mix, busy: Sequence[Summary], *, evidence: str) -> Split:
    """``usd`` for ``mix`` divided by a regression over the ``busy`` runs (`busy_runs`) of the same hardware."""
    mixes = [mix_of([s]) for s in busy]
    known = [(s, m) for s, m in zip(busy, mixes, strict=True) if m is not None and s.window is not None]
    if len(known) < FEWEST:
        why = (
            f"{len(known)} runs were saturated, needs {FEWEST} of mixes that differ: price several traces together, "
            "each measured up to a load from which more gives no more answers"
        )
        return not_identifiable(METHOD, why, evidence=evidence, n=len(known))
    apart = mix.cached_input is not None and all(m.cached_input is not None for _, m in known)
    cached = np.array([float(m.cached_input or 0) for _, m in known])
    uncached = np.array([float(m.uncached_input) for _, m in known])
    usage = Usage(
        input=float(mix.uncached_input + (mix.cached_input or 0)),
        cached_input=float(mix.cached_input or 0) if apart else None, output=float(mix.output),
    )  # fmt: skip
    return by_load_regression(
        usd, usage, spent=np.array([s.window.duration_s for s, _ in known if s.window is not None]),
        uncached_input=uncached if apart else uncached + cached, output=np.array([float(m.output) for _, m in known]),
        cached_input=cached if apart else None, evidence=evidence,
    )  # fmt: skip
