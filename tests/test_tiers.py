"""A price without a source and a date is no price."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from harness.cluster.catalogue.tiers import (
    CATALOGUE,
    DEFAULT_TIER,
    full_note,
    get_tier,
    list_tiers,
    owned_usd_per_hour,
    price_age_days,
    price_note,
    read_tiers,
)
from harness.errors import UsageError
from harness.record.manifest import Ownership

GOOD = """
["my.box"]
instance = "box"
provider = "us"
accelerator = "H100"
accelerator_count = 2
vcpu = 16
memory_gib = 128
usd_per_hour = 4.5
purchase = "owned"
region = "cellar"
source = "our accountant"
date = "2026-02-03"
"""


@pytest.fixture(autouse=True)
def no_tiers_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("HARNESS_TIERS", raising=False)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tiers.toml"
    path.write_text(text)
    return path


def test_every_built_in_price_says_where_and_when() -> None:
    tiers = list_tiers()
    assert len(tiers) >= 5
    assert all(len(t.source) > 10 and price_age_days(t, date(2027, 1, 1)) > 0 for t in tiers)
    default = get_tier(DEFAULT_TIER)
    assert (default.vcpu, default.memory_gib, default.usd_per_hour, default.accelerator) == (2, 8.0, 0.11592, None)


def test_the_catalogue_covers_the_market() -> None:
    tiers = read_tiers(CATALOGUE)
    assert {t.provider for t in tiers.values()} >= {"aws", "gcp", "azure", "lambda", "runpod", "nebius", "own"}
    assert {t.purchase for t in tiers.values()} == {"on-demand", "spot", "reserved", "owned"}
    assert {(t.accelerator, t.accelerator_count) for t in tiers.values()} >= {("L4", 1), ("B200", 8), (None, 0)}
    assert sum(t.accelerator is None for t in tiers.values()) >= 4, "CPU tiers"
    for tier in tiers.values():
        assert (tier.accelerator_memory_gib is None) == (tier.accelerator is None), tier.name
        if tier.purchase in ("spot", "reserved", "owned"):
            assert tier.note, f"{tier.name}: under which condition?"
        if tier.purchase == "spot" and (full := tiers.get(tier.name.removesuffix("-spot"))):
            assert (full.instance, full.accelerator_count, full.memory_gib) == (
                tier.instance, tier.accelerator_count, tier.memory_gib,
            )  # fmt: skip
            assert tier.usd_per_hour < full.usd_per_hour
    per_gpu = {t.usd_per_hour / t.accelerator_count for t in tiers.values() if t.accelerator == "H100"}
    assert max(per_gpu) < 13, "98.32 USD for eight is Azure's; no one of them is a price per GPU taken for a machine's"
    assert min(per_gpu) > 1


def test_parts_of_a_price_add_up() -> None:
    assert get_tier("gcp-g2-standard-8").usd_per_hour == pytest.approx(0.199904 + 0.093664 + 0.560040)
    assert get_tier("gcp-a2-highgpu-1g-1y").usd_per_hour == pytest.approx(1846.6133078 / 730, abs=1e-6)
    assert get_tier("lambda-b200x8").usd_per_hour == pytest.approx(8 * 6.69)


def test_what_an_owned_machine_costs_an_hour() -> None:
    """By hand: 87,600 USD over 10 years is 1 USD/h; 8,760 a year each of upkeep and space 1 USD/h; 2 kW x 1.5 x 0.1."""
    machine = Ownership(
        purchase_usd=87_600, years=10, upkeep_usd_per_year=8_760, space_usd_per_year=8_760, power_kw=2, pue=1.5,
        usd_per_kwh=0.1,
    )  # fmt: skip
    assert owned_usd_per_hour(machine) == pytest.approx(1 + 1 + 1 + 0.3)


OWNED = """
["my.box".ownership]
purchase_usd = 87_600.0
years = 10.0
upkeep_usd_per_year = 8_760.0
power_kw = 2.0
pue = 1.5
usd_per_kwh = 0.1
"""


def test_a_price_follows_from_its_assumptions(tmp_path: Path) -> None:
    fits = GOOD.replace("usd_per_hour = 4.5", "usd_per_hour = 2.3") + OWNED
    assert get_tier("my.box", write(tmp_path, fits)).ownership is not None
    for change, problem in (
        (("usd_per_hour = 2.3", "usd_per_hour = 4.5"), r"4\.5, but its ownership makes 2\.3000; write that"),
        (("pue = 1.5", "pue = 0.5"), "pue of at least 1"),
        (("years = 10.0", "years = 0.0"), "above 0"),
        (("power_kw = 2.0", "power_kw = -2.0"), "below 0"),
        (("power_kw = 2.0", "power_kwh = 2.0"), r"\[ownership\]: unknown key 'power_kwh': did you mean power_kw"),
        (('purchase = "owned"', 'purchase = "spot"'), "explains an owned machine"),
    ):
        assert change[0] in fits
        with pytest.raises(UsageError, match=problem):
            list_tiers(write(tmp_path, fits.replace(*change)))


def test_the_default_file_is_used_when_it_is_there(tmp_path: Path) -> None:
    assert "my.box" not in {tier.name for tier in list_tiers()}
    (tmp_path / "config" / "harness").mkdir(parents=True)
    write(tmp_path / "config" / "harness", GOOD)
    assert get_tier("my.box").usd_per_hour == 4.5


def test_own_file_adds_and_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD + GOOD.replace("my.box", "aws-p5.48xlarge"))
    assert get_tier("my.box", path).usd_per_hour == 4.5
    assert get_tier("aws-p5.48xlarge", path).instance == "box"
    assert get_tier("aws-p5.48xlarge").instance == "p5.48xlarge"
    monkeypatch.setenv("HARNESS_TIERS", str(path))
    assert get_tier("my.box").accelerator_count == 2


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"unknown tier 'aws-p5\.48xl': did you mean aws-p5"):
        get_tier("aws-p5.48xl")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (('source = "our accountant"', 'source = " "'), "needs source and date"),
        (('source = "our accountant"\n', ""), "missing required field `source`"),
        (('date = "2026-02-03"\n', ""), "missing required field `date`"),
        (('date = "2026-02-03"', 'date = "last week"'), "not a day"),
        (('date = "2026-02-03"', 'date = "2999-01"'), "in the future"),
        (('date = "2026-02-03"', "date = 2026-02-03"), "date"),
        (("usd_per_hour = 4.5", "usd_per_hour = 0"), "above 0"),
        (("usd_per_hour = 4.5", "usd_per_hour = nan"), "above 0"),
        (("usd_per_hour = 4.5", "usd_per_hour = inf"), "above 0"),
        (("usd_per_hour = 4.5", 'usd_per_hour = "4.5"'), "usd_per_hour"),
        (("usd_per_hour", "usd_per_huor"), "unknown key 'usd_per_huor': did you mean usd_per_hour"),
        (('purchase = "owned"', 'purchase = "onwed"'), "did you mean owned"),
        (("accelerator_count = 2", "accelerator_count = 0"), "go together"),
        (("vcpu = 16", "vcpu = 0"), "vcpu"),
        (("vcpu = 16", "vcpu = 16\naccelerator_memory_gib = 0.0"), "accelerator_memory_gib is 0"),
        (('["my.box"]', "my = 1"), "not a table"),
        (('["my.box"]', '["my.box"'), "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, change: tuple[str, str], problem: str) -> None:
    assert change[0] in GOOD
    path = write(tmp_path, GOOD.replace(*change))
    with pytest.raises(UsageError) as caught:
        list_tiers(path)
    assert str(path) in str(caught.value)
    assert problem in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        list_tiers(tmp_path / "none.toml")


def test_old_prices_are_marked(tmp_path: Path) -> None:
    tier = get_tier("my.box", write(tmp_path, GOOD))
    assert price_age_days(tier, date(2026, 2, 4)) == 1
    assert price_note(tier, date(2026, 8, 2)) is None
    note = price_note(tier, date(2026, 8, 3))
    assert note is not None
    assert "181 days ago (2026-02-03)" in note
    assert full_note(tier, date(2026, 8, 2)) is None
    assert full_note(tier, date(2026, 8, 3)) == note
    own = get_tier("my.box", write(tmp_path, GOOD + 'note = "noisy"\n'))
    assert full_note(own, date(2026, 8, 2)) == "noisy"
    assert full_note(own, date(2026, 8, 3)) == f"noisy; {note}"
    month = get_tier("my.box", write(tmp_path, GOOD.replace("2026-02-03", "2026-02")))
    assert price_age_days(month, date(2026, 3, 1)) == 28
