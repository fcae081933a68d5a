"""Damaged files: a precise message or balanced books, in bounded memory and time, never anything else."""

from __future__ import annotations

import gzip
import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import TraceError
from harness.trace import source as source_module
from harness.trace.formats.detect import FORMATS
from harness.trace.io import open_trace
from harness.trace.shape import measure

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"
NAMES = [
    "azure-code-2023.csv", "bailian-constructed.jsonl", "burstgpt-v1.csv", "burstgpt-v3.csv",
    "envoy-constructed.log", "example.jsonl", "langfuse-constructed.json", "litellm-spend-constructed.csv",
    "litellm-spend-constructed.json", "mooncake-conversation.jsonl", "nginx-constructed.log",
    "openai-batch-constructed.jsonl", "otel-genai-constructed.jsonl", "ragpulse/0_trace.jsonl",
    "sharegpt-constructed.json", "vllm-requests.log",
]  # fmt: skip


def beginning(name: str) -> bytes:
    raw = (SAMPLES / name).read_bytes()
    return raw[: raw.rfind(b"\n", 0, 6000) + 1] if name.endswith(("l", "csv", "log")) else raw


def columnar() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"arrival_s": [0.0, 1.0, 2.5], "input_tokens": [5, 6, 7], "session_id": ["a", None, "b"]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return sink.getvalue().to_pybytes()


WHOLE = {name: beginning(name) for name in NAMES} | {"columnar": columnar()}

Damage = Callable[[bytes, random.Random], bytes]


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(changed)


def insert(what: bytes) -> Damage:
    def apply(raw: bytes, rng: random.Random) -> bytes:
        at = rng.randrange(len(raw))
        return raw[:at] + what + raw[at:]

    return apply


def number(what: bytes) -> Damage:
    """Replace a run of digits."""

    def apply(raw: bytes, rng: random.Random) -> bytes:
        digits = [i for i, b in enumerate(raw) if 48 <= b < 58]
        if not digits:
            return raw
        start = end = rng.choice(digits)
        while end < len(raw) and 48 <= raw[end] < 58:
            end += 1
        return raw[:start] + what + raw[end:]

    return apply


def shuffle_lines(raw: bytes, rng: random.Random) -> bytes:
    lines = raw.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def double_lines(raw: bytes, rng: random.Random) -> bytes:
    return b"".join(line * rng.randint(0, 2) for line in raw.splitlines(keepends=True))


def clock_jump(raw: bytes, rng: random.Random) -> bytes:
    """The second half of the recording first."""
    lines = raw.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return b"".join(lines[at:] + lines[:at])


def splice(raw: bytes, rng: random.Random) -> bytes:
    other = WHOLE[rng.choice(list(WHOLE))]
    return raw[: rng.randrange(len(raw))] + other[rng.randrange(len(other)) :]


DAMAGES: dict[str, Damage] = {
    "cut": cut, "flip": flip, "shuffled": shuffle_lines, "doubled": double_lines, "spliced": splice,
    "clock jump": clock_jump, "error page": lambda raw, rng: b"<!DOCTYPE html>\n<html><body>502</body></html>\n",
    "error page, gzip": lambda raw, rng: gzip.compress(b"<html>" + bytes(rng.randrange(256) for _ in range(99))),
    "nul": insert(b"\0\0\0"), "latin-1": insert("é".encode("latin-1")), "quote": insert(b'"'), "bracket": insert(b"]"),
    "brace": insert(b"}"), "newline": insert(b"\n"), "return": insert(b"\r"), "backslash": insert(b"\\"),
    "html": insert(b"<!DOCTYPE html><html>502 Bad Gateway</html>"), "surrogate": insert(b"\\ud800"),
    "deep": insert(b"[" * 5000), "wide": insert(b"x" * 5000), "commas": insert(b"," * 3000),
    "negative": number(b"-1"), "huge": number(b"9" * 40), "endless": number(b"9" * 5000), "exponent": number(b"1e999"),
    "not a number": number(b"NaN"), "zero": number(b"0"), "empty": number(b""), "arabic": number("٣".encode()),
    "semicolons": lambda raw, rng: raw.replace(b",", b";"), "tabs": lambda raw, rng: raw.replace(b",", b"\t"),
    "utf-16": lambda raw, rng: raw.decode("utf-8", "replace").encode("utf-16"),
    "bom": lambda raw, rng: b"\xef\xbb\xbf" + raw, "old mac": lambda raw, rng: raw.replace(b"\n", b"\r"),
    "gzip cut": lambda raw, rng: cut(gzip.compress(raw, 1), rng),
    "gzip flip": lambda raw, rng: flip(gzip.compress(raw), rng),
    "zstd cut": lambda raw, rng: cut(pa.Codec("zstd").compress(raw, asbytes=True), rng),
    "zstd flip": lambda raw, rng: flip(pa.Codec("zstd").compress(raw, asbytes=True), rng),
}  # fmt: skip


def survives(path: Path, **options: object) -> None:
    """Balanced books or a `TraceError` that names the file; and what was kept has a shape."""
    try:
        trace = open_trace(path, arrivals_only=True, **options)  # type: ignore[arg-type]
        shape = measure(trace)
    except TraceError as e:
        assert e.file == str(path)
        assert e.line is None or e.line >= 1
        assert len(str(e)) < 6000
        return
    assert trace.rows_read == trace.rows_kept + sum(trace.rows_dropped.values())
    assert shape.rows == trace.rows_kept > 0
    assert len(trace.rows_dropped) < 40


@pytest.mark.parametrize(
    ("format_", "line"),
    [
        ("mooncake", {"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1], "%": 1}),
        (
            "ragpulse",
            {"timestamp": "1", "input_length": 1, "output_length": 1, "hash_ids": {"%": []}, "session_id": "a"},
        ),
        ("langfuse", {"type": "GENERATION", "startTime": "2026-01-01 00:00:00", "usageDetails": {"%": 1}}),
        ("openai", {"custom_id": "1", "url": "%", "body": {}}),
        ("jsonl", {"arrival_s": 1, "%": 1}),
    ],
)
def test_what_a_file_names_is_said_short_and_harmlessly(tmp_path, format_, line):
    path = tmp_path / "t"
    for evil in ("[" * 100_000, "\x1b]0;you\x07"):
        path.write_text(json.dumps(line).replace("%", json.dumps(evil)[1:-1]))
        with pytest.raises(TraceError) as caught:
            list(open_trace(path, format=format_))
        assert len(str(caught.value)) < 1500
        assert str(caught.value).isprintable()


def test_a_row_of_another_century_is_refused_and_the_others_stay(tmp_path):
    path = tmp_path / "t"
    rows = [f"{year}-11-16 18:17:0{i}.5,34,12" for i, year in enumerate((2023, 2023, 2523))]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    with pytest.raises(TraceError, match=r":4: arrives 500 years after the first row") as caught:
        measure(open_trace(path))
    assert caught.value.line == 4
    assert measure(open_trace(path, skip_bad=True)).span_s == 1.0


@pytest.mark.parametrize("name", WHOLE)
def test_damage_is_reported_or_survived(tmp_path, name):
    path = tmp_path / "t"
    # Damage that leaves nothing to chance is read once.
    for raw in {
        damage(WHOLE[name], random.Random(f"{what} {k}")) for what, damage in DAMAGES.items() for k in range(4)
    }:
        path.write_bytes(raw)
        for skip_bad in (False, True):
            survives(path, skip_bad=skip_bad)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(
    name=st.sampled_from(sorted(WHOLE)),
    damages=st.lists(st.sampled_from(sorted(DAMAGES)), min_size=1, max_size=4),
    format_=st.sampled_from([None, *FORMATS]),
    skip_bad=st.booleans(),
    sort=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_damage_read_as_any_format(tmp_path, name, damages, format_, skip_bad, sort, seed):
    raw = WHOLE[name]
    rng = random.Random(seed)
    for damage in damages:
        raw = DAMAGES[damage](raw, rng) if raw else raw
    path = tmp_path / "t"
    path.write_bytes(raw)
    survives(path, format=format_, skip_bad=skip_bad, sort=sort)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(raw=st.binary(max_size=300), format_=st.sampled_from([None, *FORMATS]))
def test_any_bytes(tmp_path, raw, format_):
    path = tmp_path / "t"
    path.write_bytes(raw)
    survives(path, format=format_, skip_bad=True)


@pytest.mark.parametrize(
    ("start", "end", "words"),
    [
        (b'{"prompt": "a"}\n', b"\n", "longer than 16 MiB"),
        (b'{"prompt": "a"}\n{"prompt": "', b'"}\n', "longer than 16 MiB"),
        (b'[{"prompt": "a"}, {"prompt": "', b'"}]\n', "longer than 64 MiB"),
        (b"", b"\n", "not recognised"),
        (b'startTime,prompt_tokens,completion_tokens\n2026-01-01 00:00:00,1,"', b'"\n', "not closed within 16 MiB"),
    ],
)
def test_a_line_of_100_megabytes_takes_bounded_memory_and_time(tmp_path, start, end, words):
    path = tmp_path / "t"
    with path.open("wb") as file:
        file.write(start)
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(end)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(TraceError, match=words):
            list(open_trace(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300 * 2**20
    assert time.process_time() - began < 30


def test_a_gzip_bomb_takes_bounded_memory(tmp_path):
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' + bytes(200 * 2**20), 9))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match=r":2:.*longer than 16 MiB"):
            list(open_trace(path))
        assert tracemalloc.get_traced_memory()[1] < 300 * 2**20
    finally:
        tracemalloc.stop()


def test_the_line_of_the_damage_is_named(tmp_path):
    for name, line in (
        ("burstgpt-v1.csv", 50),
        ("mooncake-conversation.jsonl", 7),
        ("litellm-spend-constructed.csv", 9),
    ):
        lines = (SAMPLES / name).read_bytes().splitlines(keepends=True)
        lines[line - 1] = b"<html>\n"
        path = tmp_path / "t"
        path.write_bytes(b"".join(lines))
        with pytest.raises(TraceError) as caught:
            list(open_trace(path))
        assert caught.value.line == line


def test_json_values_are_found_whatever_the_chunks(tmp_path, monkeypatch):
    import json

    rng = random.Random(5)
    values = [{"a": rng.choice(["x\\", 'q"', "{[", "ü\n", "]"]), "b": [{"c": []}], "n": i} for i in range(30)]
    path = tmp_path / "t"
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(source_module, "_CHUNK", size)
        for text in (
            json.dumps(values),
            json.dumps(values, indent=1),
            "\n".join(json.dumps(v, indent=2) for v in values),
        ):
            path.write_text(text)
            found = list(source_module.records(source_module.open_source(path)))
            assert [json.loads(value) for _, value in found] == values
            assert [n for n, _ in found] == sorted(n for n, _ in found)
