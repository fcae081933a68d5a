"""What to charge for a million tokens, from runs that are there: price."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from harness.cli.output import present, say
from harness.cli.select_runs import find_runs, judged, refused_exit
from harness.cli.verb import EXIT_STATUS, command, format_option, html_option, takes
from harness.errors import EXIT_FAILURE, EXIT_SLO_MISSED, UsageError, unknown_name
from harness.option_types import FILE, RATIO, SHARE_OR_NONE, opt
from harness.options import JudgeOptions

if TYPE_CHECKING:
    from harness.analysis.pricing.list_prices import PriceMap
    from harness.analysis.pricing.rate_card import RateCard
    from harness.analysis.pricing.terms import Terms
    from harness.analysis.rows.read import Run
    from harness.analysis.summary import Summary
    from harness.record.manifest import Tier

DEFAULT_MARGIN = 0.4
Method = Literal["declared", "phase-time", "step-model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceOptions(JudgeOptions):
    """What ``harness price`` takes."""

    margin: float | None = opt("Gross margin, of the price (not a markup on cost). Default: 40%.", kind=SHARE_OR_NONE)
    utilisation: float | None = opt(
        "Share of the paid capacity that is sold, around the clock; harness plan-fleet says it of a fleet. "
        "Default: 30%.", kind=SHARE_OR_NONE,
    )  # fmt: skip
    ratio: tuple[float, float, float | None] = opt(
        "What tokens weigh against each other in the bill: 4 or 1:4 is output at four times input, 1:4:0.25 also "
        "cached input at a quarter.", (1.0, 4.0, None), kind=RATIO, metavar="[IN:]OUT[:CACHED]",
    )  # fmt: skip
    split: Method = opt(
        "How the bill is laid on input, cached input and output: by --ratio, or as the runs' own servers counted it "
        "(phase-time, step-model). Where that cannot be told: by --ratio, and it is said.", "declared", kind=Method,
    )  # fmt: skip
    volume: str | None = opt(
        "Discounts from so many tokens a month on, on what is beyond: 0,1e9:-10%,1e10:-20%.",
        metavar="TOKENS:-PERCENT,...",
    )
    batch_discount: float | None = opt("Discount for batch work, e.g. 50%.", kind=SHARE_OR_NONE)
    re_price: Path | None = opt(
        "Tiers file whose prices replace those of the runs. Nothing is measured again; both dates are shown.", kind=FILE
    )
    tier_prices: Sequence[str] = opt(
        "One new price (several: repeat); @spot, @reserved ... at the end when it was bought another way.",
        (), metavar="NAME=USD@SOURCE@DATE",
    )  # fmt: skip
    against: Sequence[str] = opt(
        "Also compare with this API model of the price map. Those of the same model always are.", (), metavar="NAME"
    )
    list_prices: Path | None = opt(
        "LiteLLM's model_prices_and_context_window.json instead of the dated extract that is shipped.", kind=FILE
    )


@command(
    epilog=f"""\b
Examples:
  harness price runs/20261121T234654Z-trace-smollm2-135m
  harness price sweeps/20261122T021500Z-capacity-trace --margin 40% --utilisation 30% --volume 0,1e9:-10%,1e10:-20%
  harness price runs/sweep --tier-price "aws-g6.xlarge=0.62@our contract@2026-11-20@reserved"
  harness price runs/* --against gpt-5-mini --format csv > prices.csv

{EXIT_STATUS}""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN_OR_FOLDER...")
@takes(PriceOptions)
@html_option("the decision")
@format_option("text", "md", "json", "csv")
def price(runs: Sequence[str], format_: str, html: Path | None, asked: PriceOptions) -> int:
    """What to charge for a million tokens, from VALID runs: cost at 100 % and your utilisation, price at your margin.

    RUN_OR_FOLDER is a run directory, a folder of runs (a sweep, a search for capacity) or a quoted pattern. Of several
    loads the price is quoted at the highest one that keeps the SLO, between two measured loads; of one, at that one.
    """
    from harness.analysis.cost.cost import DEFAULT_UTILISATION
    from harness.analysis.pricing.list_prices import family, find_list_prices, read_list_prices
    from harness.analysis.pricing.rate_card import SCHEMA, PriceReport, charge, compare_with_api
    from harness.analysis.pricing.terms import Terms, declared, parse_volume
    from harness.analysis.report.decisions import price_sections
    from harness.analysis.summary import measured_splits
    from harness.record.manifest import now_utc

    today = datetime.now(UTC).date()
    terms = Terms(
        margin=DEFAULT_MARGIN if asked.margin is None else asked.margin,
        utilisation=DEFAULT_UTILISATION if asked.utilisation is None else asked.utilisation,
        volume=parse_volume(asked.volume) if asked.volume else (),
        batch_discount=asked.batch_discount,
    )
    per_input, per_output, per_cached = asked.ratio
    structure = declared(per_output, per_input, per_cached)
    prices = read_list_prices(asked.list_prices)
    for name in asked.against:
        if name not in prices.prices:
            raise unknown_name("list price", name, prices.prices)
    cached_ratio = None if per_cached is None or not per_input else per_cached / per_input

    def priced(run: Run, s: Summary) -> Summary:
        if asked.split == "declared" or s.cost.usd_per_1m_total.value is None:
            return s
        splits = measured_splits(run, s.window, s.tokens, s.requests.succeeded, cached_ratio)
        return replace(s, cost=replace(s.cost, splits=splits))

    summaries = judged(find_runs(*runs), priced, slo=asked.slo, attain=asked.attain)
    valid = [s for s in summaries if s.verdict == "VALID"]
    decided = charge(
        valid, terms, structure, today=today, new_prices=_new_prices(asked.re_price, asked.tier_prices, valid),
        split_method=None if asked.split == "declared" else asked.split.replace("-", " "),
    )  # fmt: skip
    decided = [
        compare_with_api(card, terms, find_list_prices(prices, card.model, asked.against), family(card.model))
        for card in decided
    ]
    report = PriceReport(
        schema=SCHEMA,
        made=now_utc(),
        terms=terms,
        structure=structure,
        charges=_open_first(decided),
        refused=[(s.run, tuple(s.reasons)) for s in summaries if s.verdict != "VALID"],
        list_prices={"source": prices.source, "date": prices.date, "date_is": prices.date_is,
                     "licence": prices.licence or "not said"},
        assumptions=tuple(_assumptions(terms, prices, today, asked)),
    )  # fmt: skip
    present(report, price_sections(report), format_, html=html, verb="price")
    if (refused := refused_exit(s.verdict for s in summaries)) or any(made.reason is None for made in report.charges):
        return refused
    return EXIT_SLO_MISSED if any(made.slo_met is False for made in report.charges) else EXIT_FAILURE


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


def _assumptions(terms: Terms, prices: PriceMap, today: date, asked: PriceOptions) -> list[str]:
    from harness.analysis.price_age import age_days, is_old

    default = " (not given: the default, an opinion)"
    sold, margin = ("" if given is not None else default for given in (asked.utilisation, asked.margin))
    old = ""
    if is_old(prices.date, today):
        old = f", {age_days(prices.date, today)} days ago: OLD, give today's (--list-prices)"
    return [
        f"utilisation {terms.utilisation * 100:g} %{sold}: of the capacity that is "
        "paid for, around the clock, so much is sold; what stands idle is paid all the same",
        f"gross margin {terms.margin * 100:g} %{margin}: (price - cost) / price. It is no "
        f"markup: as a markup on cost it would be {terms.margin / (1 - terms.margin) * 100:.3g} %",
        "one replica is one whole instance; a month has 730 h. Start-up, standby, staff, network, storage and tax are "
        "in the cost only as far as they are in the hourly price",
        "intervals are 95 % and come from the measurement; the hourly price, the margin and the utilisation have none",
        f"API list prices: {prices.source}; {prices.date_is} on {prices.date}{old}. A vendor's own page decides. The "
        "API is taken to have our share of cached input; it may serve another number format of the same model",
    ]


def _new_prices(file: Path | None, stated: Sequence[str], runs: Sequence[Summary]) -> dict[str, Tier]:
    from harness.cluster.catalogue.tiers import read_tiers

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


_TIER_PRICE = re.compile(
    r"(?P<name>[^=]+)=(?P<usd>\d+(?:\.\d+)?)@\s*(?P<source>\S.*?)\s*@\s*(?P<date>\d{4}-\d\d(?:-\d\d)?)\s*"
    r"(?:@(?P<purchase>on-demand|spot|reserved|owned))?"
)


def parse_tier_price(text: str, known: Mapping[str, Tier]) -> tuple[str, Tier]:
    """A run's tier with the price of ``NAME=USD@SOURCE@DATE[@PURCHASE]``. Raises `UsageError`."""
    from harness.cluster.catalogue.tiers import price_age_days

    said = _TIER_PRICE.fullmatch(text)
    if said is not None and said["name"] not in known:
        raise unknown_name("tier of these runs", said["name"], known)
    with suppress(ValueError):  # a day that there is not
        if said is not None and float(said["usd"]) > 0:
            was = known[said["name"]]
            tier = replace(
                was, usd_per_hour=float(said["usd"]), source=said["source"], date=said["date"],
                purchase=said["purchase"] or was.purchase, note=None, ownership=None,
            )  # fmt: skip
            if price_age_days(tier) >= 0:
                return was.name, tier
    raise UsageError(
        f"--tier-price {text!r}: write NAME=USD@SOURCE@DATE, USD per hour above 0 with its source and the day it was "
        "read, like aws-g6.xlarge=0.62@contract 7@2026-11-20, and @reserved, @spot, @on-demand or @owned when it was "
        "bought another way"
    )
