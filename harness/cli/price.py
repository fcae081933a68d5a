"""What to charge for a million tokens, from runs that are there: price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import click

from analysis.cost.cost import DEFAULT_UTILISATION
from analysis.pricing.list_prices import PriceMap, family, find_list_prices, read_list_prices
from analysis.pricing.price_table import SCHEMA, PriceReport, price_csv, price_rows, write_prices
from analysis.pricing.rate_card import RateCard, charge, compare_with_api
from analysis.pricing.terms import Terms, declared, parse_volume
from analysis.report.decisions import price_sections
from analysis.summary import Summary
from cluster.catalogue.tiers import PURCHASES, price_age_days, read_tiers
from harness.cli.options import JUDGE_OPTIONS, format_option, html_option
from harness.cli.output import print_json, print_sections, say, write_sections
from harness.cli.select_runs import (
    Measured,
    find_runs,
    read_summaries,
    refused_exit,
)
from harness.cli.types import RATIO, SHARE_OR_NONE
from harness.cli.verb import command
from harness.errors import (
    EXIT_FAILURE,
    EXIT_SLO_MISSED,
    EXIT_VALID,
    UsageError,
    unknown_name,
)
from harness.record.manifest import Tier, now_utc

DEFAULT_MARGIN = 0.4


@command(
    short_help="What to charge: cost, margin, utilisation, against API list prices.",
    epilog="""\b
Examples:
  harness price runs/20261121T234654Z-trace-smollm2-135m
  harness price sweeps/20261122T021500Z-capacity-trace --margin 40% --utilisation 30% --volume 0,1e9:-10%,1e10:-20%
  harness price runs/sweep --tier-price "aws-g6.xlarge=0.62@our contract@2026-11-20@reserved"
  harness price runs/* --against gpt-5-mini --format csv -o prices.parquet

\b
Exit status:
  0  there is a price
  1  something failed, or nothing could be priced; the reason is in the output
  2  the command line is wrong
  3  an INVALID run was among them: it has no price, its reasons are in the output
  5  no run was INVALID, and one was TOO SMALL: it has no price either
  4  no measured load kept the SLO
""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN_OR_FOLDER...")
@click.option("--margin", type=SHARE_OR_NONE, help="Gross margin, of the price (not a markup on cost). Default: 40%.")
@click.option(
    "--utilisation",
    type=SHARE_OR_NONE,
    help="Share of the paid capacity that is sold, around the clock; harness plan-fleet says it of a fleet. "
    "Default: 30%.",
)
@click.option(
    "--ratio",
    type=RATIO,
    default="4",
    show_default=True,
    metavar="[IN:]OUT[:CACHED]",
    help="What tokens weigh against each other in the bill: 4 or 1:4 is output at four times input, 1:4:0.25 also "
    "cached input at a quarter.",
)
@click.option(
    "--split",
    type=click.Choice(["declared", "phase-time", "step-model"]),
    default="declared",
    show_default=True,
    help="How the bill is laid on input, cached input and output: by --ratio, or as the runs' own servers counted it "
    "(phase-time, step-model). Where that cannot be told: by --ratio, and it is said.",
)
@click.option(
    "--volume",
    metavar="TOKENS:-PERCENT,...",
    help="Discounts from so many tokens a month on, on what is beyond: 0,1e9:-10%,1e10:-20%.",
)
@click.option("--batch-discount", type=SHARE_OR_NONE, help="Discount for batch work, e.g. 50%.")
@click.option(
    "--re-price",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Tiers file whose prices replace those of the runs. Nothing is measured again; both dates are shown.",
)
@click.option(
    "--tier-price",
    "tier_prices",
    multiple=True,
    metavar="NAME=USD@SOURCE@DATE",
    help="One new price (several: repeat); @spot, @reserved ... at the end when it was bought another way.",
)
@click.option(
    "--against",
    multiple=True,
    metavar="NAME",
    help="Also compare with this API model of the price map. Those of the same model always are.",
)
@click.option(
    "--list-prices",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="LiteLLM's model_prices_and_context_window.json instead of the dated extract that is shipped.",
)
@JUDGE_OPTIONS
@html_option("the decision")
@format_option("text", "md", "json", "csv")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the flat table for a spreadsheet or warehouse: .parquet or .csv; .json is the whole document.",
)
def price(
    runs: Sequence[str], margin: float | None, utilisation: float | None, ratio: tuple[float, float, float | None],
    split: str, volume: str | None, batch_discount: float | None, re_price: Path | None, tier_prices: Sequence[str],
    against: Sequence[str], list_prices: Path | None, slo: dict[str, float] | None, attain: float, format_: str,
    out: Path | None, html: Path | None,
) -> int:  # fmt: skip
    """What to charge for a million tokens, from VALID runs: cost at 100 % and your utilisation, price at your margin.

    RUN_OR_FOLDER is a run directory, a folder of runs (a sweep, a search for capacity) or a quoted pattern. Of several
    loads the price is quoted at the highest one that keeps the SLO, between two measured loads; of one, at that one.
    """
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
