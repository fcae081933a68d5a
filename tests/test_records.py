"""Traces are read exactly, or refused with file, line and reason; nothing is dropped in silence."""

from __future__ import annotations

import gzip
import json
import random
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import trace_record
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import TraceError, UsageError
from harness.trace import source as source_module
from harness.trace.formats.detect import FORMATS
from harness.trace.formats.published import Azure, Mooncake
from harness.trace.formats.record import Place
from harness.trace.io import FAILED_CALL, TraceRecord, open_trace

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"
AZURE = b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def write(tmp_path: Path, content: bytes | str, name: str = "t") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake(
    timestamp: object = 0, input_length: object = 600, output_length: object = 5, hash_ids: object = (1, 2)
) -> dict:
    return {"timestamp": timestamp, "input_length": input_length, "output_length": output_length, "hash_ids": hash_ids}


def problem(path: Path, **options: object) -> TraceError:
    with pytest.raises(TraceError) as caught:
        list(open_trace(path, **options))  # type: ignore[arg-type]
    assert caught.value.file == str(path)
    return caught.value


# --- the shipped samples: golden numbers ---------------------------------------------------------------------------


def test_azure_conv_golden():
    trace = open_trace(SAMPLES / "azure-conv-2023.csv")
    records = list(trace)
    assert (trace.format, trace.rows_read, trace.rows_kept, trace.rows_dropped, trace.notes) == (
        "azure",
        600,
        600,
        {},
        [],
    )
    assert records[0] == trace_record(2, 0.0, 374, 44)
    # By hand: 18:15:46.6805900 is the first row, 18:15:50.9951690 the second: 4.314579 s apart.
    assert records[1] == trace_record(3, 4.314579, 396, 109)
    assert records[-1].arrival_s == 148.18913
    assert sum(r.input_tokens for r in records) == 553_386
    assert sum(r.output_tokens for r in records) == 156_892


def test_azure_code_golden():
    records = list(open_trace(SAMPLES / "azure-code-2023.csv"))
    assert records[0] == trace_record(2, 0.0, 4808, 10)
    assert records[1] == trace_record(3, 0.052, 3180, 8)
    assert (len(records), records[-1].arrival_s) == (300, 216.8382390)
    assert (sum(r.input_tokens for r in records), sum(r.output_tokens for r in records)) == (627_529, 7_126)


def test_mooncake_golden():
    trace = open_trace(SAMPLES / "mooncake-conversation.jsonl")
    records = list(trace)
    assert (trace.format, trace.rows_read, trace.rows_kept) == ("mooncake", 200, 200)
    assert records[0] == trace_record(1, 0.0, 6758, 500, None, None, tuple(range(14)), 512)
    assert records[-1].arrival_s == 72.0
    assert sum(r.input_tokens for r in records) == 2_782_179
    assert sum(r.output_tokens for r in records) == 71_379
    assert all(len(r.prefix_ids) == -(-r.input_tokens // 512) for r in records)
    assert len(trace.notes) == 1
    assert "grid of 3 s: 200 rows on 25 instants" in trace.notes[0]


def test_example_has_every_kind_of_row():
    trace = open_trace(SAMPLES / "example.jsonl")
    records = list(trace)
    assert trace.format == "jsonl"
    assert len(records) == 20
    for kind in ("text", "messages", "prefix_ids", "session_id", "turn"):
        assert any(getattr(r, kind) is not None for r in records), kind
    assert any(r.output_tokens is None for r in records)
    assert records[17].text == "Résumé in one line: 東京 is the capital of"


def test_samples_are_small_and_azure_keeps_its_line_ends():
    assert sum(f.stat().st_size for f in SAMPLES.rglob("*") if f.is_file()) < 600_000
    assert (SAMPLES / "azure-conv-2023.csv").read_bytes().count(b"\r\n") == 601


# --- reading ---------------------------------------------------------------------------------------------------------


def test_iterates_again_and_reads_gzip_by_content_not_name(tmp_path):
    plain = SAMPLES / "azure-code-2023.csv"
    zipped = write(tmp_path, gzip.compress(plain.read_bytes()), "no-suffix")
    trace = open_trace(zipped)
    once = list(trace)
    assert once == list(trace) == list(open_trace(plain))
    assert trace.rows_read == 300


def test_counters_are_true_after_stopping_early():
    trace = open_trace(SAMPLES / "azure-conv-2023.csv")
    records = iter(trace)
    for _ in range(7):
        next(records)
    records.close()
    assert (trace.rows_read, trace.rows_kept) == (7, 7)


def test_tags_are_names_with_values_or_names_alone(tmp_path):
    said = [{"b": "2", "a": "1"}, ["urgent", "billing"], '{"a": "1"}', '["urgent"]', []]
    lines = (json.dumps({"prompt": "x", "tags": one}) for one in said)
    found = [record.tags for record in open_trace(write(tmp_path, "\n".join(lines).encode()))]
    assert found == [
        (("a", "1"), ("b", "2")), (("billing", ""), ("urgent", "")), (("a", "1"),), (("urgent", ""),), (),
    ]  # fmt: skip
    with pytest.raises(TraceError):
        list(open_trace(write(tmp_path, b'{"prompt": "x", "tags": [1]}')))


def test_jsonl_keeps_what_the_file_says(tmp_path):
    messages = [{"role": "user", "content": "hi\u0000\u2028"}]
    path = write(
        tmp_path,
        jsonl(
            {"arrival_s": 100.5, "prompt": "a", "input_tokens": 3, "output_tokens": None},
            {"arrival_s": 100.5, "messages": messages, "session_id": "s", "turn": 0},
            {"arrival_s": 103, "input_tokens": 33, "output_tokens": 1, "prefix_ids": [7, 8, -9], "block_tokens": 16},
        ),
    )
    assert list(open_trace(path)) == [
        trace_record(1, 0.0, 3, None, text="a"),
        trace_record(2, 0.0, None, None, "s", 0, messages=tuple(messages)),
        trace_record(3, 2.5, 33, 1, None, None, (7, 8, -9), 16),
    ]


def test_jsonl_without_times(tmp_path):
    assert [r.arrival_s for r in open_trace(write(tmp_path, jsonl({"prompt": "a"}, {"prompt": "b"})))] == [None, None]


def test_blank_lines_and_byte_order_mark_are_not_rows_but_count_as_lines(tmp_path):
    trace = open_trace(write(tmp_path, b"\xef\xbb\xbf" + b'{"prompt":"a"}\n\n  \r\n{"prompt":"b"}\r\n\n'))
    assert [r.line for r in trace] == [1, 4]
    assert (trace.rows_read, trace.rows_dropped) == (2, {})


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_azure_2024_style_other_column_order_and_extra_columns(tmp_path, ending, last):
    lines = ["GeneratedTokens,NumImages,TIMESTAMP,ContextTokens"]
    lines += ["9,1,2024-05-10 00:00:00.009930+00:00,2162", "5,0,2024-05-10 00:00:59.999999+00:00,10"]
    trace = open_trace(write(tmp_path, ending.join(lines) + last))
    assert list(trace) == [trace_record(2, 0.0, 2162, 9), trace_record(3, 59.990069, 10, 5)]
    assert trace.notes == ["columns not replayed: NumImages"]


@given(st.datetimes(), st.integers(0, 9_999_999), st.sampled_from(["", "Z", "+00:00"]))
def test_azure_timestamps_are_exact_to_100_ns(moment, ticks, zone):
    moment = moment.replace(microsecond=0)
    reader = Azure()
    line = f"{moment:%H:%M:%S}".join([f"{moment.date().isoformat()} ", f".{ticks:07}{zone},1,1\r\n"]).encode()
    ((_, row),) = reader.rows([(Place(0, 1), AZURE), (Place(0, 2), line)])
    assert isinstance(row, TraceRecord)
    days = moment.toordinal() - 719_163  # of 1970-01-01
    seconds = days * 86_400 + moment.hour * 3600 + moment.minute * 60 + moment.second
    assert row.arrival_ns == int((Decimal(seconds) + Decimal(ticks) / 10**7) * 10**9)


def test_failed_calls_are_counted_and_not_replayed(tmp_path):
    for content in (
        AZURE
        + b"2023-11-16 18:17:03.0000000,5,5\r\n2023-11-16 18:17:04.0000000,5,0\r\n2023-11-16 18:17:05.0000000,0,5",
        jsonl(mooncake(), mooncake(1, 0, 5, []), mooncake(2, 600, 0)),
        jsonl({"prompt": "a"}, {"input_tokens": 0}, {"prompt": "a", "output_tokens": 0}),
    ):
        trace = open_trace(write(tmp_path, content))
        assert len(list(trace)) == 1
        assert (trace.rows_read, trace.rows_kept, trace.rows_dropped) == (3, 1, {FAILED_CALL: 2})
        assert trace.notes[0] == f"2 of 3 rows not replayed: {FAILED_CALL}"


@pytest.mark.parametrize(
    ("step_ms", "jitter", "expected"), [(1000, 0, "1 s"), (3000, 1, "3 s"), (50, 0, None), (0, 0, None)]
)
def test_a_coarse_clock_is_noticed(tmp_path, step_ms, jitter, expected):
    rng = random.Random(1)
    times = [0.0]
    for _ in range(400):  # Poisson, then rounded to the grid
        times.append(times[-1] + rng.expovariate(2) * 1000)
    if step_ms:  # the same jitter for all rows of one instant, as in the Mooncake files
        grid = {round(t / step_ms): rng.randint(-jitter, jitter) for t in times}
        times = [max(0, round(t / step_ms) * step_ms + grid[round(t / step_ms)]) for t in times]
    trace = open_trace(write(tmp_path, jsonl(*(mooncake(int(t)) for t in times))))
    list(trace)
    assert [n.split(" grid of ")[1].split(":")[0] for n in trace.notes] == ([expected] if expected else [])


# --- refusing --------------------------------------------------------------------------------------------------------

BAD_LINES = {
    # format, good line before, bad line, words of the message
    "azure-fields": ("azure", b"2023-11-16 18:17:03.1,1", "2 fields, expected 3"),
    "azure-negative": ("azure", b"2023-11-16 18:17:03.1,-1,1", "ContextTokens is '-1'"),
    "azure-float": ("azure", b"2023-11-16 18:17:03.1,1,1.5", "GeneratedTokens is '1.5'"),
    "azure-huge": ("azure", b"2023-11-16 18:17:03.1,99999999999999999999,1", "from 0 to 16777216"),
    "azure-nan": ("azure", b"2023-11-16 18:17:03.1,nan,1", "ContextTokens is empty"),
    "azure-nul": ("azure", b"2023-11-16 18:17:03.1,1\0,1", "ContextTokens is"),
    "azure-utf8": ("azure", b"2023-11-16 18:17:03.1,\xd9\xa1,1", "ContextTokens is"),
    "azure-epoch": ("azure", b"1700158623,1,1", "TIMESTAMP is '1700158623'"),
    "azure-date": ("azure", b"2023-02-30 18:17:03.1,1,1", "TIMESTAMP"),
    "azure-second": ("azure", b"2023-11-16 18:17:61.1,1,1", "TIMESTAMP"),
    "azure-zone": ("azure", b"2023-11-16 18:17:03.1+2,1,1", "with its offset"),
    "azure-empty-time": ("azure", b",1,1", "TIMESTAMP is empty"),
    "mooncake-block16": (
        "mooncake",
        json.dumps(mooncake(9, 160, 1, list(range(10)))).encode(),
        "They fit blocks of 16",
    ),
    "mooncake-block": ("mooncake", json.dumps(mooncake(9, 5000, 1, [1])).encode(), "expected 10"),
    "mooncake-date": ("mooncake", json.dumps(mooncake("2026-09-21 12:00:00")).encode(), "expected a number"),
    "mooncake-float-length": ("mooncake", json.dumps(mooncake(1, 600.5)).encode(), "input_length is '600.5'"),
    "mooncake-object-ids": ("mooncake", json.dumps(mooncake(1, 600, 5, {"a": []})).encode(), "hash_ids"),
    "mooncake-negative": ("mooncake", json.dumps(mooncake(-1)).encode(), "timestamp"),
    "mooncake-huge": ("mooncake", json.dumps(mooncake(1, 10**30)).encode(), "input_length"),
    "mooncake-extra": ("mooncake", json.dumps(mooncake() | {"chat_id": 1}).encode(), "unknown field 'chat_id'"),
    "mooncake-missing": ("mooncake", b'{"timestamp": 1}', "input_length is empty"),
    "jsonl-typo": ("jsonl", b'{"input_tokns": 5}', "did you mean input_tokens"),
    "jsonl-nothing": ("jsonl", b'{"output_tokens": 5}', "nothing to send"),
    "jsonl-both": ("jsonl", b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "exclude each other"),
    "jsonl-nan": ("jsonl", b'{"prompt": "a", "arrival_s": NaN}', "not a JSON object"),
    "jsonl-infinite": ("jsonl", b'{"prompt": "a", "arrival_s": 1e999}', "arrival_s"),
    "jsonl-ms": ("jsonl", b'{"prompt": "a", "arrival_s": 1700158623000}', "arrival_s"),
    "jsonl-negative": ("jsonl", b'{"prompt": "a", "arrival_s": -1}', "arrival_s"),
    "jsonl-bool": ("jsonl", b'{"input_tokens": true}', "got bool at input_tokens"),
    "jsonl-turn": ("jsonl", b'{"prompt": "a", "turn": 1}', "turn without session_id"),
    "jsonl-prefix": ("jsonl", b'{"input_tokens": 5, "prefix_ids": [1]}', "need block_tokens"),
    "jsonl-prefix-count": ("jsonl", b'{"input_tokens": 5, "prefix_ids": [1], "block_tokens": 4}', "expected 2"),
    "jsonl-prefix-text": ("jsonl", b'{"prompt": "a", "prefix_ids": [1], "block_tokens": 4}', "its own prefix"),
    "jsonl-block-alone": ("jsonl", b'{"input_tokens": 5, "block_tokens": 4}', "without prefix_ids"),
    "jsonl-block-zero": ("jsonl", b'{"input_tokens": 5, "prefix_ids": [1], "block_tokens": 0}', "block_tokens"),
    "jsonl-image": ("jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content"),
    "jsonl-no-messages": ("jsonl", b'{"messages": []}', "messages"),
    "jsonl-array": ("jsonl", b"[1, 2]", "got array"),
    "jsonl-cut": ("jsonl", b'{"prompt": "a', "not a JSON object"),
    "jsonl-nul": ("jsonl", b'{"prompt": "a\0"}', "NUL bytes"),
    "jsonl-utf8": ("jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
    "jsonl-surrogate": ("jsonl", b'{"prompt": "\\ud800"}', "not a JSON object"),
    "jsonl-deep": ("jsonl", b'{"zz": ' + b"[" * 200_000, "unknown field"),
    "jsonl-time-appears": ("jsonl", b'{"prompt": "a", "arrival_s": 1}', "all rows or none"),
}
GOOD = {
    "azure": AZURE + b"2023-11-16 18:17:03.0000000,5,5\r\n",
    "mooncake": json.dumps(mooncake()).encode() + b"\n",
    "jsonl": b'{"prompt": "a"}\n',
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_or_counted(tmp_path, case):
    format_, bad, words = BAD_LINES[case]
    lines = GOOD[format_].count(b"\n")
    path = write(tmp_path, GOOD[format_] + bad + b"\n" + (GOOD[format_].splitlines(keepends=True)[-1]))
    error = problem(path)
    assert error.line == lines + 1
    assert words in str(error)
    assert "--skip-bad" in str(error)
    trace = open_trace(path, skip_bad=True)
    assert [r.line for r in trace] == [lines, lines + 2]
    assert trace.rows_read == 3 == trace.rows_kept + sum(trace.rows_dropped.values())
    assert len(trace.rows_dropped) == 1


def test_time_that_runs_back_is_refused_with_its_line(tmp_path):
    path = write(tmp_path, jsonl(*(mooncake(t) for t in (0, 604_453_000, 0, 5, 604_453_001))))
    error = problem(path)
    assert error.line == 3
    assert "604453 s before the row above" in str(error)
    assert "--part N" in str(error)
    trace = open_trace(path, skip_bad=True)
    assert [r.line for r in trace] == [1, 2, 5]
    assert trace.rows_dropped == {"arrival before the row above": 2}


@pytest.mark.parametrize("zipped", [False, True])
def test_an_endless_line_is_refused_in_bounded_memory(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(source_module, "MAX_LINE_BYTES", 1000)
    content = b'{"prompt": "a"}\n' + b'{"prompt": "' + b"x" * 50_000 + b'"}\n{"prompt": "b"}\n'
    path = write(tmp_path, gzip.compress(content) if zipped else content)
    assert problem(path).line == 2
    trace = open_trace(path, skip_bad=True)
    assert [r.line for r in trace] == [1, 3]
    assert trace.rows_dropped == {"line too long": 1}


def test_a_line_of_exactly_the_limit_is_read(tmp_path, monkeypatch):
    line = b'{"prompt": "a"}\n'
    monkeypatch.setattr(source_module, "MAX_LINE_BYTES", len(line))
    assert len(list(open_trace(write(tmp_path, line * 2)))) == 2


SPEND = {"request_id": "r", "call_type": "acompletion", "startTime": "2026-01-05 10:00:00", "prompt_tokens": 9,
         "completion_tokens": 5, "total_tokens": 14, "model": "m", "spend": 0.1,
         "endTime": "2026-01-05 10:00:01"}  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "line", "words"),
    [
        (lambda text: text.replace('"request_id": "r3"', '}"request_id": "r3"'), 45, "a } where no value is open"),
        (lambda text: text + "}", 57, "a } where no value is open"),
        (lambda text: text + "]", 57, "a ] where no value is open"),
        (lambda text: text + ", 1", 57, "a , where no value is open"),
        (lambda text: text + ' {"a": 1}]', 57, "text after the end of the JSON array"),
        (lambda text: text + " x", 57, "text after the end of the JSON"),
        (lambda text: text[: text.rindex("{")], 46, "the JSON document ends early: the file was cut, copy it again"),
        (lambda text: text[1:], 12, "a , where no value is open"),
    ],
)
def test_a_json_document_with_a_bracket_too_many_or_too_few_is_refused_with_its_place(tmp_path, damage, line, words):
    rows = [{**SPEND, "request_id": f"r{at}"} for at in range(5)]
    text = json.dumps(rows, indent=1)
    assert len(list(open_trace(write(tmp_path, text)))) == 5
    assert len(text.splitlines()) == 57
    folder = tmp_path / "some"
    folder.mkdir()
    write(folder, text, "whole.json")
    path = write(folder, damage(text), "damaged.json")
    for of in (path, folder):  # what is found in a folder is not left out as of no known format
        with pytest.raises(TraceError) as caught:
            list(open_trace(of, skip_bad=True))
        assert words in str(caught.value)
        assert (caught.value.file, caught.value.line) == (str(path), line)
    with pytest.raises(TraceError, match=r"damaged\.json:"):
        list(open_trace(path))


def calls_per_row(path: Path, rows: int) -> float:
    """Calls of functions, ours and the interpreter's, for each of so many rows beyond the first few."""
    read, count = iter(open_trace(path)), 0

    def seen(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    next(read)
    sys.setprofile(seen)
    try:
        assert sum(1 for _ in zip(range(rows), read, strict=False)) == rows
    finally:
        sys.setprofile(None)
    return count / rows


@pytest.mark.parametrize(
    ("row", "most"),
    [
        (lambda at: mooncake(10 * at, 1200, 20, (1, 2, at)), 90),
        (lambda at: {"arrival_s": at / 8, "input_tokens": 9, "output_tokens": 5, "session_id": "a", "turn": at}, 42),
    ],
    ids=["mooncake", "ours"],
)
def test_a_row_costs_few_calls(tmp_path, monkeypatch, row, most):
    """Traces have tens of millions of rows, and a call is a tenth of a microsecond: what a row takes is counted."""
    monkeypatch.setattr(Mooncake, "looked_at", 10)
    assert calls_per_row(write(tmp_path, jsonl(*map(row, range(2000)))), 1500) < most


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(jsonl(*({"prompt": str(random.random())} for _ in range(5000))).encode())
    assert "ends early" in str(problem(write(tmp_path, whole[:-1000])))
    assert "ends early" in str(problem(write(tmp_path, whole[:-1000]), skip_bad=True))
    middle = len(whole) // 2
    assert "gzip" in str(problem(write(tmp_path, whole[:middle] + b"\xff" * 100 + whole[middle + 100 :])))
    assert "gzip" in str(problem(write(tmp_path, b"\x1f\x8bnonsense")))
    assert "gzip" in str(problem(write(tmp_path, whole + b"garbage after it")))


def test_files_that_are_not_there_or_not_files(tmp_path):
    import os

    assert "No such file" in str(problem(tmp_path / "none"))
    assert "directory" in str(problem(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in str(problem(tmp_path / "fifo"))
    assert "name it '-'" in str(problem(tmp_path / "fifo"))
    if os.geteuid() != 0:
        path = write(tmp_path, "x")
        path.chmod(0)
        assert "Permission denied" in str(problem(path))


def test_no_usable_rows_is_an_error_with_the_books(tmp_path):
    assert "is empty" in str(problem(write(tmp_path, "")))
    assert "is empty" in str(problem(write(tmp_path, "\n \n")))
    assert "is empty" in str(problem(write(tmp_path, gzip.compress(b""))))
    assert "0 rows read" in str(problem(write(tmp_path, AZURE)))
    all_failed = problem(write(tmp_path, jsonl(mooncake(0, 600, 0), mooncake(1, 600, 0))))
    assert f"2 rows read, dropped: 2 {FAILED_CALL}" in str(all_failed)
    assert "2 block mismatch" in str(problem(write(tmp_path, jsonl(*[mooncake(0, 5000)] * 2)), skip_bad=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"zz": ' + b"[" * 200_000, "zz"),
        (b'{"request_id": "bench-0", "input_toks": 2361}\n', "input_toks"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n".encode("utf-16"), "UTF-16"),
        (b"[1, 2]\n", "[1, 2]"),
        (b'{\n"promt": "a"\n}\n', "promt"),
        (b"0,19.05,5.3,Weibull,0.4,0.028\n", "harness trace synth --servegen"),
        (b"<html>", "HTML"),
        (bytes(range(256)) * 10, "not recognised"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_an_unknown_format_says_what_was_seen_and_what_there_is(tmp_path, content, words):
    message = str(problem(write(tmp_path, content)))
    assert "not recognised" in message
    assert words in message
    assert all(name in message for name in FORMATS)
    assert "--trace-format NAME" in message


def test_a_file_of_two_formats_must_be_told(tmp_path):
    path = write(tmp_path, json.dumps(mooncake() | {"custom_id": "a", "body": {}}) + "\n")
    assert "could be mooncake or openai" in str(problem(path))
    assert [r.input_tokens for r in open_trace(path, format="mooncake")] == [600]


def test_a_forced_format_that_does_not_fit_is_refused(tmp_path):
    path = write(tmp_path, "a,b\n1,2\n")
    assert problem(path, format="azure").line == 1
    assert problem(path, format="jsonl").line == 1
    with pytest.raises(UsageError, match="did you mean mooncake"):
        open_trace(path, format="moncake")


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([*GOOD.values(), *(c[1] for c in BAD_LINES.values())])))
)
def test_whatever_the_bytes_the_books_balance_or_it_is_a_trace_error(tmp_path_factory, chunks):
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(b"\n".join(chunks))
    for format_ in (None, *FORMATS):
        try:
            trace = open_trace(path, format=format_, skip_bad=True)
            kept = len(list(trace))
        except TraceError:
            continue
        assert trace.rows_kept == kept
        assert trace.rows_read == kept + sum(trace.rows_dropped.values())


def test_a_steady_clock_is_no_coarse_clock(tmp_path):
    trace = open_trace(write(tmp_path, jsonl(*(mooncake(i * 500) for i in range(100)))))
    list(trace)
    assert trace.notes == []
