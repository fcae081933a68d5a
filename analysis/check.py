"""One question to a run and its answer, and how a check words it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["VALID", "INVALID", "TOO SMALL"]
"""TOO SMALL: measured, but of too few requests to be called either."""
MIN_REQUESTS = "min_requests"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question to the run. ``ok`` None: could not be checked. A failed ``gate`` makes the run INVALID."""

    name: str
    ok: bool | None
    gate: bool
    observed: str
    bound: str
    advice: str | None
    """What to do; None when it is ok."""


def check(name: str, ok: bool | None, observed: str, bound: str, advice: str, *, gate: bool = True) -> Check:
    """A check; by default a gate. ``advice`` is dropped when it is ok."""
    return Check(name=name, ok=ok, gate=gate, observed=observed, bound=bound, advice=None if ok else advice)


def limit(name: str, ok: bool | None, observed: str, bound: str, advice: str) -> Check:
    """A check that narrows what may be concluded and leaves the run VALID."""
    return check(name, ok, observed, bound, advice, gate=False)


def verdict(checks: Iterable[Check]) -> Verdict:
    """What the gates say together. A run of too few requests is neither VALID nor INVALID, whatever else it shows."""
    failed = [c for c in checks if c.gate and c.ok is False]
    if any(c.name == MIN_REQUESTS for c in failed):
        return "TOO SMALL"
    return "INVALID" if failed else "VALID"


def ms(seconds: float) -> str:
    """Seconds in words, as milliseconds."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds * 1000:,.0f} ms"
