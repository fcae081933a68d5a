"""Prices of AWS, read over the real protocols from a server that answers as AWS does; and means weighed by time."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
import pytest
from botocore.stub import Stubber
from conftest import harness
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster.catalogue import prices, tiers
from harness.cluster.catalogue.prices import RefusedError, ZonePrice, refresh, zone_prices
from harness.cluster.catalogue.tiers import CATALOGUE, get_tier, read_tiers, write_tiers
from harness.errors import HarnessError, UsageError

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


def product(
    instance: str = "p5.48xlarge", price: str = "55.0400000000", sku: str = "SKU1", **changes: str
) -> dict[str, Any]:
    """A product as GetProducts hands it out (before it is made a string)."""
    attributes = {
        "instanceType": instance, "regionCode": "us-east-1", "location": "US East (N. Virginia)", "vcpu": "192",
        "locationType": "AWS Region", "memory": "2048 GiB", "gpu": "8", "operatingSystem": "Linux", "tenancy": "Shared",
        "preInstalledSw": "NA", "capacitystatus": "Used", "licenseModel": "No License required",
        "marketoption": "OnDemand", "usagetype": f"BoxUsage:{instance}", "operation": "RunInstances",
        "servicecode": "AmazonEC2",
    } | changes  # fmt: skip
    rate = f"{sku}.JRTCKXETXF.6YS6EN2CT7"
    return {
        "product": {"productFamily": "Compute Instance", "attributes": attributes, "sku": sku},
        "serviceCode": "AmazonEC2",
        "terms": {
            "OnDemand": {
                f"{sku}.JRTCKXETXF": {
                    "priceDimensions": {
                        rate: {
                            "unit": "Hrs", "beginRange": "0", "endRange": "Inf", "rateCode": rate, "appliesTo": [],
                            "description": f"${price} per On Demand Linux {instance} Instance Hour",
                            "pricePerUnit": {"USD": price},
                        }
                    },
                    "sku": sku, "effectiveDate": "2026-11-01T00:00:00Z", "offerTermCode": "JRTCKXETXF",
                    "termAttributes": {},
                }
            },
            "Reserved": {
                f"{sku}.38NPMPTW36": {
                    "priceDimensions": {
                        "a": {"unit": "Quantity", "pricePerUnit": {"USD": "400000"}, "description": "Upfront Fee"},
                        "b": {"unit": "Hrs", "pricePerUnit": {"USD": "9.99"}, "description": "Linux/UNIX, reserved"},
                    },
                    "sku": sku, "offerTermCode": "38NPMPTW36",
                    "termAttributes": {"LeaseContractLength": "3yr", "PurchaseOption": "Partial Upfront"},
                }
            },
        },
        "version": "20261118203010", "publicationDate": "2026-11-18T20:30:10Z",
    }  # fmt: skip


# What the price list holds besides the one price that is meant.
OTHERS = [
    product(sku="WIN", price="64.0", operatingSystem="Windows"),
    product(sku="SQL", price="99.0", preInstalledSw="SQL Std"),
    product(sku="DED", price="60.0", tenancy="Dedicated"),
    product(sku="RSV", price="0.0000000000", capacitystatus="UnusedCapacityReservation"),
    product(sku="ALC", price="0.0000000000", capacitystatus="AllocatedCapacityReservation"),
    product(sku="BLK", price="31.464", marketoption="CapacityBlock"),
    product(sku="BL0", price="0.0000000000", marketoption="CapacityBlock"),
    product(sku="ZER", price="0.0000000000"),
    product(sku="EUR", price="70.0", regionCode="eu-north-1"),
]


def change(hours_ago: float, price: str, zone: str = "us-east-1a", description: str = "Linux/UNIX") -> dict[str, Any]:
    """A row of the spot price history: a price and when it began."""
    return {
        "InstanceType": "p5.48xlarge", "AvailabilityZone": zone, "SpotPrice": price, "ProductDescription": description,
        "Timestamp": NOW - timedelta(hours=hours_ago),
    }  # fmt: skip


class FakeAws:
    """Price List API (AWS JSON 1.1) and EC2 (Query, XML): filters, pages and errors as the real ones."""

    def __init__(self) -> None:
        self.products: list[dict[str, Any]] = []
        self.changes: list[dict[str, Any]] = []
        self.page_size = 100
        self.troubles: deque[tuple[str, str]] = deque()  # (service, error code), each given once, first
        self.calls: list[tuple[str, str, dict[str, Any]]] = []  # (service, signing region, request)
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                scope = self.headers["Authorization"].partition("Credential=")[2].partition(",")[0].split("/")
                service, region = scope[3], scope[2]
                if service == "pricing":
                    assert self.headers["X-Amz-Target"] == "AWSPriceListService.GetProducts"
                    assert self.headers["Content-Type"] == "application/x-amz-json-1.1"
                    request = json.loads(body)
                else:
                    request = {key: values[0] for key, values in parse_qs(body.decode()).items()}
                    assert request["Action"] == "DescribeSpotPriceHistory"
                fake.calls.append((service, region, request))
                code, kind, answer = fake.answer(service, request)
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, service: str, request: dict[str, Any]) -> tuple[int, str, bytes]:
        if self.troubles and self.troubles[0][0] == service:
            return self.error(*self.troubles.popleft())
        return self.get_products(request) if service == "pricing" else self.spot_history(request)

    @staticmethod
    def error(service: str, code: str) -> tuple[int, str, bytes]:
        if code == "HTML":
            return 500, "text/html", b"<html>Not yet implemented</html>"
        if service == "pricing":
            return 400, "application/x-amz-json-1.1", json.dumps({"__type": code, "Message": "as AWS says it"}).encode()
        status = 503 if code == "RequestLimitExceeded" else 403
        error = f"<Error><Code>{code}</Code><Message>as AWS says it</Message></Error>"
        return status, "text/xml", f"<Response><Errors>{error}</Errors></Response>".encode()

    def get_products(self, request: dict[str, Any]) -> tuple[int, str, bytes]:
        assert request["ServiceCode"] == "AmazonEC2"
        assert all(f["Type"] == "TERM_MATCH" for f in request["Filters"])
        wanted = {f["Field"]: f["Value"] for f in request["Filters"]}
        found = [
            p for p in self.products if all(p["product"]["attributes"].get(k) == v for k, v in wanted.items())
        ]  # fmt: skip
        start = int(request.get("NextToken", "0"))
        answer: dict[str, Any] = {
            "FormatVersion": "aws_v1", "PriceList": [json.dumps(p) for p in found[start : start + self.page_size]],
        }  # fmt: skip
        if start + self.page_size < len(found):
            answer["NextToken"] = str(start + self.page_size)
        return 200, "application/x-amz-json-1.1", json.dumps(answer).encode()

    def spot_history(self, request: dict[str, Any]) -> tuple[int, str, bytes]:
        start, end = (datetime.fromisoformat(request[k]) for k in ("StartTime", "EndTime"))
        kinds = {v for k, v in request.items() if k.startswith("ProductDescription.")}
        types = {v for k, v in request.items() if k.startswith("InstanceType.")}
        rows = [r for r in self.changes if r["ProductDescription"] in kinds and r["InstanceType"] in types]
        rows.sort(key=lambda r: r["Timestamp"], reverse=True)
        kept, begun = [], set()
        for row in rows:  # newest first; of those before the window the last one of each zone
            key = (row["AvailabilityZone"], row["ProductDescription"])
            if row["Timestamp"] <= end and (row["Timestamp"] >= start or key not in begun):
                kept.append(row)
            if row["Timestamp"] < start:
                begun.add(key)
        at = int(request.get("NextToken", "0"))
        token = str(at + self.page_size) if at + self.page_size < len(kept) else ""
        items = "".join(
            f"<item><instanceType>{r['InstanceType']}</instanceType>"
            f"<productDescription>{r['ProductDescription']}</productDescription><spotPrice>{r['SpotPrice']}</spotPrice>"
            f"<timestamp>{r['Timestamp'].strftime('%Y-%m-%dT%H:%M:%S.000Z')}</timestamp>"
            f"<availabilityZone>{r['AvailabilityZone']}</availabilityZone></item>"
            for r in kept[at : at + self.page_size]
        )
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<DescribeSpotPriceHistoryResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>r</requestId>'
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken>{token}</nextToken>"
            "</DescribeSpotPriceHistoryResponse>"
        )
        return 200, "text/xml;charset=UTF-8", xml.encode()


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No AWS settings and no tiers of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "NO_PROXY": "127.0.0.1",
        "AWS_EC2_METADATA_DISABLED": "true", "HARNESS_TIERS": str(tmp_path / "own" / "tiers.toml"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path / "own"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAws]:
    fake = FakeAws()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_ENDPOINT_URL_PRICING": fake.url, "AWS_ENDPOINT_URL_EC2": fake.url,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def one(**options: Any) -> prices.Change:
    [change] = refresh(["aws-p5.48xlarge"], now=NOW, **options)
    return change


def test_the_one_price_that_is_meant(aws: FakeAws) -> None:
    aws.products = [*OTHERS, product()]
    change = one()
    assert change.problem is None
    assert change.before == get_tier_of_catalogue("aws-p5.48xlarge")
    assert change.after is not None
    assert (change.after.usd_per_hour, change.after.region, change.after.date) == (55.04, "us-east-1", "2026-11-20")
    assert change.after.source == "AWS Price List API, published 2026-11-18, SKU SKU1"
    assert change.ratio == 0
    [(service, region, request)] = aws.calls
    assert (service, region) == ("pricing", "us-east-1")
    assert {f["Field"] for f in request["Filters"]} >= {"instanceType", "regionCode", "capacitystatus", "tenancy"}


def get_tier_of_catalogue(name: str) -> tiers.Tier:
    return read_tiers(CATALOGUE)[name]


def test_rows_are_checked_although_the_server_filters(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter that the server does not know would be ignored: then every row comes back."""
    everything = [json.dumps(p) for p in [*OTHERS, product()]]
    body = json.dumps({"FormatVersion": "aws_v1", "PriceList": everything}).encode()
    monkeypatch.setattr(aws, "get_products", lambda request: (200, "application/x-amz-json-1.1", body))
    change = one()
    assert change.after is not None
    assert change.after.usd_per_hour == 55.04


def test_pages_are_followed(aws: FakeAws) -> None:
    aws.products, aws.page_size = [*OTHERS, product()], 1
    assert one().after is not None
    assert len(aws.calls) == 4, "block, empty block, zero price, price: a page each"


@pytest.mark.parametrize(
    ("products", "problem"),
    [
        ([], r"p5\.48xlarge in us-east-1: no product; is the instance type offered"),
        ([product(), product(sku="SKU2", price="56.1")], r"2 prices where one was expected: 55\.04 USD \(SKU SKU1\)"),
        (OTHERS, r"3 products, none with an hourly on-demand price in USD above 0 .*CapacityBlock/Used/Shared"),
        ([product(price="fifty")], "1 products, none with"),
        ([product(price="NaN")], "1 products, none with"),
        ([product(vcpu="96")], r"has vcpu 96, tier aws-p5\.48xlarge says 192: correct the tier"),
        ([product(memory="1,152 GiB")], "has memory 1,152 GiB"),
        ([product(gpu="4")], "has gpu 4"),
    ],
)
def test_no_single_answer_says_what_came_back(aws: FakeAws, products: list[dict[str, Any]], problem: str) -> None:
    aws.products = products
    change = one()
    assert change.after is None
    assert change.problem is not None
    assert re.search(problem, change.problem), change.problem


def test_products_that_are_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through botocore's own Stubber, which checks our request against the service's model."""
    client = boto3.client("pricing", region_name="us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
    monkeypatch.setattr("harness.aws.client", lambda service, region: client)
    with Stubber(client) as stub:
        for rows in (["{"], ["[]"], ['{"product": {"attributes": []}}']):
            stub.add_response("get_products", {"PriceList": rows})
            problem = one().problem
            assert problem is not None
            assert "a product" in problem
        stub.assert_no_pending_responses()


def test_busy_answers_are_asked_again(aws: FakeAws) -> None:
    aws.products, aws.page_size = [*OTHERS, product()], 2
    aws.troubles.append(("pricing", "ThrottlingException"))
    assert one().after is not None
    tokens = [request.get("NextToken") for _, _, request in aws.calls]
    assert tokens == [None, None, "2"]


@pytest.mark.parametrize(
    ("service", "code", "said"),
    [
        ("pricing", "AccessDeniedException", "may not do this .*pricing:GetProducts and, for spot"),
        ("pricing", "UnrecognizedClientException", "refuses these credentials"),
        ("pricing", "ExpiredTokenException", "renew them"),
        ("pricing", "ThrottlingException", "throttled 1 times"),
        ("ec2", "UnauthorizedOperation", "ec2:DescribeSpotPriceHistory"),
        ("ec2", "AuthFailure", "refuses these credentials"),
    ],
)
def test_refusals_end_it_at_once(
    aws: FakeAws, monkeypatch: pytest.MonkeyPatch, service: str, code: str, said: str
) -> None:
    monkeypatch.setattr("harness.aws.ATTEMPTS", 1)
    aws.products = [product()]
    aws.troubles.append((service, code))
    with pytest.raises(RefusedError, match=said) as caught:
        refresh(now=NOW, spot=True) if service == "pricing" else refresh(["aws-p5.48xlarge-spot"], now=NOW)
    assert "Nothing was changed" in str(caught.value)
    assert "very-secret" not in str(caught.value)
    assert len(aws.calls) == 1


def test_other_faults_are_the_tiers_own(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.aws.ATTEMPTS", 1)
    aws.products = [product()]
    aws.troubles.extend([("pricing", "InternalErrorException"), ("pricing", "HTML")])
    changes = refresh(["aws-g6.xlarge", "aws-g5.xlarge", "aws-p5.48xlarge"], now=NOW)
    assert [change.after is not None for change in changes] == [False, False, True]
    assert "InternalErrorException: as AWS says it" in (changes[0].problem or "")


def test_without_credentials_or_network(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.aws.ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_PRICING", "http://127.0.0.1:9")
    with pytest.raises(RefusedError, match=r"out of reach .*check the network"):
        one()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RefusedError, match=r"no usable AWS credentials .*set AWS_PROFILE"):
        one()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(RefusedError, match="nobody"):
        one()


def test_an_answer_without_end_has_one(aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"PriceList": [], "NextToken": "same"}).encode()
    monkeypatch.setattr(aws, "get_products", lambda request: (200, "application/x-amz-json-1.1", body))
    assert "same next token was received twice" in (one().problem or "")
    count = iter(range(1000))
    answer = lambda request: (200, "application/x-amz-json-1.1", b'{"PriceList": [], "NextToken": "%d"}' % next(count))  # noqa: E731
    monkeypatch.setattr(aws, "get_products", answer)
    assert "does not end" in (one().problem or "")


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["aws-p5.48xl"], r"did you mean aws-p5"),
        (["lambda-h100"], r"\(lambda, on-demand\): only AWS"),
        (["onprem-h100x8"], r"\(own, owned\): only AWS"),
    ],
)
def test_tiers_that_cannot_be_read(names: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        refresh(names)
    with pytest.raises(UsageError, match="90 days"):
        refresh(spot_days=91)


def test_another_region_is_another_tier(aws: FakeAws) -> None:
    aws.products = OTHERS
    aws.changes = [change(10, "25.0", "eu-north-1a")]
    changes = refresh(["aws-p5.48xlarge"], region="eu-north-1", spot=True, now=NOW)
    assert [(c.name, c.after and (c.after.region, c.after.usd_per_hour)) for c in changes] == [
        ("aws-p5.48xlarge-eu-north-1", ("eu-north-1", 70.0)),
        ("aws-p5.48xlarge-eu-north-1-spot", ("eu-north-1", 25.0)),
    ]
    assert changes[0].before is None
    assert [region for _, region, _ in aws.calls] == ["us-east-1", "eu-north-1"], "the price list is asked in its own"
    [again] = refresh(["aws-p5.48xlarge-spot"], region="eu-north-1", now=NOW)
    assert again.name == changes[1].name, "the same thing has the same name by either way"


# --- spot ----------------------------------------------------------------------------------------------------------


def spot(aws: FakeAws, *changes: dict[str, Any], days: float = 1) -> prices.Change:
    aws.changes = list(changes)
    [found] = refresh(["aws-p5.48xlarge-spot"], region="us-east-1", spot_days=days, now=NOW)
    return found


def test_a_mean_is_weighed_by_time(aws: FakeAws) -> None:
    """20 for 18 hours, then 40 for 6: 25, although two of three rows say 40 or more."""
    found = spot(
        aws, change(100, "20.0"), change(6, "40.0"), change(6.0, "40.0"), change(200, "90.0"),
        change(50, "30.0", "us-east-1b"), change(5, "1.0", "us-east-1a", "Windows"),
    ).after  # fmt: skip
    assert found is not None
    assert found.usd_per_hour == pytest.approx(25.0)
    assert found.purchase == "spot"
    assert found.source == "EC2 spot price history, us-east-1a, mean over 1 days weighted by time"
    assert found.note is not None
    assert "us-east-1a mean 25.0000 (20.0000 to 40.0000), now 40.0000" in found.note
    assert "us-east-1b mean 30.0000 (30.0000 to 30.0000), now 30.0000" in found.note


def test_spot_pages_and_old_descriptions(aws: FakeAws) -> None:
    aws.page_size = 1
    rows = [change(h, p) for h, p in ((30, "10.0"), (12, "20.0"), (6, "30.0"))]
    found = spot(aws, *rows, *(change(h, "1.0", "us-east-1a", "Linux/UNIX (Amazon VPC)") for h in (30, 3))).after
    assert found is not None
    assert found.usd_per_hour == pytest.approx((12 * 10 + 6 * 20 + 6 * 30) / 24)
    assert len(aws.calls) == 5
    only_old = spot(aws, change(30, "7.0", "us-east-1a", "Linux/UNIX (Amazon VPC)")).after
    assert only_old is not None
    assert only_old.usd_per_hour == 7.0


def test_no_spot_market_is_said(aws: FakeAws) -> None:
    found = spot(aws)
    assert found.after is None
    assert "no spot price in us-east-1 in the last 1 days; it may not be sold as spot there" in (found.problem or "")


def zones(*rows: dict[str, Any], hours: float = 24) -> list[ZonePrice]:
    return zone_prices(rows, NOW - timedelta(hours=hours), NOW)


def test_a_zone_counts_from_its_first_price() -> None:
    [zone] = zones(change(8, "10.0"), change(4, "20.0"))
    assert zone == ZonePrice(zone="us-east-1a", mean=15.0, low=10.0, high=20.0, current=20.0)


def test_rows_that_are_no_price_are_passed_over() -> None:
    bad = [change(5, "0"), change(5, "-1"), change(5, "nan"), change(5, "cheap"), {"SpotPrice": "1"}, change(-1, "9")]
    assert zones(*bad) == []
    [zone] = zones(*bad, change(30, "3.0"))
    assert (zone.mean, zone.current) == (3.0, 3.0)


@given(
    st.lists(st.tuples(st.integers(-100, 47), st.integers(1, 1000)), min_size=1, unique_by=lambda row: row[0]),
    st.integers(0, 10),
)
def test_the_mean_is_the_integral(rows: list[tuple[int, int]], extra: int) -> None:
    """Against a sum over whole hours, each at the last price begun before it."""
    start = NOW - timedelta(hours=48)
    table = [change(48 - hour, str(price)) for hour, price in rows]
    by_hour = dict(rows)
    held = [max((h for h in by_hour if h <= hour), default=None) for hour in range(48)]
    known = [by_hour[h] for h in held if h is not None]
    [zone] = zone_prices(table, start, NOW)
    assert zone.mean == pytest.approx(sum(known) / len(known))
    assert (zone.low, zone.high, zone.current) == (min(known), max(known), known[-1])
    # A row that repeats the price in force says nothing new.
    at = extra * 4
    if at not in by_hour and held[at] is not None:
        [same] = zone_prices([*table, change(48 - at, str(by_hour[held[at] or 0]))], start, NOW)
        assert same.mean == pytest.approx(zone.mean)


# --- the user's own file -------------------------------------------------------------------------------------------

OWN = """# my prices
[mine]
instance = "box" # in the cellar
provider = "us"
accelerator_count = 0
vcpu = 4
memory_gib = 16
usd_per_hour = 0.50
purchase = "owned"
region = "cellar"
source = "our accountant"
date = "2026-02-03"

["aws-p5.48xlarge"]
instance = "p5.48xlarge"
provider = "aws"
accelerator = "H100"
accelerator_count = 8
vcpu = 192
memory_gib = 2_048.0 # all of it
usd_per_hour = 98.32
purchase = "on-demand"
region = "us-east-1"
source = "an old page"
date = "2025-01-01"
note = "too dear"
"""


def test_own_entries_comments_and_order_stay(tmp_path: Path) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(OWN)
    path.chmod(0o600)
    link = tmp_path / "link.toml"
    link.symlink_to(path)
    new = get_tier_of_catalogue("aws-p5.48xlarge")
    write_tiers(link, [new, get_tier_of_catalogue("aws-g6.xlarge")])
    text = path.read_text()
    assert text.startswith(OWN[: OWN.index("usd_per_hour = 98.32")].split('["aws')[0])
    assert "2_048.0 # all of it" in text
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = read_tiers(path)
    assert list(found) == ["mine", "aws-p5.48xlarge", "aws-g6.xlarge"]
    assert found["aws-p5.48xlarge"] == new
    assert get_tier("aws-p5.48xlarge", path).usd_per_hour == 55.04
    before = path.read_bytes()
    write_tiers(path, [new])
    assert path.read_bytes() == before, "nothing new, nothing changed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.toml", "tiers.toml"]


def test_every_shipped_tier_survives_writing(tmp_path: Path) -> None:
    shipped = read_tiers(CATALOGUE)
    write_tiers(tmp_path / "new" / "tiers.toml", list(shipped.values()))
    assert read_tiers(tmp_path / "new" / "tiers.toml") == shipped


@pytest.mark.parametrize(
    ("prepare", "problem"),
    [
        (lambda p: p.write_text("not = toml = "), "not a TOML file"),
        (lambda p: p.write_text("[x]\nprice = 1\n"), "unknown key 'price'"),
        (lambda p: p.mkdir(), "not a regular file"),
        (lambda p: p.symlink_to(CATALOGUE), "shipped catalogue is not written"),
    ],
)
def test_what_cannot_be_written_stays_as_it_is(tmp_path: Path, prepare: Callable[[Path], Any], problem: str) -> None:
    path = tmp_path / "tiers.toml"
    prepare(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(HarnessError, match=problem):
        write_tiers(path, [get_tier_of_catalogue("aws-g6.xlarge")])
    assert (path.read_bytes() if path.is_file() else None) == before
    assert [p.name for p in tmp_path.iterdir()] == ["tiers.toml"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(OWN)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiers.os, "fsync", full)
    with pytest.raises(HarnessError, match=r"cannot write \(No space left on device\); nothing was changed"):
        write_tiers(path, [get_tier_of_catalogue("aws-g6.xlarge")])
    assert path.read_text() == OWN
    assert [p.name for p in tmp_path.iterdir()] == ["tiers.toml"]


def test_the_verb(aws: FakeAws, own_folder: Path) -> None:
    """Dry run, refresh, list: as a user does it."""
    aws.products = [product(price="50.0"), *OTHERS]
    shipped = CATALOGUE.read_bytes()
    aws.changes = [change(1000, "21.5")]  # real time is later: held through the whole window
    arguments = ("tiers", "refresh", "--tier", "aws-p5.48xlarge", "--region", "us-east-1")
    dry = harness(*arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "55.04" in dry.stdout
    assert "-9.2%" in dry.stdout
    assert "nothing written" in dry.stderr
    assert not own_folder.exists()
    done = harness(*arguments, "--format", "json")
    assert done.returncode == 0, done.stderr
    [written] = json.loads(done.stdout)["changes"]
    assert written["after"]["usd_per_hour"] == 50.0
    assert written["change"] == pytest.approx(50 / 55.04 - 1)
    listed = {tier["name"]: tier for tier in json.loads(harness("tiers", "--format", "json").stdout)["tiers"]}
    assert listed["aws-p5.48xlarge"]["usd_per_hour"] == 50.0
    assert listed["aws-p5.48xlarge"]["source"].startswith("AWS Price List API, published 2026-11-18")
    assert listed["aws-p5.48xlarge"]["old"] is False
    assert CATALOGUE.read_bytes() == shipped
    partly = harness("tiers", "refresh", "--tier", "aws-p5.48xlarge", "--tier", "aws-g6.xlarge")
    assert partly.returncode == 1, "one of two has no price"
    assert "no product" in partly.stdout
    assert "1 of 2 prices read" in partly.stderr
    aws.troubles.append(("pricing", "AccessDeniedException"))
    before = (own_folder / "tiers.toml").read_bytes()
    refused = harness(*arguments)
    assert refused.returncode == 1
    assert "may not do this" in refused.stderr
    assert (own_folder / "tiers.toml").read_bytes() == before
