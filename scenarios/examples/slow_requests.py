"""What the slowest requests of a run have in common: figures from the Python API, questions to its rows in DuckDB.

    python slow_requests.py runs/20261201T023520Z-trace-mistral-7b

Needs ``pip install duckdb``; rows are Arrow, so Polars and pandas read them as well.
"""

from __future__ import annotations

import sys

import duckdb

from harness.analysis.api import load


def main(path: str) -> None:
    """Print the verdict, how ttft follows from prompt length, and the slowest requests."""
    run = load(path)
    summary = run.summary({"ttft": 2.0})  # limits in seconds
    ttft, cost = summary.metrics.ttft.p95, summary.cost.usd_per_1m_total
    print(f"{summary.verdict}: ttft p95 {seconds(ttft.value)}, {cost.value or cost.note} USD per 1M tokens")

    rows = run.table()  # DuckDB finds it by this name
    assert rows.num_rows
    print(
        duckdb.sql("""
        select 2 ** floor(log2(input_tokens)) as prompt_from, count(*) as requests, avg(ttft_s) as ttft_s,
               quantile_cont(tpot_s, 0.5) as tpot_p50_s, max(lag_s) as worst_lag_s
        from rows where measured and error is null group by 1 order by 1
    """)
    )
    print(
        duckdb.sql("""
        select request_id, input_tokens, output_tokens, ttft_s, lag_s, e2e_s
        from rows where measured order by e2e_s desc nulls last limit 5
    """)
    )


def seconds(value: float | None) -> str:
    """Not known is None, and never 0."""
    return "not known" if value is None else f"{value:.3f} s"


if __name__ == "__main__":
    main(sys.argv[1])
