"""Runs as tables for SQL: DuckDB in memory, which reads what is asked for and can write nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from harness.analysis.flat import COLUMNS, figure_rows, figures
from harness.analysis.labels import label_runs
from harness.analysis.report.export import SCHEMA, run_table
from harness.analysis.rows.read import Run, read_run
from harness.analysis.summary import Summary, summarise
from harness.errors import UsageError
from harness.install import require
from harness.record.manifest import RunDir
from harness.record.samples import (
    HOST_SCHEMA,
    SERVER_SCHEMA,
    WORKER_SCHEMA,
    read_host_metrics,
    read_observations,
    read_server_metrics,
)

Tables = Mapping[str, pa.Table]
_FIGURES = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("run", "figure")),
        *(pa.field(name, pa.float64()) for name in COLUMNS[:3]),
        pa.field("unit", pa.string()), pa.field("n", pa.int64()),
        pa.field("evidence", pa.string()), pa.field("note", pa.string()),
    ]
)  # fmt: skip
_CHUNKS = """create view chunks as
select run, request_id, unnest(range(1, len(chunk_gap_ns) + 1)) as chunk, unnest(chunk_gap_ns) / 1e9 as gap_s,
       unnest(coalesce(chunk_tokens, [null for _ in chunk_gap_ns])) as tokens
from requests"""


class Runs:
    """Run directories, each read once at most; tables are made when a query names them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = dict(zip(label_runs(paths), paths, strict=True))
        self._read: dict[str, Run] = {}
        self._summaries: dict[str, Summary] = {}

    def _runs(self) -> Mapping[str, Run]:
        for label, path in self._paths.items():
            if label not in self._read:
                self._read[label] = read_run(path)
        return self._read

    def _judged(self) -> Mapping[str, Summary]:
        for label, run in self._runs().items():
            if label not in self._summaries:
                self._summaries[label] = summarise(run)
        return self._summaries

    def requests(self) -> pa.Table:
        """A row for each request of each run, as ``harness export`` writes them."""
        return pa.concat_tables([SCHEMA.empty_table(), *(run_table(run, name) for name, run in self._runs().items())])

    def runs(self) -> pa.Table:
        """A row for each run: what it was, its verdict, and the value of every figure."""
        rows = [
            {
                "run": label, "path": s.run, "created": s.created, "model": s.model, "label": s.label,
                "tier": s.tier.name if s.tier else None, "engine": s.engine, "evidence": s.evidence,
                "verdict": s.verdict, "slo_met": s.slo.met if s.slo else None, "mode": s.load.mode,
                "max_in_flight": s.load.concurrency, "seed": s.plan.seed, "requests": s.requests.offered,
                "succeeded": s.requests.succeeded, "input_tokens": s.tokens.input, "output_tokens": s.tokens.output,
                **{name: quantity.value for name, quantity in figures(s).items()},
            }
            for label, s in self._judged().items()
        ]  # fmt: skip
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: _column([row.get(name) for row in rows]) for name in names})

    def figures(self) -> pa.Table:
        """A row for each figure of each run, with its 95 % interval."""
        rows = [{"run": label, **row} for label, s in self._judged().items() for row in figure_rows(s)]
        return pa.Table.from_pylist(rows, schema=_FIGURES)

    def workers(self) -> pa.Table:
        """What each load worker saw of itself, each second."""

        def parts(label: str, run: RunDir, of: Run) -> list[pa.Table]:
            files = [(k, run.observations(k)) for k in range(of.manifest.spec.workers)]
            return [_named(read_observations(file), label, "worker", k) for k, file in files if file.exists()]

        return self._samples("worker", WORKER_SCHEMA, parts)

    def servers(self) -> pa.Table:
        """What each server said of itself, each second."""

        def parts(label: str, run: RunDir, of: Run) -> list[pa.Table]:
            found = [(r.index, read_server_metrics(run.server_metrics(r.index))) for r in of.manifest.replicas]
            return [_named(table, label, "replica", k) for k, table in found if table is not None]

        return self._samples("replica", SERVER_SCHEMA, parts)

    def hosts(self) -> pa.Table:
        """What each machine was doing, each second."""

        def parts(label: str, run: RunDir, of: Run) -> list[pa.Table]:
            files = sorted(run.path.glob("host-*.arrows"))
            return [
                _named(read_host_metrics(f), label, "host", f.stem.removeprefix("host-")) for f in files
            ]  # fmt: skip

        return self._samples("host", HOST_SCHEMA, parts)

    def _samples(
        self, name: str, schema: pa.Schema, parts: Callable[[str, RunDir, Run], list[pa.Table]]
    ) -> pa.Table:  # fmt: skip
        kind = pa.string() if name == "host" else pa.int64()
        empty = pa.schema([("run", pa.string()), (name, kind), *schema]).empty_table()
        found = [part for label, run in self._runs().items() for part in parts(label, RunDir(run.path), run)]
        return pa.concat_tables([empty, *(part.cast(empty.schema) for part in found)])


VIEWS = ("requests", "chunks", "runs", "figures", "workers", "servers", "hosts")


def _column(values: list[Any]) -> pa.Array:
    """An array; of a column without any value one of numbers."""
    return pa.array(values, None if any(value is not None for value in values) else pa.float64())


def _named(table: pa.Table, label: str, name: str, value: object) -> pa.Table:
    who = pa.array([value]).take(pa.array(np.zeros(len(table), int)))
    run = pa.array([label]).take(pa.array(np.zeros(len(table), int)))
    return table.add_column(0, name, who).add_column(0, "run", run)


def query(runs: Runs, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """(names of the columns, rows) of one SELECT over `VIEWS`.

    It reads no file and no network, changes nothing, and sees no variable of this process. Raises `UsageError` on what
    is none, or what DuckDB refuses, and `HarnessError` where DuckDB is not installed.
    """
    duckdb: Any = require("duckdb", extra="sql")
    with duckdb.connect(
        ":memory:", config={"enable_external_access": False, "python_enable_replacements": False}
    ) as database:
        try:
            statements = database.extract_statements(sql)
            if len(statements) != 1 or statements[0].type not in (
                duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN,
            ):  # fmt: skip
                raise UsageError("one SELECT (or DESCRIBE, SUMMARIZE), since runs are only read")
            named = set(VIEWS) & set(re.findall(r"\w+", sql.lower()))  # one too many costs time, and nothing else
            if "chunks" in named:
                named.add("requests")
            for view in VIEWS:
                if view in named and view != "chunks":
                    database.register(view, getattr(runs, view)())
            if "chunks" in named:
                database.execute(_CHUNKS)
            database.execute("set lock_configuration = true")
            found = database.execute(statements[0])
            return [column[0] for column in found.description], found.fetchall()
        except duckdb.Error as e:
            raise UsageError(f"{e}\n  views: {', '.join(VIEWS)}; their columns: -c 'describe requests'") from e
