"""From rows to a price by other means: DuckDB over the result files, by the definitions in METRICS.md alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pytest
from click.testing import CliRunner
from run_files import SPEC, good, write_run

from harness.cli.price import price
from harness.record.manifest import MANIFEST

duckdb = pytest.importorskip("duckdb")

SLO_S, WANTED = 0.5, 0.99
RATES = {5: 0, 20: 2, 40: 60}
"""Requests/s, and how many of 500 requests are slow."""


def rows_of(path):
    """Result rows of a run, as they lie in its files."""
    with pa.OSFile(str(path / "results-0.arrows")) as source, pa.ipc.open_stream(source) as stream:
        return stream.read_all()


@pytest.fixture
def sweep(tmp_path):
    """Three loads; lengths and cached tokens differ from request to request."""
    for rate, slow in RATES.items():
        results = []
        for i in range(500):
            row = good(i, round(i * 1e9 / rate), ttft_ms=900 if i * slow % 500 < slow else 50 + i % 7, itl_ms=10,
                       tokens=3 + i % 5, inputs=20 + i % 11)  # fmt: skip
            results.append(replace(row, cached_tokens=i % 13))
        folder = write_run(tmp_path / "sweep" / f"r{rate}", results, spec=replace(SPEC, slo={"ttft_p99": SLO_S}))
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["plan"]["planned_rate"] = float(rate)
        (folder / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path / "sweep"


def test_the_price_is_what_anybody_finds_in_the_rows(sweep):
    loads = {}
    for rate in RATES:
        rows = rows_of(sweep / f"r{rate}")  # DuckDB reads it by its name
        loads[rate] = duckdb.sql(
            f"""
            with ok as (select *, list_sum(chunk_gap_ns[1:1]) as first_gap from rows)
            select (max(finished_ns) - min(scheduled_ns)) / 1e9 as seconds,
                   sum(input_tokens) as input, sum(cached_tokens) as cached, sum(output_tokens) as output,
                   avg(case when error is null and sent_ns + first_gap - scheduled_ns <= {SLO_S} * 1e9
                       then 1.0 else 0.0 end) as kept
            from ok
            """
        ).df().iloc[0].to_dict()  # fmt: skip
        assert rows.num_rows == 500
    # capacity: where the share that kept the limit comes down to 99 %, on the straight line between two loads
    below, above = loads[20], loads[40]
    assert loads[5]["kept"] == 1.0 and below["kept"] == pytest.approx(0.996) and above["kept"] < WANTED
    place = (below["kept"] - WANTED) / (below["kept"] - above["kept"])

    def between(figure):
        return figure(below) + place * (figure(above) - figure(below))

    into, out = (between(lambda x, k=kind: x[k] / x["seconds"]) for kind in ("input", "output"))
    cached_share = between(lambda x: x["cached"] / x["input"])
    usd_per_s = 3.6 / 3600
    usd_per_1m = usd_per_s / (into + out) * 1e6
    cached = into * cached_share
    weighed = (into - cached) * 1.0 + cached * 0.25 + out * 4.0
    done = CliRunner().invoke(
        price, [str(sweep), "--ratio", "1:4:0.25", "--utilisation", "30%", "--margin", "40%", "--format", "json"],
        standalone_mode=False,
    )  # fmt: skip
    assert done.exception is None and done.return_value == 0
    (charge,) = json.loads(done.stdout)["charges"]
    full, offer = charge["cost_full"], charge["offers"][0]["prices"]
    assert charge["quoted_at"] == "capacity"
    assert charge["offered"]["value"] == pytest.approx(20 + 20 * place, rel=1e-9)
    # whole tokens of an hour: 1 in about 2 million
    assert full["total"]["value"] == pytest.approx(usd_per_1m, rel=1e-5)
    assert full["input"]["value"] == pytest.approx(usd_per_s / weighed * 1e6, rel=1e-4)
    assert full["cached_input"]["value"] == pytest.approx(0.25 * usd_per_s / weighed * 1e6, rel=1e-4)
    assert full["output"]["value"] == pytest.approx(4 * usd_per_s / weighed * 1e6, rel=1e-4)
    assert offer["total"]["value"] == pytest.approx(usd_per_1m / 0.3 / 0.6, rel=1e-5)
    assert sum(charge["bill_nanousd"]) == pytest.approx(3_600_000_000, abs=1)
    assert charge["floor"]["total"]["value"] == pytest.approx(
        usd_per_s / ((above["input"] + above["output"]) / above["seconds"]) * 1e6
    )
