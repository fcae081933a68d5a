"""A trace of several files: folders, patterns, archives, rotated logs, prefixes on S3, merged by arrival."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli.trace import trace as verbs
from harness.errors import TraceError, UsageError
from harness.trace.io import TraceRecord, open_trace
from harness.trace.sources import open_sources

HEADER = "timestamp,prompt_tokens,completion_tokens\n"
Row = tuple[int, int]
ROWS: list[Row] = [(t, 10 + t) for t in range(12)]
"""(seconds, input tokens) of each row."""


def csv_of(rows: list[Row], header: str = HEADER) -> str:
    return header + "".join(f"2026-09-21 14:13:{s:02}.5,{tokens},7\n" for s, tokens in rows)


def jsonl_of(rows: list[Row]) -> str:
    return "".join(
        json.dumps({"timestamp": 1_790_000_000 + s, "prompt_tokens": tokens, "completion_tokens": 7}) + "\n"
        for s, tokens in rows
    )


def read(*names: object, **options: object) -> list[Row]:
    trace = open_trace([str(name) for name in names], **options)  # type: ignore[arg-type]
    found = [(round(r.arrival_s or 0.0), r.input_tokens or 0) for r in trace]
    assert trace.rows_read == trace.rows_kept + sum(trace.rows_dropped.values())
    return found


def problem(*names: object) -> str:
    with pytest.raises(TraceError) as caught:
        read(*names)
    return str(caught.value)


def put(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# --- packing ---------------------------------------------------------------------------------------------------------


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress,
    "zstd": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True), "zip": lambda raw: zipped({"t.csv": raw}),
    "gzip in zip": lambda raw: zipped({"t.csv.gz": gzip.compress(raw)}),
    "two gzips": lambda raw: gzip.compress(raw[:60]) + gzip.compress(raw[60:]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
def test_packed_is_the_same(tmp_path, kind):
    assert read(put(tmp_path / "t", PACKED[kind](csv_of(ROWS).encode()))) == ROWS


@pytest.mark.parametrize("kind", PACKED)
def test_damaged_archives_are_said_to_be(tmp_path, kind):
    raw = PACKED[kind](csv_of(ROWS * 50).encode())
    for damaged in (raw[: len(raw) // 2], raw[: len(raw) // 2] + b"\xff" * 20 + raw[len(raw) // 2 + 20 :], raw[:5]):
        path = put(tmp_path / "t", damaged)
        try:
            read(path, skip_bad=True)
        except TraceError as e:
            assert e.file == str(path)


def test_a_zip_of_several_files_and_one_with_a_password(tmp_path):
    members = {"a/1.csv": csv_of(ROWS[6:]), "a/2.csv": csv_of(ROWS[:6]), "__MACOSX/x": "?", "a/readme.txt": "hello"}
    path = put(tmp_path / "t.zip", zipped({name: text.encode() for name, text in members.items()}))
    trace = open_trace(path)
    assert [r.input_tokens for r in trace] == [tokens for _, tokens in ROWS]
    assert any("1 files are empty or in no known format" in note and "readme.txt" in note for note in trace.notes)
    raw = bytearray(zipped({"t.csv": csv_of(ROWS).encode()}))
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + at] |= 1
    assert "damaged zip data" in problem(put(tmp_path / "secret.zip", bytes(raw)))


# --- several ---------------------------------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(parts=st.lists(st.integers(0, 3), min_size=12, max_size=12), seed=st.integers(0, 1000), lines=st.booleans())
def test_files_in_any_order_are_one_trace(tmp_path_factory, parts, seed, lines):
    folder = tmp_path_factory.mktemp("parts")
    rng = random.Random(seed)
    for part in set(parts):
        some = [row for row, at in zip(ROWS, parts, strict=True) if at == part]
        rng.shuffle(some)
        put(folder / f"{rng.random()}", jsonl_of(some) if lines else csv_of(some))
    assert read(folder) == ROWS
    names = list(folder.iterdir())
    rng.shuffle(names)
    assert read(*names) == ROWS


def test_folders_patterns_and_names(tmp_path):
    put(tmp_path / "day1" / "b.csv.gz", gzip.compress(csv_of(ROWS[:4]).encode()))
    put(tmp_path / "day1" / "a.csv.xz", lzma.compress(csv_of(ROWS[4:8]).encode()))
    put(tmp_path / "day2" / "c.csv", csv_of(ROWS[8:]))
    put(tmp_path / "day2" / "_SUCCESS", "")
    put(tmp_path / "day2" / ".hidden", "?")
    put(tmp_path / "day2" / "README", "what this is")
    assert read(tmp_path) == ROWS
    assert read(tmp_path / "*" / "*.csv*") == ROWS
    assert read(f"{tmp_path}/**/*.csv*") == ROWS
    assert read(tmp_path / "day1", tmp_path / "day2" / "c.csv") == ROWS
    assert "no file matches" in problem(tmp_path / "*.parquet")
    assert "format not recognised" in problem(tmp_path / "day2" / "c.csv", tmp_path / "day2" / "README")
    trace = open_trace(tmp_path)
    list(trace)
    assert any("README" in note for note in trace.notes)
    assert "3 files, their rows merged by arrival" in trace.notes


def test_one_file_of_a_folder_is_as_that_file(tmp_path):
    path = put(tmp_path / "only.csv", csv_of(ROWS))
    assert open_trace(tmp_path).sha256 == open_trace(path).sha256
    put(tmp_path / "more.csv", csv_of(ROWS[:1]))
    both = open_sources([tmp_path]).sha256
    assert both == open_sources([tmp_path]).sha256 != open_trace(path).sha256


def test_a_table_that_was_cut_has_one_header(tmp_path):
    put(tmp_path / "t.csv.1", csv_of(ROWS[:6]))
    put(tmp_path / "t.csv.2", csv_of(ROWS[6:], header=""))
    assert read(tmp_path) == ROWS
    assert read(tmp_path / "t.csv.1", tmp_path / "t.csv.2") == ROWS


def test_rotated_files_put_together_in_the_wrong_order_are_sorted(tmp_path):
    path = put(tmp_path / "t.csv", csv_of(ROWS[6:]) + csv_of(ROWS[:6]))
    trace = open_trace(path)
    assert [r.input_tokens for r in trace] == [tokens for _, tokens in ROWS]
    assert trace.rows_dropped == {}
    assert any(note.startswith("rows sorted by arrival") for note in trace.notes)
    assert not any("sorted" in note for note in notes_of(put(tmp_path / "in-order.csv", csv_of(ROWS))))


def notes_of(path: Path) -> list[str]:
    trace = open_trace(path)
    list(trace)
    return trace.notes


def test_spans_of_one_trace_in_two_files_and_copies_over_files(tmp_path):
    def spans(*ids: str) -> str:
        made = [
            {"trace_id": "t", "span_id": id_, "parent_span_id": "a" if id_ == "b" else None, "status": {},
             "start_time": "2026-09-21T14:13:20Z", "end_time": "2026-09-21T14:13:21Z",
             "attributes": {"gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 7}}
            for id_ in ids
        ]  # fmt: skip
        return json.dumps({"trace_id": "t", "spans": made})

    files = [
        put(tmp_path / "1.json", spans("a")),
        put(tmp_path / "2.json", spans("b", "c")),
        put(tmp_path / "3.json", spans("c")),
    ]
    trace = open_trace(files)
    assert len(list(trace)) == 2
    assert sum(trace.rows_dropped.values()) == 2


def test_clocks_without_a_date_are_laid_over_each_other_aloud(tmp_path):
    rows = "".join(json.dumps({"arrival_s": t, "input_tokens": 5}) + "\n" for t in (0, 10))
    files = [put(tmp_path / f"{i}.jsonl", rows) for i in range(2)]
    trace = open_trace(files)
    assert [r.arrival_s for r in trace] == [0.0, 0.0, 10.0, 10.0]
    assert any("laid over each other" in note for note in trace.notes)
    with pytest.raises(UsageError, match="--part is of one file"):
        open_trace(files, part=1)


def test_files_of_two_formats_are_refused(tmp_path):
    put(tmp_path / "a.csv", csv_of(ROWS))
    put(tmp_path / "b.jsonl", '{"prompt": "a"}\n')
    assert "holds files of several formats: table (1 files), jsonl (1 files)" in problem(tmp_path)
    assert "without a file" in problem(put(tmp_path / "empty" / ".x", "").parent)


def test_the_file_of_a_bad_row_is_named(tmp_path):
    put(tmp_path / "a.csv", csv_of(ROWS))
    bad = put(tmp_path / "b.csv", csv_of(ROWS) + "2026-09-21 14:14:00,x,7\n")
    assert problem(tmp_path).startswith(f"{bad}:14: prompt_tokens is 'x'")


def test_parquet_in_parts(tmp_path):
    for at in range(3):
        some = ROWS[4 * at : 4 * at + 4][::-1]
        table = pa.table({"ts": [1_790_000_000 + t for t, _ in some], "input_tokens": [i for _, i in some]})
        pq.write_table(table, tmp_path / f"part-{at}.parquet")
    assert read(tmp_path) == ROWS


def test_several_on_the_command_line(tmp_path):
    files = [put(tmp_path / f"{at}.csv", csv_of(ROWS[4 * at : 4 * at + 4])) for at in range(3)]
    done = CliRunner().invoke(verbs, ["inspect", *map(str, files), "--format", "json"])
    facts = json.loads(done.stdout)
    assert (facts["rows_kept"], facts["file"]) == (12, f"{files[0]} and 2 more")


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """A server that lists and gives the objects of a dict as S3 does."""
    objects: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
            key = path.removeprefix("/bucket").removeprefix("/")
            if "list-type" in query:
                found = "".join(
                    f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>x</ETag>"
                    "<LastModified>2026-09-21T14:13:20.000Z</LastModified></Contents>"
                    for name, data in sorted(objects.items()) if name.startswith(query.get("prefix", [""])[0])
                )  # fmt: skip
                self._answer(
                    200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
                )
            elif key in objects:
                self._answer(200, objects[key])
            else:
                self._answer(404, b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>")

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield objects
    server.shutdown()
    server.server_close()
    thread.join(120)


def test_everything_below_a_prefix(bucket):
    for at in range(3):
        bucket[f"logs/2026/{at:02}.jsonl.gz"] = gzip.compress(jsonl_of(ROWS[4 * at : 4 * at + 4][::-1]).encode())
    bucket["logs/2026/_SUCCESS"] = b""
    bucket["logs-of-others/x.jsonl"] = b"?"
    assert read("s3://bucket/logs/") == read("s3://bucket/logs") == read("s3://bucket/logs/*/0?.jsonl.gz") == ROWS
    assert read("s3://bucket/logs/2026/01.jsonl.gz") == [(t - 4, tokens) for t, tokens in ROWS[4:8]]
    assert "NoSuchKey" in problem("s3://bucket/none")
    assert "no object below" in problem("s3://bucket/none/")


def test_records_say_their_lines(tmp_path):
    put(tmp_path / "a.csv", csv_of(ROWS[:2]))
    put(tmp_path / "b.csv", csv_of(ROWS[2:4]))
    kept: list[TraceRecord] = list(open_trace(tmp_path))
    assert [r.line for r in kept] == [2, 3, 2, 3]
