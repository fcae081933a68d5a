"""Tables of requests by whatever names: CSV, JSON Lines and Parquet with a time and two counts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cli.trace import trace as verbs
from harness.errors import TraceError, UsageError
from harness.trace.formats.record import RowError, TableOptions
from harness.trace.formats.table import parse_map, recognised, role_of
from harness.trace.formats.values import Clock, unit_of
from harness.trace.io import Trace, TraceRecord, open_trace

BASE = datetime(2026, 9, 21, 14, 13, 20, tzinfo=UTC)
ROWS = [(0.0, 374, 44), (4.25, 396, 109), (5.5, 91, 16)]


def read(path: Path, **options: object) -> tuple[list[tuple[float | None, int | None, int | None]], Trace]:
    trace = open_trace(path, **options)  # type: ignore[arg-type]
    return [(r.arrival_s, r.input_tokens, r.output_tokens) for r in trace], trace


def write(tmp_path: Path, text: str, name: str = "t") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def csv_of(names: Sequence[str], rows: Sequence[Sequence[object]], mark: str = ",") -> str:
    return "".join(mark.join(map(str, row)) + "\n" for row in [names, *rows])


def problem(path: Path, **options: object) -> str:
    with pytest.raises(TraceError) as caught:
        list(open_trace(path, **options))  # type: ignore[arg-type]
    return str(caught.value)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("timestamp", "prompt_tokens", "completion_tokens"),
        ("arrival_s", "input_tokens", "output_tokens"),
        ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
        ("Start Time", "Prompt Tokens", "Completion Tokens"),
        ("startTime", "promptTokens", "completionTokens"),
        ("created_at", "tokens_prompt", "tokens_completion"),
        ("request_time", "input_len", "output_len"),
        ("ts", "ISL", "OSL"),
        ("time", "input_length", "output_length"),
    ],
)
@pytest.mark.parametrize("carrier", ["csv", "json", "parquet"])
def test_common_names_are_recognised_and_said(tmp_path, names, carrier):
    rows = [((BASE + timedelta(seconds=t)).isoformat(), i, o, "x") for t, i, o in ROWS]
    columns = (*names, "request_id")
    if carrier == "csv":
        path = write(tmp_path, csv_of(columns, rows))
    elif carrier == "json":
        path = write(tmp_path, "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    else:
        path = tmp_path / "t"
        pq.write_table(pa.table({name: [row[at] for row in rows] for at, name in enumerate(columns)}), path)
    kept, trace = read(path)
    assert kept == ROWS
    if trace.format != "mooncake":
        said = f"arrival={names[0]}, input={names[1]}, output={names[2]}"
        assert any(said in note for note in trace.notes)
        assert carrier == "parquet" or "columns not replayed: request_id" in trace.notes
    assert (
        trace.clock
        == f"{'timestamp' if trace.format == 'mooncake' else names[0]}, a date and time, UTC where no zone is given"
    )


def test_roles():
    names = ("prompt_tokens", "usage.prompt_tokens", "arrival_time_ns", "latency_ms", "tokens_s")
    assert [role_of(name) for name in names] == ["input", "input", "arrival", None, None]
    assert recognised(["created", "timestamp", "input_tokens", "prompt_tokens"])["input"] == "input_tokens"
    assert recognised(["created", "timestamp"])["arrival"] == "timestamp"


@pytest.mark.parametrize(
    ("name", "bare", "unit"),
    [
        ("arrival_s", "arrival", "s"), ("arrival_time_ns", "arrival_time", "ns"), ("Timestamp (ms)", "timestamp", "ms"),
        ("startTimeUs", "start_time", "us"), ("time_seconds", "time", "s"), ("ts", "ts", None),
        ("timestamps", "timestamps", None), ("time_milliseconds", "time", "ms"), ("t_micros", "t", "us"),
    ],
)  # fmt: skip
def test_a_unit_in_the_name(name, bare, unit):
    assert unit_of(name) == (bare if unit else name, unit)


def test_no_name_of_ours_is_offered_for_anothers(tmp_path):
    """prompt_tokens is no misspelt output_tokens."""
    row = {"arrival_s": 1.5, "prompt_tokens": 5, "completion_tokens": 7}
    kept, trace = read(write(tmp_path, json.dumps(row) + "\n"))
    assert (kept, trace.format) == ([(0.0, 5, 7)], "table")
    assert "did you mean input_tokens" in problem(write(tmp_path, json.dumps({"arrival_s": 0, "input_tokns": 5})))


# --- how files are written -------------------------------------------------------------------------------------------

ISO = [(f"2026-09-21 14:13:{20 + t:010.7f}", i, o) for t, i, o in ROWS]
NAMES = ("timestamp", "prompt_tokens", "completion_tokens")


@pytest.mark.parametrize(
    "text",
    [
        csv_of(NAMES, ISO),
        csv_of(NAMES, ISO).replace("\n", "\r\n"),
        csv_of(NAMES, [[f'"{v}"' for v in row] for row in ISO]),
        csv_of([f'"{n}"' for n in NAMES], ISO),
        csv_of(NAMES, [(t, f"{i}.0", f"{o}.00") for t, i, o in ISO]),
        csv_of(NAMES, ISO, ";"),
        "sep=;\n" + csv_of(NAMES, [(t.replace(".", ","), i, o) for t, i, o in ISO], ";"),
        csv_of(NAMES, ISO, "\t"),
        csv_of(NAMES, [*ISO[:2], NAMES, ISO[2]]),
        csv_of(NAMES, ISO[:2]) + csv_of(NAMES[::-1], [ISO[2][::-1]]),
        csv_of((*NAMES, "comment"), [(*row, '"a, ""b""\nc"') for row in ISO]),
        "\ufeff" + csv_of(NAMES, ISO),
        csv_of(NAMES, [ISO[2], *ISO[:2]]),
    ],
    ids=["plain", "crlf", "quoted", "quoted header", "floats", "semicolons", "excel", "tabs", "header again",
         "header in another order", "line ends in quotes", "byte order mark", "rotated in the wrong order"],
)  # fmt: skip
def test_what_spreadsheets_and_pandas_write(tmp_path, text):
    kept, trace = read(write(tmp_path, text))
    assert (kept, trace.format, trace.rows_dropped) == (ROWS, "table", {})


def test_what_is_not_given(tmp_path):
    columns = (*NAMES, "session_id", "model", "cached_tokens")
    rows = [(*ISO[0], "s", "m", 64), (*ISO[1][:2], "NaN", "", "null", "-"), (ISO[2][0], "", 5, "", "", "")]
    path = write(tmp_path, csv_of(columns, rows))
    assert "prompt_tokens is empty" in problem(path)
    records = list(open_trace(path, skip_bad=True))
    assert [(r.output_tokens, r.session_id, r.model, r.cached_tokens) for r in records] == [
        (44, "s", "m", 64), (None, None, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize(("into", "out"), [("12.5", "7"), ("-1", "7"), ("1e3", "7"), ("12 tokens", "7"), ("5", "7.1")])
def test_a_count_that_is_none_is_refused(tmp_path, into, out):
    assert "expected a whole number" in problem(write(tmp_path, csv_of(NAMES, [(ISO[0][0], into, out)])))


def test_anthropics_columns_and_usage_objects_are_whole(tmp_path):
    beside = {"cache_creation_input_tokens": 100, "cache_read_input_tokens": 3000}
    row = {"timestamp": ISO[0][0], "input_tokens": 5, "output_tokens": 9, **beside}
    for text in (json.dumps(row), csv_of(list(row), [list(row.values())])):
        (record,) = open_trace(write(tmp_path, text + "\n"))
        assert (record.input_tokens, record.output_tokens, record.cached_tokens) == (3105, 9, 3000)
    usage = {"prompt_tokens": 90, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 64}}
    (record,) = open_trace(write(tmp_path, json.dumps({"time": ISO[0][0], "model": "m", "usage": usage}) + "\n"))
    assert (record.input_tokens, record.output_tokens, record.cached_tokens, record.model) == (90, 9, 64, "m")


# --- what the user says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("carrier", ["csv", "json", "parquet"])
def test_columns_by_what_the_user_says(tmp_path, carrier):
    rows = [(round(1000 * t), i, o, f"s{at}", "big") for at, (t, i, o) in enumerate(ROWS)]
    columns = ("when", "p", "c", "chat", "engine")
    path = tmp_path / "t"
    if carrier == "csv":
        path.write_text(csv_of(columns, rows))
    elif carrier == "json":
        path.write_text("".join(
            json.dumps({"when": t, "tokens": {"p": i, "c": o}, "chat": s, "engine": m}) + "\n" for t, i, o, s, m in rows
        ))  # fmt: skip
    else:
        pq.write_table(pa.table({name: [row[at] for row in rows] for at, name in enumerate(columns)}), path)
    dot = "tokens." if carrier == "json" else ""
    asked = parse_map(f"arrival=when,input={dot}p,output={dot}c,session=chat,model=engine")
    records = list(open_trace(path, table=TableOptions(asked, "ms")))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in records] == ROWS
    assert [(r.session_id, r.model) for r in records] == [("s0", "big"), ("s1", "big"), ("s2", "big")]
    assert "no column nothing" in problem(
        path, table=TableOptions(parse_map("arrival=nothing,input=p,output=c"), "ms")
    ) or (carrier == "json")


def test_map_and_unit_on_the_command_line(tmp_path):
    path = write(tmp_path, csv_of(("ts", "p", "c"), [(0, 5, 7), (1500, 6, 8)]), "t.csv")
    out = tmp_path / "out.jsonl"
    args = ["convert", str(path), "-o", str(out), "--map", "arrival=ts,input=p,output=c", "--time-unit", "ms"]
    assert CliRunner().invoke(verbs, args).exit_code == 0
    assert [json.loads(line)["arrival_s"] for line in out.read_text().splitlines()] == [0.0, 1.5]


@pytest.mark.parametrize("text", ["", "arrival", "arrival=", "when=ts", "input=a,input=b"])
def test_a_map_that_is_none(text):
    with pytest.raises(UsageError):
        parse_map(text)


def test_formats_with_names_of_their_own_take_no_unit(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "arrival_s": 1}\n')
    with pytest.raises(UsageError, match="unit of their own"):
        open_trace(path, table=TableOptions(unit="ms"))


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "said", "absolute"),
    [
        ("timestamp", ["2026-09-21T14:13:20Z"], "timestamp, a date and time", True),
        ("timestamp", [1_790_000_000], "in s since 1970", True),
        ("timestamp", ["1790000000.25"], "in s since 1970", True),
        ("timestamp", [1_790_000_000_250], "in ms since 1970", True),
        ("timestamp", [1_790_000_000_250_000], "in us since 1970", True),
        ("timestamp", [1_790_000_000_250_000_000], "in ns since 1970", True),
        ("timestamp", [0, 0.7, 2], "in seconds, as it has fractions", False),
        ("arrival_time_ns", [46_926_808], "in ns, by its name", False),
        ("timestamp_ms", [1_790_000_000_250], "in ms, by its name", True),
    ],
)
def test_what_the_times_are_is_found_and_said(name, values, said, absolute):
    clock = Clock(name)
    clock.look(values)
    assert (said in clock.said, clock.absolute, clock.unclear) == (True, absolute, None)


@pytest.mark.parametrize(
    "text",
    [
        csv_of(NAMES, [(0, 5, 7), (500, 6, 8)]),
        '{"timestamp": 0, "input_length": 5}\n{"timestamp": 500, "input_length": 6}\n',
    ],
)
def test_small_whole_numbers_ask_for_their_unit_and_are_surveyed_without(tmp_path, text):
    path = write(tmp_path, text)
    said = problem(path)
    assert "span 500 s in seconds, 0.5 s in milliseconds. Say --time-unit" in said
    assert said in problem(path, skip_bad=True)
    kept, trace = read(path, survey=True)
    assert [row[:2] for row in kept] == [(None, 5), (None, 6)]
    assert "in a unit that nothing shows" in (trace.clock or "")
    for unit, last in (("s", 500.0), ("ms", 0.5), ("us", 0.0005)):
        assert read(path, table=TableOptions(unit=unit))[0][-1][0] == last  # type: ignore[arg-type]


def test_a_time_of_another_kind_is_refused_but_dates_and_epochs_mix(tmp_path):
    rows = [(1_790_000_000, 5, 7), (1_790_000_001_000, 5, 7), ("2026-09-21 14:13:20", 5, 7), (3, 5, 7)]
    path = write(tmp_path, csv_of(NAMES, rows))
    kept, trace = read(path, skip_bad=True)
    assert (kept, sum(trace.rows_dropped.values())) == ([(0.0, 5, 7)] * 2, 2)
    dates = [*ISO, (int(BASE.timestamp()) + 7, 5, 7), (f"{int(BASE.timestamp()) + 8}000", 5, 7)]
    assert read(write(tmp_path, csv_of(NAMES, dates)))[0] == [*ROWS, (7.0, 5, 7), (8.0, 5, 7)]


@settings(deadline=None)
@given(st.integers(978_307_200, 4_102_444_799), st.integers(0, 999_999_999))
def test_any_time_since_1970_is_exact(second, rest):
    for unit, size in (("s", 10**9), ("ms", 10**6), ("us", 10**3), ("ns", 1)):
        clock = Clock("t")
        whole = second * 10**9 + rest // size * size
        text = str(whole // size) if unit != "s" else f"{second}.{rest:09}"
        clock.look([text])
        assert clock.ns(text) == (whole if unit != "s" else second * 10**9 + rest)


EPOCHS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
STARTED_NS = int(BASE.timestamp()) * 10**9


def epochs(unit: str) -> list[float]:
    """The three arrivals since 1970; whole numbers but for seconds."""
    if unit == "s":
        return [int(BASE.timestamp()) + t for t, _, _ in ROWS]
    return [(STARTED_NS + round(t * 1e9)) // EPOCHS[unit] for t, _, _ in ROWS]


@pytest.mark.parametrize("name", ["arrival_s", "arrival_{unit}", "epoch_{unit}", "epoch", "unix_time_{unit}",
                                  "startTimeUnix{unit}", "arrival_epoch_{unit}", "timestamp_epoch", "t"])  # fmt: skip
@pytest.mark.parametrize("unit", ["ms", "us", "ns", "s"])
@pytest.mark.parametrize("carrier", ["csv", "json", "parquet"])
def test_times_since_1970_are_read_whatever_their_column_is_called(tmp_path, name, unit, carrier):
    """Also under our own name, which says seconds: no trace is 30,000 years long."""
    column = name.format(unit=unit.capitalize() if "Unix" in name else unit)
    rows = [{column: t, "input_tokens": i, "output_tokens": o}
            for t, (_, i, o) in zip(epochs(unit), ROWS, strict=True)]  # fmt: skip
    path = tmp_path / "t"
    if carrier == "csv":
        path.write_text(csv_of(list(rows[0]), [list(row.values()) for row in rows]))
    elif carrier == "json":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    kept, trace = read(path)
    assert kept == ROWS, trace.notes
    assert trace.clock is not None and column in trace.clock
    if name == "arrival_s" and unit != "s":
        assert f"in {unit} since 1970, by its size" in trace.clock


@pytest.mark.parametrize("carrier", ["csv", "json"])
def test_prompts_without_counts_are_sent_as_their_text(tmp_path, carrier):
    """Beside a time by another name than ours; where tokens are counted, these are replayed."""
    rows = [{"arrival_ms": t, "prompt": f"row {at}"} for at, t in enumerate((0, 4250, 5500))]
    path = tmp_path / "t"
    if carrier == "csv":
        path.write_text(csv_of(list(rows[0]), [list(row.values()) for row in rows]))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = list(open_trace(path))
    assert [(r.arrival_s, r.text, r.input_tokens) for r in records] == [
        (t, f"row {at}", None) for at, (t, _, _) in enumerate(ROWS)
    ]
    chats = [{"time": 1_790_000_000 + at, "messages": [{"role": "user", "content": "hi"}]} for at in range(2)]
    (_, chat) = open_trace(write(tmp_path, "".join(json.dumps(row) + "\n" for row in chats)))
    assert (chat.arrival_s, chat.messages) == (1.0, ({"role": "user", "content": "hi"},))
    assert "prompt" not in recognised(["prompt", "prompt_tokens"])


def test_our_own_rows_keep_their_other_fields_beside_a_time_since_1970(tmp_path):
    rows = [{"arrival_s": t, "prompt": f"row {at}", "session_id": "s", "turn": at} for at, t in enumerate(epochs("ms"))]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    records = list(open_trace(path))
    assert [(r.arrival_s, r.text, r.session_id, r.turn) for r in records] == [
        (t, f"row {at}", "s", at) for at, (t, _, _) in enumerate(ROWS)
    ]
    mixed = [rows[0], {"arrival_s": 5.5, "prompt": "x"}, {"arrival_s": 1e15, "prompt": "x"}]
    assert "arrival_s is '5.5': not in ms since 1970" in problem(
        write(tmp_path, "".join(json.dumps(row) + "\n" for row in mixed))
    )
    for wrong in (1e11, 5e12, 1e300, -1):
        assert "arrival_s" in problem(write(tmp_path, json.dumps({"arrival_s": wrong, "prompt": "x"})))


def test_a_first_time_that_is_none_does_not_decide_for_the_others(tmp_path):
    """A row of a counter that had not begun: it is refused, the others are what they are."""
    rows = [(0, 5, 7), *((t, i, o) for t, (_, i, o) in zip(epochs("ms"), ROWS, strict=True)), ("", 5, 7)]
    kept, trace = read(write(tmp_path, csv_of(NAMES, rows)), skip_bad=True)
    assert (kept, sum(trace.rows_dropped.values())) == (ROWS, 2)


@pytest.mark.parametrize(
    ("name", "values"), [("epoch", [0, 500]), ("arrival", ["0", "1500"]), ("ts", [20260921, 20260922])]
)
def test_small_whole_numbers_have_no_unit_by_any_of_these_names(name, values):
    clock = Clock(name)
    clock.look(values)
    assert "Say --time-unit" in (clock.unclear or "")


def test_a_name_with_a_unit_is_believed_where_it_can_be(tmp_path):
    clock = Clock("arrival_ns")
    clock.look([1_790_000_000, 3_580_000_000])
    assert (clock.said, clock.ns(3_580_000_000)) == ("arrival_ns in ns, by its name", 3_580_000_000)


def test_a_clock_refuses_what_is_no_time():
    clock = Clock("t", "s")
    clock.look([1])
    for value in ("x", None, True, -1, 1e300, float("nan"), "1e5", [1]):
        with pytest.raises(RowError):
            clock.ns(value)


# --- fields of Mooncake ----------------------------------------------------------------------------------------------


def mooncake(tmp_path: Path, *rows: dict[str, object]) -> tuple[list[TraceRecord], Trace]:
    trace = open_trace(write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)))
    assert trace.format == "mooncake"
    return list(trace), trace


def test_blocks_of_512_tokens_show_milliseconds(tmp_path):
    rows = [{"timestamp": t, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]} for t in (0.0, 27.4)]
    kept, trace = mooncake(tmp_path, *rows)
    assert [r.arrival_s for r in kept] == [0.0, 0.0274]
    assert "in milliseconds: beside the 512-token blocks" in (trace.clock or "")
    (first, second), _ = mooncake(tmp_path, rows[0], {"timestamp": 500, "input_length": 9, "priority": 1})
    assert (second.arrival_s, second.output_tokens, second.prefix_ids) == (0.5, None, None)
    assert first.prefix_ids == (1, 2)


def test_sessions_with_delays_and_texts(tmp_path):
    (a, b, c), trace = mooncake(
        tmp_path,
        {"timestamp": 1000.5, "session_id": "s", "text_input": "Hello there.", "output_length": 9},
        {"delay": 250, "session_id": "s", "input_length": 70, "output_length": 9},
        {"timestamp": 1600.5, "session_id": 7, "input_length": 5},
    )
    assert (a.text, a.input_tokens, a.session_id) == ("Hello there.", None, "s")
    assert (b.session_id, b.think_s, c.session_id) == ("s", 0.25, "7")
    assert any("1 turns have a delay" in note for note in trace.notes)


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.timestamp("ns", "UTC"), pa.timestamp("us"), pa.timestamp("ms", "+05:30")])
def test_parquet_times_are_exact(tmp_path, kind):
    ns = [int(BASE.timestamp()) * 10**9 + round(t * 1e9) for t, _, _ in ROWS]
    times = pa.array(ns, pa.timestamp("ns", "UTC")).cast(kind if kind.tz else pa.timestamp(kind.unit, "UTC")).cast(kind)
    table = pa.table(
        {"time": times, "input_tokens": [i for _, i, _ in ROWS], "completion_tokens": [o for _, _, o in ROWS]}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet")[0] == ROWS


@pytest.mark.parametrize("same", [True, False])
def test_long_texts_of_a_parquet_are_not_held(tmp_path, same):
    """Columns that are not replayed are not read, and those that are in pieces."""
    rng = random.Random(1)
    texts = ["x" * 2**22 if same else rng.randbytes(2**21).hex() for _ in range(12)]
    counts = {"input_tokens": [2**20] * 12, "output_tokens": [5] * 12}
    for name, more in (("ours", {"prompt": texts}), ("table", {"body": texts, "ts": [0.5 * i for i in range(12)]})):
        pq.write_table(
            pa.table({**more, **counts}), tmp_path / f"{name}.parquet", compression="none", use_dictionary=same
        )
    before = pa.total_allocated_bytes()
    pool, most = pa.default_memory_pool(), 0
    for name in ("ours.parquet", "table.parquet"):
        for record in open_trace(tmp_path / name):
            assert record.input_tokens == 2**20
            most = max(most, pool.bytes_allocated() - before)
    assert most < 2**27
    huge = pa.table({"prompt": ["x" * 2**25, "y" * 2**25]})
    pq.write_table(huge, tmp_path / "huge.parquet")
    assert "32 MiB each on average: not a trace" in problem(tmp_path / "huge.parquet")


def test_a_text_beyond_the_limit_is_a_bad_row(tmp_path, monkeypatch):
    from harness.trace.formats import columnar

    monkeypatch.setattr(columnar, "MAX_LINE_BYTES", 1000)
    pq.write_table(pa.table({"prompt": ["a", "x" * 1001, "b"]}), tmp_path / "t.parquet")
    assert "longer than" in problem(tmp_path / "t.parquet")
    assert [r.text for r in open_trace(tmp_path / "t.parquet", skip_bad=True)] == ["a", "b"]
