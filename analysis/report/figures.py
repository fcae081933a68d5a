"""Figures in words and in cells of tables. No arithmetic beyond units and percent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from harness.analysis.report.document import Cell
from harness.analysis.stats.intervals import Quantity
from harness.analysis.summary import Summary

Style = Callable[[float], str]


def value(q: Quantity, style: Style) -> str:
    """A figure, ``n<299`` when the sample is too small for it, ``n≈60<299`` when its requests are too alike to count as
    more than 60, ``-`` when it is not known.
    """
    if q.value is not None:
        return style(q.value)
    if q.needed is None:
        return "-"
    return f"n<{q.needed}" if q.worth is None else f"n≈{q.worth}<{q.needed}"


def interval(q: Quantity | None, style: Style, none: str = "") -> str:
    """The 95 % interval; ``none`` where there is none."""
    if q is None or (q.low is None and q.high is None):
        return none
    if q.low is None:
        return f"at most {style(q.high or 0.0)}"
    return f"at least {style(q.low)}" if q.high is None else f"{style(q.low)} to {style(q.high)}"


def within(q: Quantity, style: Style) -> str:
    """The 95 % interval in brackets behind its figure, that of a simulated cost as such; empty where there is none."""
    said = interval(q, style)
    kind = "simulated" if q.evidence == "simulated x list price" else "95 %"
    return f" ({kind}: {said})" if said else ""


def hourly(value: float | None) -> str:
    """The price of an hour as its source states it, not rounded: who checks a bill begins with it."""
    return "-" if value is None else f"{value:,.10g}"


def figure(value: float | None) -> str:
    """A number to four significant digits; a dash when there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def price(value: float | None) -> str:
    """USD to three significant digits, cents from 100 on; a dash when there is none."""
    if value is None:
        return "-"
    return f"{value:,.2f}" if value >= 100 else f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{value:.0%}" if value in (0, 1) else f"{value:.2%}" if value > 0.99 else f"{value:.1%}"


def milliseconds(seconds: float) -> str:
    """Seconds shown as milliseconds."""
    ms = seconds * 1000
    return f"{ms:,.0f}" if abs(ms) >= 99.95 else f"{ms:.1f}" if abs(ms) >= 9.995 else f"{ms:.2f}"


def in_seconds(value: float) -> str:
    """A time of seconds with its unit: 87.1 ms, 2 s."""
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"


def quantity(q: Quantity, style: Style) -> Cell:
    """A figure with its interval under it, or why there is none."""
    said = value(q, style)
    if q.value is None:
        return Cell(said, note=q.note if said == "-" else None, mark="quiet")
    return Cell(said, note=interval(q, style) or None, sort=q.value)


def price_cell(s: Summary, q: Quantity) -> Cell:
    """A price with its interval; quiet where the SLO was missed: not a price to sell at. Why there is none stands
    beside the verdict (`verdict_note`): a column of prices is too narrow for words.
    """
    cell = usd(q)
    return replace(cell, mark="quiet") if q.value is None or state_of(s) in ("missed", "unknown") else cell


def usd(q: Quantity | None, *, bare: bool = False) -> Cell:
    """USD with its interval under it, or ``bare``; a dash when not known."""
    if q is None or q.value is None:
        return Cell("-")
    return Cell(price(q.value), note=None if bare else interval(q, price) or None, sort=q.value)


def load_of(summary: Summary, by_rate: bool) -> float | None:
    """Where a run stands on the axis of load: requests/s asked for, or requests in flight. Sessions that wait do not
    send what they were asked for when the server is slow: they stand at what was really sent.
    """
    if by_rate and summary.offered.kind == "sessions":
        return summary.offered.sent_rate.value
    return (summary.rates.request_rate if by_rate else summary.rates.concurrency).value


def load_cell(s: Summary) -> Cell:
    """The load of a run: planned requests/s, requests in flight in a closed loop, sessions/s of sessions that wait."""
    if s.offered.kind == "sessions":
        started, sent = s.offered.session_rate.value, s.offered.sent_rate.value
        return Cell(figure(started), note=f"sessions/s, {figure(sent)} req/s sent", sort=started)
    is_open = s.offered.kind == "open"
    load = load_of(s, by_rate=is_open)
    return Cell(figure(load), note=None if load is None else "req/s" if is_open else "in flight", sort=load)


def state_of(s: Summary) -> str:
    """valid, missed (VALID, but the SLO was not kept), unknown (nobody can know whether it was), invalid or small."""
    if s.verdict != "VALID":
        return "invalid" if s.verdict == "INVALID" else "small"
    if s.slo is None or s.slo.met:
        return "valid"
    return "unknown" if s.slo.met is None else "missed"


VERDICTS = {
    "valid": "VALID", "missed": "VALID, SLO missed", "unknown": "VALID, SLO not judged", "invalid": "INVALID",
    "small": "TOO SMALL",
}  # fmt: skip
"""Words of each `state_of`."""


def verdict_note(s: Summary, verdict: str = "") -> str | None:
    """``verdict`` and what else is to be known about the run before its figures are read."""
    reason = s.cost.reason if s.verdict == "VALID" else None
    said = [verdict, "dummy weights" if s.dummy else "", f"no price: {reason}" if reason else ""]
    return "; ".join(filter(None, said)) or None
