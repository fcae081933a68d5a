"""Langfuse's exports of a table, as CSV and Parquet: the same calls as the JSON of the same observations."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.errors import TraceError
from harness.trace.io import Trace, open_trace

Observation = Mapping[str, Any]

MESSAGES = [{"role": "system", "content": 'Be brief, "always".'}, {"role": "user", "content": "Line one\nline, two"}]


def observation(id_: str, start: float, **more: object) -> dict[str, object]:
    return {
        "id": id_, "traceId": "t1", "type": "GENERATION", "name": "chat", "parentObservationId": None,
        "startTime": at(start), "endTime": at(start + 1), "level": "DEFAULT", "providedModelName": "gpt-x",
        "input": None, "output": "Yes.", "usageDetails": {"input": 100, "output": 10, "total": 110}, "metadata": {},
        "timeToFirstToken": 0.25,
    } | more  # fmt: skip


def at(second: float) -> str:
    return f"2026-09-21T14:13:{20 + second:06.3f}Z"


OBSERVATIONS = [
    observation("c", 8, input=MESSAGES, usageDetails={"input": 120, "output": 11, "total": 131}),
    observation("root", 0, type="AGENT", endTime=at(9), usageDetails={}),
    # A framework's view of the call and the SDK's under it: one call.
    observation("a", 1, endTime=at(3), input=json.dumps({"messages": MESSAGES}), parentObservationId="root"),
    observation("a2", 1.5, endTime=at(2.5), input={"messages": MESSAGES}, parentObservationId="a",
                metadata={"attributes": {"gen_ai.response.id": "r1"}, "scope": {"name": "sdk"}}),
    observation("b", 4, input="", usageDetails={
        "input": 900, "output": 30, "input_cached_tokens": 600, "total": 930, "output_reasoning_tokens": 0}),
    observation("d", 6, level="ERROR", statusMessage="429"),
    observation("e", 7, traceId="t2", input={"contents": [{"role": "user", "parts": [{"text": "Hi"}]}]},
                usageDetails={"input": 7, "output": 3, "total": 10}),
]  # fmt: skip
WANT = [
    (0.0, 100, 10, None, True), (2.5, 900, 30, 600, False), (5.5, 7, 3, None, True), (6.5, 120, 11, None, True)
]  # fmt: skip


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def as_csv(rows: Sequence[Observation], names: Sequence[str] | None = None, mark: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=mark, lineterminator="\n")
    names = names or list(rows[0])
    writer.writerow(names)
    writer.writerows([cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Observation]) -> bytes:
    """As ClickHouse writes it: maps and times of their own type, texts as they lie there."""

    def text(value: object) -> str | None:
        return None if value is None else cell(value)

    columns: dict[str, pa.Array] = {}
    for name in rows[0]:
        values = [row.get(name) for row in rows]
        if name in ("startTime", "endTime"):
            times = [datetime.fromisoformat(str(v)) for v in values]
            columns[snake(name)] = pa.array(times, pa.timestamp("us", "UTC"))
        elif name == "usageDetails":
            columns["usage_details"] = pa.array([list(v.items()) for v in values], pa.map_(pa.string(), pa.uint64()))
        elif name == "metadata":
            maps = [[(k, cell(inner)) for k, inner in v.items()] for v in values]
            columns[name] = pa.array(maps, pa.map_(pa.string(), pa.string()))
        elif name == "timeToFirstToken":
            columns[snake(name)] = pa.array(values, pa.float64())
        else:
            columns[snake(name)] = pa.array([text(v) for v in values], pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def snaked(rows: Sequence[Observation]) -> list[Observation]:
    return [{snake(name): value for name, value in row.items()} for row in rows]


CARRIERS = {
    "csv": as_csv(OBSERVATIONS),
    "csv of the blob export": as_csv(snaked(OBSERVATIONS)),
    "csv, columns in another order": as_csv(OBSERVATIONS, sorted(OBSERVATIONS[0])),
    "csv, byte order mark, CRLF": b"\xef\xbb\xbf" + as_csv(OBSERVATIONS).replace(b"0.25\n", b"0.25\r\n"),
    "csv, semicolons": as_csv(OBSERVATIONS, mark=";"),
    "csv twice, header again": as_csv(OBSERVATIONS[:4]) + as_csv(OBSERVATIONS[3:]),
    "json": json.dumps(OBSERVATIONS).encode(),
    "json lines": "".join(json.dumps(row) + "\n" for row in snaked(OBSERVATIONS)).encode(),
    "parquet": as_parquet(OBSERVATIONS),
}


def read(path: Path) -> tuple[list[tuple[Any, ...]], Trace]:
    trace = open_trace(path)
    return [
        (r.arrival_s, r.input_tokens, r.output_tokens, r.cached_tokens, r.messages is not None) for r in trace
    ], trace


@pytest.mark.parametrize("carrier", CARRIERS)
def test_every_export_has_the_calls_of_the_json(tmp_path: Path, carrier: str) -> None:
    path = tmp_path / "observations"
    path.write_bytes(CARRIERS[carrier])
    kept, trace = read(path)
    assert trace.format == "langfuse"
    assert kept == WANT, trace.notes
    assert trace.rows_dropped["another span of the same call"] == 1
    assert trace.rows_failed == 1
    first = next(iter(open_trace(path)))
    assert (first.model, first.messages) == ("gpt-x", tuple(MESSAGES))


TRACES = [
    {"id": "t1", "timestamp": at(0), "name": "agent", "userId": "u", "sessionId": "s1", "bookmarked": False,
     "public": False, "tags": [], "input": "x", "output": "y", "metadata": {}, "totalTokens": 1230},
    {"id": "t2", "timestamp": at(0), "name": "agent", "userId": None, "sessionId": None, "bookmarked": False,
     "public": False, "tags": [], "input": "x", "output": "y", "metadata": {}, "totalTokens": 10},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_an_export_of_traces_alone_has_no_calls_and_says_which_has(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "traces"
    if kind == "csv":
        path.write_bytes(as_csv(TRACES))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(snaked([{k: cell(v) for k, v in row.items()} for row in TRACES])), path)
    else:
        path.write_text(json.dumps(TRACES) if kind == "json" else "".join(json.dumps(row) + "\n" for row in TRACES))
    with pytest.raises(TraceError, match=r"export of traces.*export the observations"):
        list(open_trace(path))


@pytest.mark.parametrize("last", [False, True])
def test_traces_beside_their_observations_name_the_sessions(tmp_path: Path, last: bool) -> None:
    """Observations of the table do not say theirs."""
    (tmp_path / ("z.csv" if last else "a.csv")).write_bytes(as_csv(snaked(TRACES)))
    (tmp_path / "observations.csv").write_bytes(as_csv(snaked(OBSERVATIONS)))
    (tmp_path / "scores.csv").write_text("id,timestamp,trace_id,name,value\n1,2,t1,x,3\n")
    trace = open_trace(tmp_path)
    assert [(r.input_tokens, r.session_id) for r in trace] == [(100, "s1"), (900, "s1"), (7, None), (120, "s1")]
    assert any("scores.csv" in note for note in trace.notes)


@pytest.mark.parametrize("carrier", ["csv", "parquet"])
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, carrier: str) -> None:
    rows = [*OBSERVATIONS[:1], observation("x", 3, usageDetails={"input": 100, "output": 10, "input_audio": 5})]
    path = tmp_path / "t"
    path.write_bytes(as_csv(rows) if carrier == "csv" else as_parquet(rows))
    with pytest.raises(TraceError, match="no total says whether these are counted inside or beside"):
        list(open_trace(path))
    assert len(list(open_trace(path, skip_bad=True))) == 1
    if carrier == "csv":
        path.write_bytes(as_csv(OBSERVATIONS[:1]) + b"a,b,c\n")
        with pytest.raises(TraceError, match="3 fields, expected"):
            list(open_trace(path))


def test_counts_of_older_exports_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    row = {name: value for name, value in observation("a", 1).items() if name != "usageDetails"}
    for names in (("inputUsage", "outputUsage", "totalUsage"), ("inputTokens", "outputTokens", "totalTokens"),
                  ("promptTokens", "completionTokens", "totalTokens")):  # fmt: skip
        path = tmp_path / names[0]
        path.write_bytes(as_csv([row | dict(zip(names, (100, 10, 110), strict=True))]))
        assert [(r.input_tokens, r.output_tokens) for r in open_trace(path)] == [(100, 10)]
