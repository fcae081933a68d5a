"""AWS prices read today: on-demand from the Price List API, spot from EC2's history of price changes.

What is read goes into the user's own tiers file (`tiers.write_tiers`), with where and when it was read; the shipped
catalogue is never written. Prices of other providers are not read: they have no comparable public API.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from harness import aws
from harness.aws import AwsError
from harness.cluster.catalogue.tiers import CATALOGUE, read_tiers
from harness.errors import HarnessError, UsageError, unknown_name
from harness.record.manifest import Tier

PRICE_LIST_REGION = "us-east-1"
"""One of the few regions that serve the Price List API; every one of them knows the prices of all regions."""
SPOT_DAYS = 7.0
SPOT_DAYS_MAX = 90.0
"""EC2 keeps no more."""
PAGES = 100
"""More than this is no answer to a question about one instance type."""
DESCRIPTIONS = ["Linux/UNIX", "Linux/UNIX (Amazon VPC)"]
"""The second is how accounts of before 2013 see the same thing."""

# What one ordinary Linux instance is, in the words of the price list. Sent as filters, and checked again on what comes
# back: Capacity Blocks and reservations are rows of the same instance type at other prices, some of them 0.
_WANTED = {
    "operatingSystem": "Linux",
    "tenancy": "Shared",
    "preInstalledSw": "NA",
    "capacitystatus": "Used",
    "licenseModel": "No License required",
}
_SPOT = "-spot"


class RefusedError(HarnessError):
    """AWS cannot be asked at all: no credentials, no network, no permission. The next question would fail alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a refresh does to one tier: ``after`` as it is written, or why there is none."""

    name: str
    before: Tier | None
    """As it was known; null for a tier that is new."""
    after: Tier | None
    problem: str | None = None

    @property
    def ratio(self) -> float | None:
        """New price over old, minus 1; null where one of them is missing."""
        if self.before is None or self.after is None:
            return None
        return self.after.usd_per_hour / self.before.usd_per_hour - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ZonePrice:
    """Spot price of one availability zone over a window, USD for one instance-hour; ``mean`` by how long each held."""

    zone: str
    mean: float
    low: float
    high: float
    current: float


def refresh(
    names: Sequence[str] = (), *, region: str | None = None, spot: bool = False, spot_days: float = SPOT_DAYS,
    files: Sequence[Path] = (), now: datetime | None = None,
) -> list[Change]:  # fmt: skip
    """Read today's prices of these AWS tiers (none named: of all); nothing is written.

    Tiers are the shipped ones and those of ``files`` (as far as they exist). Spot tiers get their cheapest zone's mean
    over ``spot_days``; ``spot`` adds a spot tier beside each on-demand one. Another ``region`` makes another tier,
    ``<name>-<region>``. One tier's trouble is its own `Change`.

    Raises `UsageError` for names that are no AWS tiers, `RefusedError` when AWS cannot be asked at all.
    """
    if not 0 < spot_days <= SPOT_DAYS_MAX:
        raise UsageError(f"--spot-days {spot_days:g}: EC2 keeps {SPOT_DAYS_MAX:g} days of spot prices")
    now = now or datetime.now(UTC)
    known = read_tiers(CATALOGUE)
    for file in files:
        known |= read_tiers(file) if file.exists() else {}
    targets = {t.name: t for asked in _choose(names, known) for t in _targets(asked, region, known, spot=spot)}
    changes: list[Change] = []
    for name, tier in targets.items():
        try:
            after = spot_tier(tier, spot_days, now) if tier.purchase == "spot" else on_demand_tier(tier, now)
            changes.append(Change(name=name, before=known.get(name), after=after))
        except RefusedError:
            raise
        except HarnessError as e:
            changes.append(Change(name=name, before=known.get(name), after=None, problem=str(e)))
    return changes


def _choose(names: Sequence[str], known: dict[str, Tier]) -> list[Tier]:
    readable = [t for t in known.values() if t.provider == "aws" and t.purchase in ("on-demand", "spot")]
    for name in names:
        if name not in known:
            raise unknown_name("tier", name, known)
        if (tier := known[name]) not in readable:
            raise UsageError(
                f"tier {name} ({tier.provider}, {tier.purchase}): only AWS on-demand and spot prices can be read; "
                f"put today's into your own tiers file"
            )
    return [known[name] for name in names] if names else readable


def _targets(tier: Tier, region: str | None, known: dict[str, Tier], *, spot: bool) -> Iterator[Tier]:
    """The tiers to price for this one: itself, in the region asked for, and its spot form."""
    if region is not None and region != tier.region:
        suffix = _SPOT if tier.name.endswith(_SPOT) else ""
        name = f"{tier.name.removesuffix(_SPOT)}-{region}{suffix}"
        tier = known.get(name) or replace(tier, name=name, region=region)
    yield tier
    if spot and tier.purchase == "on-demand":
        name = tier.name + _SPOT
        yield known.get(name) or replace(tier, name=name, purchase="spot", note=None)


class _Item(msgspec.Struct):
    attributes: dict[str, str]
    sku: str = "unknown"


class _Dimension(msgspec.Struct, rename="camel"):
    unit: str = ""
    price_per_unit: dict[str, str] = {}


class _Term(msgspec.Struct, rename="camel"):
    price_dimensions: dict[str, _Dimension] = {}


class Product(msgspec.Struct, rename="camel"):
    """What is read of one product of the price list, as it is there."""

    product: _Item
    terms: dict[str, dict[str, _Term]] = {}
    publication_date: str = ""


def on_demand_tier(tier: Tier, now: datetime) -> Tier:
    """The tier with its on-demand price of now. Raises `HarnessError` when the price list has no single answer."""
    filters = {"instanceType": tier.instance, "regionCode": tier.region, **_WANTED}
    request = {
        "ServiceCode": "AmazonEC2",
        "Filters": [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in filters.items()],
        "MaxResults": 100,
    }
    where = f"AWS Price List API: {tier.instance} in {tier.region}"
    pages = _pages("pricing", PRICE_LIST_REGION, "get_products", request, "AWS Price List API")
    try:  # the API hands out every product as a string of JSON
        products = [msgspec.json.decode(text, type=Product) for page in pages for text in page["PriceList"]]
    except msgspec.DecodeError as e:
        raise HarnessError(f"{where}: a product that cannot be read ({e})") from e
    offers = [offer for product in products for offer in _offers(product, filters)]
    if len(offers) != 1:
        raise HarnessError(f"{where}: {_what_came_back(products, offers)}")
    price, product = offers[0]
    _check_shape(tier, product.product.attributes)
    published = product.publication_date[:10] or "at a date it does not say"
    return replace(
        tier, usd_per_hour=price, date=now.date().isoformat(),
        source=f"AWS Price List API, published {published}, SKU {product.product.sku}",
    )  # fmt: skip


def _offers(product: Product, wanted: Mapping[str, str]) -> Iterator[tuple[float, Product]]:
    """(USD per hour, product) of every on-demand price that is one: hourly, in USD, above 0."""
    # Older rows have no market option; of the others only ordinary capacity is meant.
    attributes = {"marketoption": "OnDemand", **product.product.attributes}
    if any(attributes.get(key) != value for key, value in {"marketoption": "OnDemand", **wanted}.items()):
        return
    for term in product.terms.get("OnDemand", {}).values():
        for dimension in term.price_dimensions.values():
            price = _number(dimension.price_per_unit.get("USD"))  # a string, like "55.0400000000"
            if dimension.unit == "Hrs" and price > 0:
                yield price, product


def _number(text: object) -> float:
    """A finite price; 0 for what is none."""
    try:
        price = float(str(text))
    except ValueError:
        return 0.0
    return price if math.isfinite(price) else 0.0


def _what_came_back(products: Sequence[Product], offers: Sequence[tuple[float, Product]]) -> str:
    if not products:
        return "no product; is the instance type offered in this region, and spelt as AWS spells it?"
    if offers:
        found = ", ".join(f"{price:g} USD (SKU {product.product.sku})" for price, product in offers[:5])
        return f"{len(offers)} prices where one was expected: {found}"
    names = ("marketoption", "capacitystatus", "tenancy")
    kinds = {"/".join(p.product.attributes.get(name, "-") for name in names) for p in products}
    return (
        f"{len(products)} products, none with an hourly on-demand price in USD above 0 "
        f"(market option/capacity/tenancy: {', '.join(sorted(kinds)[:5])})"
    )


def _check_shape(tier: Tier, attributes: Mapping[str, str]) -> None:
    """A price for other hardware than the tier says would be a wrong price for every run on it."""
    told = {"vcpu": tier.vcpu, "memory": tier.memory_gib, "gpu": tier.accelerator_count}
    for key, ours in told.items():
        number = re.match(r"[\d.]+", attributes.get(key, "").replace(",", ""))
        if number and not math.isclose(float(number[0]), ours, rel_tol=0.01):
            raise HarnessError(
                f"AWS Price List API: {tier.instance} has {key} {attributes[key]}, tier {tier.name} says {ours:g}: "
                f"correct the tier first"
            )


class SpotPrice(TypedDict, total=False):
    """One change of a spot price, as EC2 says it."""

    InstanceType: str
    ProductDescription: str
    AvailabilityZone: str
    SpotPrice: str
    Timestamp: datetime


def spot_tier(tier: Tier, days: float, now: datetime) -> Tier:
    """The tier with the spot price of the zone that was cheapest over the last ``days``, every zone in its note."""
    start = now - timedelta(days=days)
    request = {
        "InstanceTypes": [tier.instance], "ProductDescriptions": DESCRIPTIONS, "StartTime": start, "EndTime": now,
        "MaxResults": 1000,
    }  # fmt: skip
    pages = _pages("ec2", tier.region, "describe_spot_price_history", request, "EC2 spot price history")
    rows = [row for page in pages for row in page["SpotPriceHistory"]]
    rows = [row for row in rows if row.get("InstanceType") == tier.instance]
    rows = [row for row in rows if row.get("ProductDescription") == DESCRIPTIONS[0]] or rows  # never both, mixed
    zones = zone_prices(rows, start, now)
    if not zones:
        raise HarnessError(
            f"EC2 spot price history: {tier.instance} has no spot price in {tier.region} in the last {days:g} days; "
            f"it may not be sold as spot there"
        )
    best = zones[0]
    each = "; ".join(f"{z.zone} mean {z.mean:.4f} ({z.low:.4f} to {z.high:.4f}), now {z.current:.4f}" for z in zones)
    return replace(
        tier, usd_per_hour=round(best.mean, 6), purchase="spot", date=now.date().isoformat(),
        source=f"EC2 spot price history, {best.zone}, mean over {days:g} days weighted by time",
        note=f"{each}. AWS may take a spot instance back after two minutes' warning",
    )  # fmt: skip


def zone_prices(rows: Sequence[SpotPrice], start: datetime, end: datetime) -> list[ZonePrice]:
    """Spot prices by zone between ``start`` and ``end``, the cheapest mean first.

    Rows are price *changes*, each valid until the next of its zone, and the last one before ``start`` comes along; so a
    mean has to weigh each price by how long it held, and counting rows would favour restless hours. A zone whose first
    price is later than ``start`` counts from then. Rows that are no price are passed over.
    """
    by_zone: dict[str, dict[datetime, float]] = {}
    for row in rows:
        price, at = _number(row.get("SpotPrice")), row.get("Timestamp")
        if price > 0 and isinstance(at, datetime) and at < end:
            by_zone.setdefault(row.get("AvailabilityZone", "unknown zone"), {})[at.astimezone(UTC)] = price
    found = []
    for zone, changes in by_zone.items():
        times = sorted(changes)
        spans = [
            (changes[at], (until - max(at, start)).total_seconds())
            for at, until in zip(times, [*times[1:], end], strict=True)
            if until > start
        ]
        held = sum(seconds for _, seconds in spans)
        prices = [price for price, _ in spans]
        mean = sum(price * seconds for price, seconds in spans) / held
        found.append(ZonePrice(zone=zone, mean=mean, low=min(prices), high=max(prices), current=changes[times[-1]]))
    return sorted(found, key=lambda z: (z.mean, z.zone))


def _pages(service: str, region: str, call: str, request: Mapping[str, object], what: str) -> list[Any]:
    """Every page of an answer."""
    try:
        client = aws.client(service, region)
        with aws.explained(what, "pricing:GetProducts and, for spot prices, ec2:DescribeSpotPriceHistory"):
            pages = list(islice(client.get_paginator(call).paginate(**request), PAGES + 1))
    except AwsError as e:
        if e.refusal != "other":
            raise RefusedError(f"{e}. Nothing was changed") from e
        raise
    if len(pages) > PAGES:
        raise HarnessError(f"{what}: the answer does not end ({PAGES} pages); try again later")
    return pages
