"""A price without a source and a date is no price."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from cluster.tiers import DEFAULT_TIER, get_tier, list_tiers, price_age_days, price_note
from harness.errors import UsageError

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
    month = get_tier("my.box", write(tmp_path, GOOD.replace("2026-02-03", "2026-02")))
    assert price_age_days(month, date(2026, 3, 1)) == 28
