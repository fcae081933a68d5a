"""API list prices: what vendors ask for 1M tokens, from the LiteLLM price map, each entry exactly as the map has it.

``list_prices.json`` is a small extract of that map (the open models of our catalogue as vendors host them, and a few
flagship models) with the package and version it was copied from, the day, and the licence. A user's own full map
(``model_prices_and_context_window.json``) is read the same way. A price that is not listed is None, never 0.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from harness.errors import UsageError, unknown_name
from harness.untrusted import DECODE_ERRORS, check_regular

EXTRACT = Path(__file__).with_name("list_prices.json")
SCHEMA = "harness.listprices/1"
MAX_BYTES = 100_000_000
TEXT_MODES = ("chat", "completion", "responses")
_SKIPPED = frozenset(
    ["meta", "instruct", "chat", "it", "hf", "turbo", "maas", "fp8", "fp16", "bf16", "int8", "int4", "awq", "gptq"]
)
_REVISION = re.compile(r"v0\.\d|\d{4}|\d{8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListPrice:
    """What one vendor asks for one model, USD per 1M tokens; None: not listed."""

    name: str
    vendor: str
    family: str
    usd_per_1m_input: float
    usd_per_1m_cached_input: float | None
    usd_per_1m_output: float
    dearer_when_long: bool
    """The vendor asks more for long prompts; only the base price is here."""
    page: str | None
    """Where the map says it read the price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceMap:
    """List prices by name, and where and when they were read."""

    source: str
    date: str
    date_is: str
    licence: str | None
    prices: dict[str, ListPrice]


def read_list_prices(path: Path | None = None) -> PriceMap:
    """The shipped extract, or the LiteLLM price map (or an extract of it) in ``path``.

    Entries that are not text models, or have no input and output price above 0, are left out: in that map 0 stands for
    "free or not known". Raises `UsageError` for a file that is not a price map.
    """
    file = path or EXTRACT
    try:
        if check_regular(file) > MAX_BYTES:
            raise UsageError(f"{file}: larger than {MAX_BYTES / 1e6:.0f} MB; a price map is a few MB")
        document = msgspec.json.decode(file.read_bytes(), type=dict[str, object])
        modified = dt.datetime.fromtimestamp(file.stat().st_mtime, dt.UTC).date().isoformat()
    except OSError as e:
        raise UsageError(f"{file}: cannot read the price map ({e.strerror})") from e
    except DECODE_ERRORS as e:
        raise UsageError(f"{file}: not a JSON price map ({e})") from e
    if document.get("schema") == SCHEMA:
        day, entries = str(document.get("date")), document.get("prices")
        try:
            dt.date.fromisoformat(day)
        except ValueError:
            raise UsageError(f"{file}: date {day!r} is not a day like 2026-11-22") from None
        source, date_is, licence = str(document.get("source")), "copied from the package", str(document.get("licence"))
    else:
        # LiteLLM's own file carries no date: the best that can be said is when this copy was written.
        source, day, date_is, licence, entries = str(file), modified, "file last changed", None, document
    found = [_read(name, entry) for name, entry in entries.items()] if isinstance(entries, dict) else []
    prices = {price.name: price for price in found if price is not None}
    if not prices:
        raise UsageError(
            f"{file}: holds no list price; give LiteLLM's model_prices_and_context_window.json (its package litellm "
            "ships it as model_prices_and_context_window_backup.json)"
        )
    return PriceMap(source=source, date=day, date_is=date_is, licence=licence, prices=prices)


def _read(name: str, entry: object) -> ListPrice | None:
    if not isinstance(entry, Mapping) or entry.get("mode") not in TEXT_MODES:
        return None
    into, cached, out = (
        _per_1m(entry.get(key))
        for key in ("input_cost_per_token", "cache_read_input_token_cost", "output_cost_per_token")
    )
    if into is None or out is None:
        return None
    page = entry.get("source")
    return ListPrice(
        name=name, vendor=str(entry.get("litellm_provider") or "not said"), family=family(name),
        usd_per_1m_input=into, usd_per_1m_cached_input=cached, usd_per_1m_output=out,
        dearer_when_long=any(key.startswith(("input", "output")) and "_token_above_" in key for key in entry),
        page=page if isinstance(page, str) else None,
    )  # fmt: skip


def _per_1m(usd_per_token: object) -> float | None:
    """USD per 1M tokens; None when it is not a price. Rounded to what the map's seven digits can hold."""
    if isinstance(usd_per_token, bool) or not isinstance(usd_per_token, int | float):
        return None
    usd = usd_per_token * 1e6
    return round(usd, 9) if math.isfinite(usd) and usd > 0 else None


def find_list_prices(prices: PriceMap, model: str, also: Sequence[str] = ()) -> list[ListPrice]:
    """Prices of the same family as ``model``, cheapest output first, then those named in ``also``.

    A vendor that lists the same prices under several names is here once. Raises `UsageError` for a name in ``also``
    that the map does not have.
    """
    own, same = family(model), dict[tuple[object, ...], ListPrice]()
    for p in prices.prices.values():
        if p.family == own:
            same.setdefault((p.vendor, p.usd_per_1m_input, p.usd_per_1m_cached_input, p.usd_per_1m_output), p)
    found = sorted(same.values(), key=lambda p: (p.usd_per_1m_output, p.usd_per_1m_input, p.name))
    for name in also:
        if name not in prices.prices:
            raise unknown_name("list price", name, prices.prices)
        if prices.prices[name] not in found:
            found.append(prices.prices[name])
    return found


def family(name: str) -> str:
    """Model family and size of a model name: vendor, number format and small revisions left out.

    ``meta-llama/Llama-3.1-8B-Instruct``, ``llama-v3p1-8b-instruct``, ``meta.llama3-1-8b-instruct-v1:0`` and our
    ``llama-3.1-8b-instruct-fp8`` are all ``llama-3.1-8b``. What is not known to be the same stays apart (a distilled
    model is another one).
    """
    text, colon, _ = name.lower().rsplit("/", 1)[-1].partition(":")
    if colon:
        text = re.sub(r"-v\d+$", "", text)  # ``-v1:0`` is Bedrock's own version; ``:dummy`` our random weights
    text = re.sub(r"^(?:(?:us|eu|apac|global|us-gov)\.)?(?:meta|mistral|openai|qwen|deepseek|google)\.", "", text)
    text = re.sub(r"(?<=\d)[p_](?=\d)", ".", text)
    text = re.sub(r"llama[-_]?v?(\d)(?:[-.](\d))?-(?=\d)", lambda m: f"llama-{m[1]}{'.' + m[2] if m[2] else ''}-", text)
    return "-".join(w for w in re.split(r"[-_ ]+", text) if w not in _SKIPPED and not _REVISION.fullmatch(w))
