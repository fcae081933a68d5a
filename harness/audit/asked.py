"""The options of ``harness audit`` beyond those of a replay, and what an audit writes down before it asks anybody."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from harness.errors import UsageError
from harness.option_types import COUNT, FILE, POSITIVE, SHARE_OR_NONE, Parsed, opt

if TYPE_CHECKING:
    from harness.sweep.spec import Pair

SCHEMA_VERSION = "1"
STATE = "audit.json"
QUICK_RECORDS = 300


def _margin(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:pt|points?|%)", text)
    share = float(match[1]) / 100 if match else 0.0
    if not 0 < share < 1:
        raise UsageError(f"{text!r}: write the accepted answers that may be lost in points of 100, like 2pt")
    return share


def parse_price(text: str) -> tuple[str, float, float, float | None]:
    """(model, USD per 1M input, output and cached input tokens) from ``NAME=IN:OUT[:CACHED]``."""
    name, _, said = text.rpartition("=")
    try:
        usd = [float(part) for part in said.split(":")]
    except ValueError:
        usd = []
    if not name or len(usd) not in (2, 3) or not all(0 <= one < 1e6 for one in usd):
        raise UsageError(f"{text!r}: write MODEL=INPUT:OUTPUT or MODEL=INPUT:OUTPUT:CACHED, USD per 1M tokens")
    return name, usd[0], usd[1], usd[2] if len(usd) == 3 else None


def parse_model(text: str) -> Pair:
    """A `Pair` from ``MODEL@TIER``, ``MODEL@URL`` or ``MODEL@TIER@URL``."""
    from harness.sweep.spec import Pair

    named, at, url = re.fullmatch(r"(.*?)(?:(@)(https?://.*))?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    name, tier = named, None
    if not at or "@" in named:
        name, _, tier = named.rpartition("@")
    if not name or tier == "":
        raise UsageError(f"{text!r}: write MODEL@TIER, MODEL@URL, or MODEL@TIER@URL for a server there on that tier")
    return Pair(model=name, tier=tier, base_url=url, replicas=1)


MARGIN = Parsed("points", _margin, lambda share: f"{share * 100:g}pt")
"""A share from ``2pt``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """Who is compared, by how much a candidate may be worse, and what only the user knows of money."""

    heading: ClassVar = "Audit"
    current: str = opt(
        "The model that answers today: MODEL@TIER, MODEL@URL, or MODEL@TIER@URL.", "", kind=str, metavar="MODEL@WHERE",
        required=True,
    )  # fmt: skip
    candidates: Sequence[str] = opt("A model that may replace it; repeat.", (), metavar="MODEL@WHERE", required=True)
    margin: float = opt("Accepted answers that may be lost, in points: stated before anything is asked.", 0.02,
                        kind=MARGIN)  # fmt: skip
    check: str | None = opt("Check of records that have none; its truth is 'expected'.", metavar="JSON")
    max_answer: int = opt("Cap, in tokens, on answers of records without max_tokens.", 256, flag="--max-tokens")
    in_flight: int = opt("Requests in flight in the quality pass.", 32, kind=COUNT)
    quick: bool = opt(f"At most {QUICK_RECORDS} records, and one load level per model: no capacity is claimed.", False)
    load_all: bool = opt(
        "Load also those candidates whose quality is worse whatever their load gives: for their bill.", False
    )
    dry_run: bool = opt("Say what would be asked, and which margin so many records can prove; ask nobody.", False)
    run_code: bool = opt("Run answers that are code, in a sandbox or not at all.", False)
    list_prices: Sequence[str] = opt(
        "List price of a MODEL@URL, USD per 1M tokens, as of today; repeat.", (), metavar="MODEL=IN:OUT[:CACHED]",
    )  # fmt: skip
    repeats: int = opt("Times that each model answers every graded record; its grade is the mean.", 1, kind=COUNT)
    tries: int = opt(
        "Calls until the record's 'gate' passes, at most: as observed over --repeats of as many.", 1, kind=COUNT
    )
    escalate: bool = opt(
        "Where a candidate's answers never pass the gate, ask the current model: both calls and both fleets are paid.",
        False,
    )  # fmt: skip
    cascade: bool = opt(
        "Ask candidates for log-probabilities: is the candidate first, and the current model where it seems unsure, "
        "good and cheaper?", False,
    )  # fmt: skip
    judge: str | None = opt(
        "OpenAI-compatible endpoint of the judge of checks that ask one; its key is in HARNESS_JUDGE_API_KEY.",
        metavar="URL",
    )  # fmt: skip
    judge_model: str | None = opt("The judge's name there.", metavar="NAME")
    judge_time_s: float = opt("The judge's time in all, for one sitting; then it counts as silent.", 3600.0)
    labelled: Path | None = opt(
        "What a person says of answers of the current model and each candidate, 50 of them at least: JSON Lines with "
        "line (of TRACE), answer, accepted and model. Without them no judge is believed.", kind=FILE,
    )  # fmt: skip
    gate_usd: float | None = opt("What one call of your gate costs you, USD.", kind=POSITIVE)
    wage: float | None = opt("Of a person who reviews answers, USD per hour.", kind=POSITIVE)
    review_minutes: float | None = opt("Of a person, per answer that the gate rejects.", kind=POSITIVE)
    review_share: float = opt("Of the answers that the gate lets through, those reviewed too.", 0.0, kind=SHARE_OR_NONE)
    failure_usd: float | None = opt("What an answer that is wrong and goes out costs you, USD.", kind=POSITIVE)
    engineering_hours: float | None = opt("Of the change, once; with --wage.", kind=POSITIVE)
    months: float = opt("Over which they are written off.", 12.0, kind=POSITIVE)
    fail_if: str | None = opt("Exit 4 unless a candidate may be switched to.", kind=click.Choice(["not-switch"]))

    def refuse(self) -> None:
        """Raise `UsageError` for options that exclude each other."""
        if self.tries > self.repeats:
            raise UsageError(f"--tries {self.tries}: needs --repeats {self.tries}: what was not observed is not billed")
        if self.cascade and (self.tries > 1 or self.escalate):
            raise UsageError("--cascade: excludes --tries and --escalate: either the score or the gate decides")
        if (self.judge is None) != (self.judge_model is None):
            raise UsageError("--judge and --judge-model: say both")
        if self.labelled is not None and self.judge is None:
            raise UsageError("--labelled: is for a judge: say --judge and --judge-model")

    @property
    def models(self) -> list[Pair]:
        """The current one first. Raises `UsageError` for one that is named twice."""
        found = [parse_model(text) for text in (self.current, *self.candidates)]
        if any(one in found[:k] for k, one in enumerate(found)):
            raise UsageError("a model is named twice: the current one is compared with others, each once")
        return found


@dataclass(slots=True, kw_only=True)
class AuditState:
    """``audit.json``: what was asked, before any model was; a sitting that goes on must ask the same."""

    schema_version: str = SCHEMA_VERSION
    created: str
    trace: str
    trace_sha256: str
    checks_sha256: str
    """Over the check of every record, in order."""
    models: list[str]
    """The current one first."""
    margin: float
    slo: dict[str, float]
    records: int
    seed: int
    """Of the orders in which records are asked."""
    asked: dict[str, object] = field(default_factory=dict)
    """Every option that changes a figure, by name."""
