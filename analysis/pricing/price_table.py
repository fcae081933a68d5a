"""The price decision as one document and as a flat table: `harness.price/1`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.pricing.rate_card import RateCard
from analysis.pricing.terms import Terms, TokenWeights, UnitPrices
from analysis.rates import KIND_WORDS
from harness.errors import HarnessError, UsageError

SCHEMA = "harness.price/1"

Cell = str | float | bool | None
Row = dict[str, Cell]
"""A row of the flat table: not known is None."""

_TYPES = dict.fromkeys(
    (
        "usd_per_1m", "low", "high", "window_s", "utilisation", "gross_margin", "discount", "from_tokens_per_month",
        "break_even_utilisation", "break_even_tokens_per_month", "capacity_tokens_per_month", "fleet_usd_per_month",
        "usd_per_hour", "measured_with_usd_per_hour", "load_value", "load_low", "load_high",
    ),
    pa.float64(),
) | {"replicas": pa.int64(), "n": pa.int64(), "counted_tokens": pa.int64(), "slo_met": pa.bool_()}  # fmt: skip
COLUMNS: dict[str, pa.DataType] = {
    name: _TYPES.get(name, pa.string())
    for name in (
        "tier", "model", "replicas", "engine", "engine_args", "what", "tokens", "usd_per_1m", "low", "high", "n",
        "note", "evidence", "denominator", "counted_tokens", "window", "window_s", "utilisation", "gross_margin",
        "discount", "from_tokens_per_month", "break_even_utilisation", "break_even_tokens_per_month",
        "capacity_tokens_per_month", "fleet_usd_per_month", "structure", "usd_per_hour", "purchase", "region",
        "price_source", "price_date", "measured_with_usd_per_hour", "measured_with_price_date", "quoted_at", "load",
        "load_value", "load_low", "load_high", "load_unit", "trace",
        "slo", "slo_met", "verdict", "measured", "made", "runs",
    )
}  # fmt: skip
"""The flat table: one row per tier, model, kind of figure (``what``) and kind of tokens; not known is null.

``usd_per_1m`` is per 1M of ``counted_tokens``; of the three kinds their products add up to that of "total".
"""
_API = ("tier", "model", "evidence", "trace", "measured", "made", "runs")
"""What of our own fleet stands in the row of an API that its traffic is held against."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceReport:
    """What to charge, for every tier and model that was asked about."""

    schema: str
    made: str
    """UTC, ISO 8601: when these prices were worked out. The measurements have their own days."""
    terms: Terms
    structure: TokenWeights
    charges: list[RateCard]
    refused: list[tuple[str, tuple[str, ...]]]
    """INVALID runs with their reasons."""
    list_prices: dict[str, str]
    """Source, date and licence of the API list prices."""
    assumptions: tuple[str, ...]


def price_rows(report: PriceReport) -> list[Row]:
    """The flat table as dicts with the keys of `COLUMNS`."""
    return [row for charge in report.charges for row in _rows(charge, report)]


def _rows(charge: RateCard, report: PriceReport) -> list[Row]:
    basis, q, weights = charge.basis, charge.offered, charge.structure
    before = basis.measured_with if basis else None
    cached = "-" if weights.cached_input is None else f"{weights.cached_input:g}"
    common: Row = dict.fromkeys(COLUMNS) | {
        "tier": charge.tier, "model": charge.model, "replicas": charge.replicas, "engine": charge.engine,
        "engine_args": " ".join(charge.args), "evidence": charge.evidence,
        "window": charge.window, "window_s": charge.window_s,
        "capacity_tokens_per_month": charge.capacity_tokens_per_month,
        "fleet_usd_per_month": charge.fleet_usd_per_month,
        "structure": f"{weights.method} input:output:cached {weights.input:g}:{weights.output:g}:{cached}",
        "usd_per_hour": basis.usd_per_hour if basis else None, "purchase": basis.purchase if basis else None,
        "region": basis.region if basis else None, "price_source": basis.source if basis else None,
        "price_date": basis.date if basis else None,
        "measured_with_usd_per_hour": before.usd_per_hour if before else None,
        "measured_with_price_date": before.date if before else None, "quoted_at": charge.quoted_at,
        "load": charge.load, "load_value": q.value if q else None, "load_low": q.low if q else None,
        "load_high": q.high if q else None, "load_unit": q.unit if q else None, "trace": charge.trace,
        "slo": charge.slo, "slo_met": charge.slo_met, "measured": charge.measured, "made": report.made,
        "runs": " ".join(charge.runs),
    }  # fmt: skip
    if charge.cost_full is None or charge.cost is None:
        return [common | {"what": "no price", "note": charge.reason}]
    counted, utilisation = _counted(charge), report.terms.utilisation
    rows = _kinds(common | {"what": "cost", "utilisation": 1.0}, charge.cost_full, counted)
    rows += _kinds(common | {"what": "cost", "utilisation": utilisation}, charge.cost, counted)
    if charge.floor is not None:
        # another load, which meets no SLO; the mix is that of the quoted one
        floor: Row = {
            "what": "saturated floor", "utilisation": 1.0, "quoted_at": "a measured load", "slo_met": None,
            "load": f"{KIND_WORDS[charge.loop]}, {charge.floor_load:g} {q.unit if q else ''}".strip(),
            "load_value": charge.floor_load, "load_low": None, "load_high": None, "capacity_tokens_per_month": None,
            "window_s": None, "runs": None,
        }  # fmt: skip
        for row in _kinds(common | floor, charge.floor, counted):
            kind = str(row["denominator"]).partition(" of successful requests")[0]
            row["denominator"] = f"{kind} of successful requests, in the mix of the quoted load"
            row["note"] = row["note"] or "highest throughput of any VALID run: it keeps no SLO"
            rows.append(row)
    for offer in charge.offers:
        share = offer.break_even_utilisation
        facts: Row = {
            "what": f"price: {offer.name}", "utilisation": utilisation, "gross_margin": offer.margin,
            "discount": offer.discount, "from_tokens_per_month": offer.from_tokens, "break_even_utilisation": share,
            "break_even_tokens_per_month": (charge.capacity_tokens_per_month or 0.0) * share if share <= 1 else None,
        }  # fmt: skip
        rows += _kinds(common | facts, offer.prices, counted)
    for a in charge.against:
        facts = {key: common[key] if key in _API else None for key in COLUMNS} | {
            "what": f"API list price: {a.price.name}", "evidence": "list price",
            "price_source": report.list_prices["source"], "price_date": report.list_prices["date"],
            "break_even_utilisation": a.break_even_utilisation.value,
            "break_even_tokens_per_month": a.break_even_tokens_per_month, "verdict": a.verdict,
            "note": "; ".join(a.notes) or None,
        }  # fmt: skip
        asked = {
            "input": a.price.usd_per_1m_input, "cached_input": a.price.usd_per_1m_cached_input,
            "output": a.price.usd_per_1m_output, "total": a.usd_per_1m_total,
        }  # fmt: skip
        rows += [facts | counted[kind] | {"tokens": kind, "usd_per_1m": usd} for kind, usd in asked.items()]
    return rows


def _counted(charge: RateCard) -> dict[str, Row]:
    """Denominator and tokens of each kind of tokens."""
    mix = charge.mix
    assert mix is not None and charge.cost is not None
    apart = charge.cost.cached_input.value is not None
    kinds = {
        "input": ("uncached input" if apart else "input", mix.uncached_input if apart else mix.input),
        "cached_input": ("cached input", mix.cached_input if apart else None),
        "output": ("output", mix.output),
        "total": ("input + output", mix.total),
    }
    return {
        kind: {"denominator": charge.denominator.replace("input + output", words, 1), "counted_tokens": tokens}
        for kind, (words, tokens) in kinds.items()
    }


def _kinds(common: Row, prices: UnitPrices, counted: Mapping[str, Row]) -> list[Row]:
    named = {"input": prices.input, "cached_input": prices.cached_input, "output": prices.output, "total": prices.total}
    return [
        {**common, **counted[kind], "tokens": kind, "usd_per_1m": q.value, "low": q.low, "high": q.high, "n": q.n,
         "note": q.note}
        for kind, q in named.items()
    ]  # fmt: skip


def price_csv(rows: Sequence[Row]) -> str:
    """The flat table as CSV. A text that a spreadsheet would run as a formula is preceded by an apostrophe."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Cell) -> Cell:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = " ".join(value.split())
        return f"'{text}" if text[:1] in ("=", "+", "-", "@") and text != "-" else text
    return value


def write_prices(path: Path, report: PriceReport) -> None:
    """Write the flat table (.parquet, .csv) or the whole document (.json) beside ``path``, then rename it into place.

    Raises `UsageError` for another ending, `HarnessError` when it cannot be written.
    """
    rows = price_rows(report)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".parquet":
            schema = pa.schema(list(COLUMNS.items()), metadata={"harness.price": SCHEMA})
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
        elif path.suffix == ".csv":
            temporary.write_text(price_csv(rows), encoding="utf-8")
        elif path.suffix == ".json":
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
        else:
            raise UsageError(f"{path}: write to a file that ends in .parquet, .csv or .json")
        temporary.replace(path)
    except OSError as e:
        raise HarnessError(f"{path}: cannot write ({e.strerror or e})") from e
    finally:
        temporary.unlink(missing_ok=True)
