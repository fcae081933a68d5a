"""API list prices: read as they are, matched by family, dated, and never a 0 where none is listed."""

from __future__ import annotations

import datetime as dt
import json

import pytest

from harness.analysis.price_age import is_old
from harness.analysis.pricing.list_prices import EXTRACT, family, find_list_prices, read_list_prices
from harness.errors import UsageError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("llama-3.1-8b-instruct-fp8", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3.1-8b-instruct", "fireworks_ai/accounts/fireworks/models/llama-v3p1-8b-instruct"),
        ("llama-3.1-8b-instruct-awq", "meta.llama3-1-8b-instruct-v1:0"),
        ("llama-3.1-70b-instruct", "ovhcloud/Meta-Llama-3_1-70B-Instruct"),
        ("llama-2-13b-chat", "fireworks_ai/accounts/fireworks/models/llama-v2-13b-chat"),
        ("mistral-7b-instruct-v0.3", "together_ai/mistralai/Mistral-7B-Instruct-v0.1"),
        ("qwen3-32b-fp8", "qwen.qwen3-32b-v1:0"),
        ("qwen3-0.6b", "fireworks_ai/accounts/fireworks/models/qwen3-0p6b"),
        ("gpt-oss-120b:dummy", "openai/gpt-oss-120b"),
        ("deepseek-r1", "deepinfra/deepseek-ai/DeepSeek-R1-0528"),
    ],
)
def test_one_model_under_two_names(one, other):
    assert family(one) == family(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("deepseek-r1", "deepseek-r1-distill-qwen-32b"),
        ("llama-3.1-8b-instruct", "llama-3-8b-instruct"),
        ("llama-3.1-8b-instruct", "llama-3.1-70b-instruct"),
        ("llama-3.1-70b-instruct", "llama-3.3-70b-instruct"),
        ("gpt-oss-20b", "gpt-oss-safeguard-20b"),
        ("qwen3-30b-a3b", "qwen3-32b"),
        ("deepseek-v3", "deepseek-v3.1"),
    ],
)
def test_other_models_stay_apart(one, other):
    assert family(one) != family(other)


def test_the_shipped_extract_says_where_it_is_from():
    prices = read_list_prices()
    assert "litellm" in prices.source
    assert prices.licence is not None and prices.licence.startswith("MIT License")
    assert dt.date.fromisoformat(prices.date) <= dt.datetime.now(dt.UTC).date()
    assert all(p.usd_per_1m_input > 0 and p.usd_per_1m_output > 0 for p in prices.prices.values())
    for model in ("llama-3.1-8b-instruct", "qwen3-32b-fp8", "gpt-oss-120b", "deepseek-r1", "mistral-7b-instruct-v0.3"):
        found = find_list_prices(prices, model)
        assert len(found) >= 3, model
        assert [p.usd_per_1m_output for p in found] == sorted(p.usd_per_1m_output for p in found)
        asked = [(p.vendor, p.usd_per_1m_input, p.usd_per_1m_cached_input, p.usd_per_1m_output) for p in found]
        assert len(set(asked)) == len(asked), "one offer, two names"


def test_a_cached_price_that_is_not_listed_is_null():
    prices = read_list_prices().prices
    assert prices["gpt-5-mini"].usd_per_1m_cached_input is not None
    assert any(p.usd_per_1m_cached_input is None for p in prices.values())
    assert not any(p.usd_per_1m_cached_input == 0 for p in prices.values())


def test_age():
    prices = read_list_prices()
    day = dt.date.fromisoformat(prices.date)
    assert not is_old(prices.date, day + dt.timedelta(days=180))
    assert is_old(prices.date, day + dt.timedelta(days=181))


def entry(**change):
    return {
        "litellm_provider": "v",
        "mode": "chat",
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 2e-6,
    } | change


def test_a_users_own_map(tmp_path):
    file = tmp_path / "map.json"
    file.write_text(
        json.dumps(
            {
                "sample_spec": {"mode": "one of: chat", "input_cost_per_token": 0.0},
                "good": entry(input_cost_per_token_above_200k_tokens=2e-6),
                "free": entry(input_cost_per_token=0.0),
                "half": entry(output_cost_per_token=None),
                "picture": entry(mode="image_generation"),
                "words": entry(input_cost_per_token="cheap"),
                "truth": entry(input_cost_per_token=True),
                "below": entry(input_cost_per_token=-1e-6),
                "list": [1],
                "cached": entry(cache_read_input_token_cost=0, litellm_provider=None, source=3),
            }
        )
    )
    prices = read_list_prices(file)
    assert set(prices.prices) == {"good", "cached"}
    good = prices.prices["good"]
    assert (good.usd_per_1m_input, good.usd_per_1m_output, good.dearer_when_long) == (1.0, 2.0, True)
    assert prices.prices["cached"].usd_per_1m_cached_input is None
    assert prices.prices["cached"].page is None
    assert (prices.source, prices.date_is) == (str(file), "file last changed")
    dt.date.fromisoformat(prices.date)
    with pytest.raises(UsageError, match="good"):
        find_list_prices(prices, "m", ["goood"])
    assert [p.name for p in find_list_prices(prices, "none-such", ["cached"])] == ["cached"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', "\x00", '{"schema": "harness.listprices/1", "date": "soon"}']
)
def test_what_is_no_map_is_refused(tmp_path, text):
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"map\.json"):
        read_list_prices(file)


def test_a_map_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_list_prices(tmp_path / "none.json")


def test_an_extract_says_its_own_day_and_source(tmp_path):
    long = entry(litellm_extra=1, input_cost_per_token_above_200k_tokens=3e-6)
    made = {"schema": "harness.listprices/1", "source": "litellm 1.2.3", "date": "2026-11-22", "licence": "MIT"}
    file = tmp_path / "extract.json"
    file.write_text(json.dumps(made | {"prices": {"a": entry(), "b": long}}))
    prices = read_list_prices(file)
    assert list(prices.prices) == ["a", "b"]
    assert prices.prices["b"].dearer_when_long and not prices.prices["a"].dearer_when_long
    assert (prices.source, prices.date, prices.date_is) == ("litellm 1.2.3", "2026-11-22", "copied from the package")
    assert EXTRACT.stat().st_size < 60_000
