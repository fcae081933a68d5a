"""What stands in the tables of pages: cells, and figures in words. No arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from analysis.show import report
from analysis.show.plot import load_of
from analysis.stats.intervals import Quantity
from analysis.summary import Summary


@dataclass(frozen=True, slots=True)
class Cell:
    """What a table cell says, the small print under it, the number it sorts by, and the evidence it carries."""

    text: object
    note: str | None = None
    sort: float | None = None
    tag: str | None = None
    mark: str | None = None
    """Colours the text: good, bad or quiet."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with its caption; columns ``right`` hold numbers and are aligned to the right."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: Sequence[int] = ()


def state_of(s: Summary) -> str:
    """valid, missed (VALID, but the SLO was not kept), unknown (nobody can know whether it was), invalid or small."""
    if s.verdict != "VALID":
        return "invalid" if s.verdict == "INVALID" else "small"
    if s.slo is None or s.slo.met:
        return "valid"
    return "unknown" if s.slo.met is None else "missed"


def quantity(q: Quantity, style: Callable[[float], str]) -> Cell:
    """A figure with its interval under it."""
    said = report.value(q, style)
    if q.value is None:
        return Cell(said, note=q.note if said == "-" else None, mark="quiet")
    return Cell(said, note=interval(q, style) or None, sort=q.value)


def price_cell(s: Summary, q: Quantity) -> Cell:
    """A price with its interval; quiet where the SLO was missed, for it is none to sell at. Why there is none stands
    beside the verdict (`verdict_note`): a column of prices is too narrow for words.
    """
    cell = replace(quantity(q, report.price), note=interval(q, report.price) if q.value is not None else None)
    return replace(cell, mark="quiet") if state_of(s) in ("missed", "unknown") else cell


def verdict_note(s: Summary, verdict: str = "") -> str | None:
    """``verdict`` and what else is to be known about the run before its figures are read."""
    reason = s.cost.reason if s.verdict == "VALID" else None
    said = [verdict, "dummy weights" if s.caution else "", f"no price: {reason}" if reason else ""]
    return "; ".join(filter(None, said)) or None


def load_cell(s: Summary) -> Cell:
    """The load of a run: planned requests/s, requests in flight in a closed loop, sessions/s of sessions that wait."""
    if s.offered.kind == "sessions":
        started, sent = s.offered.session_rate.value, s.offered.sent_rate.value
        return Cell(report.figure(started), note=f"sessions/s, {report.figure(sent)} req/s sent", sort=started)
    is_open = s.offered.kind == "open"
    load = load_of(s, by_rate=is_open)
    return Cell(report.figure(load), note=None if load is None else "req/s" if is_open else "in flight", sort=load)


def number(q: Quantity, style: Callable[[float], str]) -> Cell:
    """A figure alone."""
    return Cell(report.value(q, style), sort=q.value)


def interval(q: Quantity, style: Callable[[float], str]) -> str:
    """The 95 % interval in words, empty when there is none."""
    return "" if q.low is None and q.high is None else report.interval(q, style)


def in_seconds(value: float) -> str:
    """A time of seconds in words: 87.1 ms, 2 s."""
    if value < 0.9995:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 999.5 else f"{value:,.0f} s"


def in_percent(share: float) -> str:
    """A share in words: 99.9%."""
    return f"{share * 100:.4g}%"
