"""Rows elsewhere: DuckDB, Polars, pandas and Arrow read the file as it is, and say what the report says."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from run_files import MS, SPEC, TIER, bad, good, write_run

from harness.analysis.api import load
from harness.analysis.report import export
from harness.analysis.report.export import SCHEMA, export_runs
from harness.analysis.rows import columns
from harness.analysis.rows.read import read_run
from harness.cli.results import export as export_verb
from harness.errors import ResultsError, UsageError


@pytest.fixture
def runs(tmp_path):
    rows = [good(i, ttft_ms=40 + i, lag_ms=2) for i in range(20)]
    rows[3].chunk_tokens = None
    rows[4].chunk_ns, rows[4].chunk_tokens, rows[4].output_tokens = [], None, 0
    rows += [bad(20, "server", detail="503, \"full\"\n=cmd|' /C calc'!A0"), bad(21, "unsent", sent=False)]
    one = write_run(tmp_path / "one", rows, workers=2, plan={0: {"phase": "warmup"}})
    two = write_run(tmp_path / "two", [good(i) for i in range(5)], tier=replace(TIER, name="big"), model="=m")
    return [one, two]


def test_parquet_holds_the_rows_and_what_is_derived(runs, tmp_path):
    out = tmp_path / "rows.parquet"
    assert export_runs(runs, out) == 27
    table = parquet.read_table(out)
    assert table.schema.equals(SCHEMA)
    rows = {(r["run"], r["request_id"]): r for r in table.to_pylist()}
    row = rows["one", 7]
    assert row["tier"] == "test.large" and rows["two", 0]["tier"] == "big"
    assert row["ttft_s"] == pytest.approx(0.049) and row["service_ttft_s"] == pytest.approx(0.047)
    assert row["lag_s"] == pytest.approx(0.002)
    assert row["tpot_s"] == pytest.approx(0.010) == pytest.approx(row["max_itl_s"])
    assert row["e2e_s"] == pytest.approx(0.079)
    assert row["chunk_gap_ns"] == [47 * MS, 10 * MS, 10 * MS, 10 * MS]
    assert row["chunk_tokens"] == [1, 1, 1, 1] and rows["one", 3]["chunk_tokens"] is None
    assert row["measured"] and not rows["one", 0]["measured"]
    assert rows["one", 0]["ttft_s"] is None  # warm-up is in no figure
    assert rows["one", 4]["ttft_s"] is None and rows["one", 4]["e2e_s"] is not None
    assert rows["one", 20]["e2e_s"] is None and rows["one", 20]["lag_s"] == 0.0
    assert rows["one", 21]["lag_s"] is None and rows["one", 21]["sent_ns"] is None


def test_arrow_agrees_with_the_report(runs, tmp_path):
    out = tmp_path / "rows.parquet"
    export_runs(runs, out)
    true = load(runs[0]).summary().metrics.ttft.mean.value
    table = parquet.read_table(out, filters=[("run", "=", "one")])
    assert np.mean(table.column("ttft_s").drop_null().to_numpy()) == pytest.approx(true)


def test_duckdb_reads_it(runs, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    for name in ("rows.parquet", "rows.jsonl"):
        export_runs(runs, out := tmp_path / name)
        asked = f"SELECT avg(ttft_s), count(*), sum(len(chunk_gap_ns)) FROM '{out}' WHERE run = 'one' AND measured"
        mean, rows, chunks = duckdb.sql(asked).fetchall()[0]
        true = load(runs[0]).summary().metrics.ttft.mean
        assert (mean, rows, chunks) == (pytest.approx(true.value), 21, 18 * 4)


def polars_reads(polars, file):
    if file.suffix == ".csv":
        return polars.read_csv(file, infer_schema_length=None)
    return {".parquet": polars.read_parquet, ".jsonl": polars.read_ndjson}[file.suffix](file)


def pandas_reads(pandas, file):
    if "json" in file.suffix:
        return pandas.read_json(file, lines=True)
    return pandas.read_csv(file) if file.suffix == ".csv" else pandas.read_parquet(file)


def test_polars_and_pandas_read_it(runs, tmp_path):
    polars, pandas = pytest.importorskip("polars"), pytest.importorskip("pandas")
    true = load(runs[0]).summary().metrics.e2e.mean.value
    for name in ("rows.parquet", "rows.csv", "rows.jsonl"):
        export_runs(runs, out := tmp_path / name)
        frames = [polars_reads(polars, out).to_pandas(), pandas_reads(pandas, out)]
        for frame in frames:
            one = frame[frame["run"] == "one"]
            assert len(one) == 22
            assert one["e2e_s"].mean() == pytest.approx(true)
            assert one["lag_s"].isna().sum() == 2  # warm-up, never sent


def test_csv_is_flat_and_runs_no_formula(runs, tmp_path):
    out = tmp_path / "rows.csv"
    export_runs(runs, out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == SCHEMA.names
    by_id = {(r["run"], r["request_id"]): r for r in rows}
    assert by_id["two", "0"]["chunk_gap_ns"] == "50000000 10000000 10000000 10000000"
    assert by_id["two", "0"]["model"] == "'=m"
    assert by_id["one", "21"]["sent_ns"] == ""
    assert not any(cell.startswith(("=", "+", "@")) for r in rows for cell in r.values())


def test_it_is_written_in_batches(runs, tmp_path, monkeypatch):
    export_runs(runs, one := tmp_path / "one.parquet")
    monkeypatch.setattr(columns, "PART_CHUNKS", 3)
    monkeypatch.setattr(export, "GROUP_CHUNKS", 8)
    export_runs(runs, many := tmp_path / "many.parquet")
    assert parquet.ParquetFile(many).num_row_groups > 5 > parquet.ParquetFile(one).num_row_groups
    assert parquet.read_table(many).equals(parquet.read_table(one))


def test_a_cut_run_gives_what_there_is(runs, tmp_path):
    file = runs[0] / "results-0.arrows"
    file.write_bytes(file.read_bytes()[:-400])
    assert 0 < export_runs(runs, tmp_path / "rows.jsonl") < 27


def test_rows_that_are_not_all_are_said(runs, tmp_path):
    """Who takes rows elsewhere sees no verdict there, so a cut run must not look like a short one."""
    said = []
    export_runs(runs, tmp_path / "rows.csv", said.append)
    assert said == []
    file = runs[0] / "results-0.arrows"
    file.write_bytes(file.read_bytes()[:-600])
    stopped = write_run(tmp_path / "stopped", [good(0)], status="stopped")
    done = CliRunner().invoke(export_verb, [str(runs[0]), str(stopped), "-o", str(tmp_path / "rows.csv")])
    words = " ".join(done.stderr.split())
    assert "one: 10 measured requests have no row: it is INVALID" in words
    assert "stopped: the run is stopped, not complete: it is INVALID" in words


@pytest.mark.parametrize("name", ["rows.xlsx", "rows"])
def test_another_ending_is_refused(runs, tmp_path, name):
    with pytest.raises(UsageError, match=r"\.parquet"):
        export_runs(runs, tmp_path / name)


def test_what_cannot_be_read_or_written_is_said_and_leaves_the_old_file(runs, tmp_path):
    with pytest.raises(ResultsError, match="choose another -o"):
        export_runs(runs, tmp_path / "no" / "rows.csv")
    with pytest.raises(UsageError, match="twice"):
        export_runs([runs[0], runs[0]], tmp_path / "rows.csv")
    (tmp_path / "old.csv").write_text("old")
    with pytest.raises(ResultsError, match="not a run directory"):
        export_runs([runs[0], tmp_path], tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_command_line(runs, tmp_path):
    out = tmp_path / "rows.parquet"
    done = CliRunner().invoke(export_verb, [*map(str, runs), "-o", str(out)], standalone_mode=False)
    assert done.exception is None
    assert done.stdout == f"{out}\n"
    assert parquet.read_metadata(out).num_rows == 27


# ----------------------------------------------------------------------------------------------------- the Python API


def test_load_gives_table_summary_and_manifest(runs):
    run = load(str(runs[0]))
    table = run.table()
    assert isinstance(table, pa.Table)
    assert table.schema.equals(SCHEMA)
    assert run.manifest.tier.name == "test.large"
    assert run.summary().metrics.ttft.mean.n == table.column("ttft_s").drop_null().length()
    assert "measured requests" in repr(run)


def test_as_dict_is_the_report_as_json(runs):
    from harness.analysis.report.run import render_json
    from harness.analysis.summary import summarise

    run = load(runs[0])
    assert run.as_dict() == json.loads(render_json(summarise(read_run(runs[0]))))
    assert run.as_dict({"ttft": 0.05})["slo"]["limits"] == {"ttft": 0.05}


def test_rows_that_change_while_they_are_read_are_noticed(runs):
    run = read_run(runs[0])
    file = runs[0] / "results-0.arrows"
    file.write_bytes((runs[1] / "results-0.arrows").read_bytes())
    with pytest.raises(ResultsError, match="report again"):
        list(run.parts())


def test_rows_that_came_later_are_not_mixed_in(tmp_path):
    """A report on a run that is still writing: what is there when it is read is what is reported."""
    short = read_run(write_run(tmp_path / "run", [good(i) for i in range(5)], requests=9))
    write_run(tmp_path / "run", [good(i) for i in range(9)], spec=SPEC)
    assert sum(len(part) for part in short.parts()) == 5


def test_no_rows_are_a_table_of_none(tmp_path):
    path = write_run(tmp_path / "none", [], requests=2)
    export_runs([path], out := tmp_path / "none.parquet")
    assert parquet.read_table(out).schema.equals(SCHEMA)
