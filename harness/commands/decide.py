"""Runs -> what to charge; A against B. Both read run directories and measure nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.output import print_json, print_sections, say, write_sections
from harness.cli.select_runs import (
    Measured,
    find_runs,
    is_search,
    observe_run,
    read_summaries,
    refused_exit,
    sides_of_sweep,
)
from harness.errors import (
    EXIT_FAILURE,
    EXIT_NOT_DECIDED,
    EXIT_SLO_MISSED,
    EXIT_VALID,
    UsageError,
    unknown_name,
)
from harness.record.manifest import Tier, now_utc

if TYPE_CHECKING:
    from analysis.pricing.list_prices import PriceMap
    from analysis.pricing.price_table import PriceReport
    from analysis.pricing.rate_card import RateCard
    from analysis.pricing.terms import Terms
    from analysis.summary import Summary

DEFAULT_MARGIN = 0.4


def price(
    runs: Sequence[str],
    *,
    margin: float | None,
    utilisation: float | None,
    ratio: tuple[float, float, float | None],
    split: str,
    volume: str | None,
    batch_discount: float | None,
    re_price: Path | None,
    tier_prices: Sequence[str],
    against: Sequence[str],
    list_prices: Path | None,
    slo: dict[str, float] | None,
    attain: float,
    format_: str,
    out: Path | None,
    html: Path | None = None,
) -> int:
    """What to charge, from VALID runs only; the table also as a file."""
    from analysis.cost.cost import DEFAULT_UTILISATION
    from analysis.pricing.list_prices import family, find_list_prices, read_list_prices
    from analysis.pricing.price_table import SCHEMA, PriceReport, price_csv, price_rows, write_prices
    from analysis.pricing.rate_card import charge, compare_with_api
    from analysis.pricing.terms import Terms, declared, parse_volume

    today = datetime.now(UTC).date()
    terms = Terms(
        margin=DEFAULT_MARGIN if margin is None else margin,
        utilisation=DEFAULT_UTILISATION if utilisation is None else utilisation,
        volume=parse_volume(volume) if volume else (),
        batch_discount=batch_discount,
    )
    structure = declared(ratio[1], ratio[0], ratio[2])
    prices = read_list_prices(list_prices)
    for name in against:
        if name not in prices.prices:
            raise unknown_name("list price", name, prices.prices)
    method = None if split == "declared" else split.replace("-", " ")
    cached_ratio = None if ratio[2] is None or not ratio[0] else ratio[2] / ratio[0]
    paths = [path for text in runs for path in find_runs(text)]
    summaries = read_summaries(paths, slo, attain, None if method is None else Measured(cached_ratio=cached_ratio))
    valid = [s for s in summaries if s.verdict == "VALID"]
    decided = charge(
        valid,
        terms,
        structure,
        today=today,
        split_method=method,
        new_prices=_new_prices(re_price, tier_prices, valid),
    )
    decided = [
        compare_with_api(made, terms, find_list_prices(prices, made.model, against), family(made.model))
        for made in decided
    ]
    decided = _open_first(decided)
    report = PriceReport(
        schema=SCHEMA,
        made=now_utc(),
        terms=terms,
        structure=structure,
        charges=decided,
        refused=[(s.run, tuple(s.reasons)) for s in summaries if s.verdict != "VALID"],
        list_prices={"source": prices.source, "date": prices.date, "date_is": prices.date_is,
                     "licence": prices.licence or "not said"},
        assumptions=tuple(_assumptions(terms, prices, today, margin is None, utilisation is None)),
    )  # fmt: skip
    if out is not None:
        write_prices(out, report)
        say(f"written: {out}")
    if html is not None:
        from analysis.show.decision_text import price_sections

        write_sections(html, "price", price_sections(report))
    _print_price(report, format_, price_csv(price_rows(report)) if format_ == "csv" else "")
    return refused_exit(s.verdict for s in summaries) or _price_exit(report)


def _open_first(decided: Sequence[RateCard]) -> list[RateCard]:
    """Without the closed loops of what was measured in an open loop, too: they hide the queue that users would see."""

    def what(c: RateCard) -> tuple[object, ...]:
        return c.tier, c.model, c.label, c.servers, c.engine, c.args, c.replicas, c.evidence, c.slo

    asked = {what(c) for c in decided if c.loop != "closed"}
    kept = [c for c in decided if c.loop != "closed" or what(c) not in asked]
    left = len(decided) - len(kept)
    if not left:
        return kept
    said = "closed-loop runs of this system were left out: a closed loop hides the queue that users would see"
    return [replace(c, notes=(*c.notes, said)) if what(c) in asked else c for c in kept]


def _print_price(report: PriceReport, format_: str, csv_text: str) -> None:
    from analysis.show.decision_text import price_sections

    if format_ == "json":
        print_json(report)
    elif format_ == "csv":
        print(csv_text, end="")
    else:
        print_sections(price_sections(report), format_)


def _price_exit(report: PriceReport) -> int:
    """4: no load kept the SLO; 1: no price for another reason."""
    if any(made.reason is None for made in report.charges):
        return EXIT_VALID
    return EXIT_SLO_MISSED if any(made.slo_met is False for made in report.charges) else EXIT_FAILURE


def _assumptions(
    terms: Terms, prices: PriceMap, today: date, default_margin: bool, default_utilisation: bool
) -> list[str]:
    default = " (not given: the default, an opinion)"
    old = f", {prices.age_days(today)} days ago: OLD, give today's (--list-prices)" if prices.is_old(today) else ""
    return [
        f"utilisation {terms.utilisation * 100:g} %{default if default_utilisation else ''}: of the capacity that is "
        "paid for, around the clock, so much is sold; what stands idle is paid all the same",
        f"gross margin {terms.margin * 100:g} %{default if default_margin else ''}: (price - cost) / price. It is no "
        f"markup: as a markup on cost it would be {terms.margin / (1 - terms.margin) * 100:.3g} %",
        "one replica is one whole instance; a month has 730 h. Start-up, standby, staff, network, storage and tax are "
        "in the cost only as far as they are in the hourly price",
        "intervals are 95 % and come from the measurement; the hourly price, the margin and the utilisation have none",
        f"API list prices: {prices.source}; {prices.date_is} on {prices.date}{old}. A vendor's own page decides. The "
        "API is taken to have our share of cached input; it may serve another number format of the same model",
    ]


def _new_prices(file: Path | None, stated: Sequence[str], runs: Sequence[Summary]) -> dict[str, Tier]:
    """New tier prices by name: of a tiers file, and from the command line, which wins."""
    from cluster.catalogue.tiers import read_tiers

    known = {s.tier.name: s.tier for s in runs if s.tier is not None}
    found: dict[str, Tier] = {}
    if file is not None:
        found = {name: tier for name, tier in read_tiers(file).items() if name in known}
        if not found and known:
            raise UsageError(f"{file}: has none of the tiers of these runs ({', '.join(sorted(known))})")
        for name in sorted(set(known) - set(found)):
            say(f"{file}: no {name}; it keeps the price of its run")
    for text in stated:
        name, tier = parse_tier_price(text, known)
        found[name] = tier
    return found


def parse_tier_price(text: str, known: dict[str, Tier]) -> tuple[str, Tier]:
    """A run's tier with the price of ``NAME=USD@SOURCE@DATE[@PURCHASE]``. Raises `UsageError`."""
    from cluster.catalogue.tiers import PURCHASES, price_age_days

    name, equals, rest = text.partition("=")
    parts = rest.split("@")
    purchase = parts.pop() if len(parts) > 3 and parts[-1] in PURCHASES else None
    if not equals or len(parts) < 3:
        raise UsageError(
            f"--tier-price {text!r}: write NAME=USD@SOURCE@DATE, like aws-g6.xlarge=0.62@contract 7@2026-11-20, and "
            "@reserved, @spot, @on-demand or @owned when it was bought another way"
        )
    if name not in known:
        raise unknown_name("tier of these runs", name, known)
    try:
        usd = float(parts[0])
    except ValueError:
        usd = math.nan
    if not (math.isfinite(usd) and usd > 0):
        raise UsageError(f"--tier-price {text!r}: {parts[0]!r} is not USD per hour above 0")
    tier = replace(
        known[name], usd_per_hour=usd, source="@".join(parts[1:-1]).strip(), date=parts[-1].strip(),
        purchase=purchase or known[name].purchase, note=None, ownership=None,
    )  # fmt: skip
    try:
        age = price_age_days(tier)
    except ValueError:
        age = -1
    if age < 0 or not tier.source:
        raise UsageError(f"--tier-price {text!r}: a price needs its source and the day it was read, like 2026-11-20")
    return name, tier


# ---------------------------------------------------------------------------------------------------------- A against B


def compare(
    a: str, b: str | None, *, fail_if: Sequence[str], slo: dict[str, float] | None, attain: float, format_: str,
    html: Path | None = None,
) -> int:  # fmt: skip
    """A against B; refused with reasons when they are not comparable."""
    from analysis.compare.compare import compare as hold_against
    from analysis.compare.compare import parse_gate
    from analysis.show.decision_text import comparison_sections

    gates = [parse_gate(text) for text in fail_if]
    for text in filter(None, (a, b)):
        if is_search(Path(text)):
            raise UsageError(
                f"{text}: a search for capacity chooses its own loads, so two of them have none in common; put them "
                "side by side with 'harness price A B', or compare two runs or sweeps of equal loads"
            )
    sides = sides_of_sweep(a) if b is None else (find_runs(a), find_runs(b))
    if {path.resolve() for path in sides[0]} & {path.resolve() for path in sides[1]}:
        raise UsageError(f"{a} and {b} share a run: a run is not compared with itself")
    side_a, side_b = ([observe_run(path, slo, attain) for path in side] for side in sides)
    result = hold_against(side_a, side_b, gates)
    if html is not None:
        write_sections(html, "compare", comparison_sections(result))
    if format_ == "json":
        print_json(result)
    else:
        print_sections(comparison_sections(result), format_)
    if not result.comparable:
        both = refused_exit(one.summary.verdict for one in (*side_a, *side_b))
        return EXIT_NOT_DECIDED if both == EXIT_NOT_DECIDED else EXIT_FAILURE
    if result.failed:
        return EXIT_SLO_MISSED
    if result.unjudged:
        say(f"not judged: {'; '.join(result.unjudged)}")
        return EXIT_NOT_DECIDED
    return EXIT_VALID
