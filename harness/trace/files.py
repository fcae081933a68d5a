"""Traces in and out: opened with the reading options of the command line, the same for every verb that reads one, and
written in our own format, JSON Lines (also ``.gz``) or Parquet, by the name of the file.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from harness.errors import TraceError, UsageError
from harness.options import ReadOptions
from harness.plan.spec import load_seed
from harness.trace.formats.jsonl import FIELDS
from harness.trace.formats.record import TableOptions
from harness.trace.io import Trace, TraceRecord, open_trace
from harness.trace.selection import parse_where

Files = Path | Sequence[Path]
"""What the command line calls a trace: a file, or several."""


def open_asked(trace: Files, asked: ReadOptions, *, arrivals_only: bool = False, survey: bool = False) -> Trace:
    """The trace, read as ``asked``.

    The two lengths are distributions (`harness.trace.synth`) for logs that have arrivals only, drawn from the
    seed. ``arrivals_only``: such logs are read without lengths too; ``survey``: whatever there is is to be described.

    Raises what `open_trace` does, and `UsageError` for one of the two lengths without the other.
    """
    lengths = None
    if asked.input_tokens or asked.output_tokens:
        from harness.trace.synth import draw_lengths, parse_lengths

        if not (asked.input_tokens and asked.output_tokens):
            raise UsageError("--input-tokens and --output-tokens go together")
        seed = load_seed(asked.seed or 0)
        lengths = draw_lengths(parse_lengths(asked.input_tokens), parse_lengths(asked.output_tokens), seed)
    return open_trace(
        trace, format=asked.trace_format, skip_bad=asked.skip_bad, sort=asked.sort, part=asked.part, lengths=lengths,
        arrivals_only=arrivals_only, survey=survey, table=TableOptions(asked.columns or {}, asked.time_unit),
        where=parse_where(asked.where),
    )  # fmt: skip


_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_BATCH = 4096
_ATTRIBUTES = {name: "text" if name == "prompt" else name for name in FIELDS}
"""Field in the file -> attribute of `TraceRecord`."""


def check_output(out: Path) -> None:
    """Raises `UsageError` for a name that says no format, `TraceError` for a file that exists: none is overwritten."""
    if not out.name.endswith(_SUFFIXES):
        raise UsageError(f"{out}: the name must end in {', '.join(_SUFFIXES)}")
    if out.exists():
        raise TraceError(str(out), None, "exists already and is not overwritten; choose another name")


def write_trace(records: Iterable[TraceRecord], out: Path) -> int:
    """Write ``records`` to ``out``, the first arrival at zero, and say how many there were.

    The file appears whole or not at all. Raises `UsageError` and `TraceError` as `check_output` does, and when it
    cannot be written or there is no record.
    """
    check_output(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("xb") as raw:
            write = _write_parquet if out.name.endswith(".parquet") else _write_lines
            count = write(_shifted(records), raw, out)
        if not count:
            raise TraceError(str(out), None, "not written: no request is left")
        # A link, unlike a rename, does not replace a file that appeared meanwhile.
        os.link(temporary, out)
    except FileExistsError:
        raise TraceError(str(out), None, "exists already and is not overwritten; choose another name") from None
    except OSError as e:
        raise TraceError(str(out), None, f"cannot write: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return count


def _shifted(records: Iterable[TraceRecord]) -> Iterator[dict[str, Any]]:
    """Fields as in the file, those not given left out."""
    first_ns: int | None = None
    for record in records:
        row = {name: value for name, a in _ATTRIBUTES.items() if (value := getattr(record, a)) is not None}
        if record.arrival_ns is not None:
            first_ns = record.arrival_ns if first_ns is None else first_ns
            row["arrival_s"] = (record.arrival_ns - first_ns) / 1e9
        yield row


_OBJECTS = ("check", "gate")
"""JSON in a record and in Parquet, objects in JSON Lines."""


def _write_lines(rows: Iterator[dict[str, Any]], raw: IO[bytes], out: Path) -> int:
    encode = msgspec.json.Encoder().encode
    count = 0
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = raw
        if out.name.endswith(".gz"):
            # Without name and time, so that equal traces are equal files.
            file = cast(IO[bytes], stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0)))
        for row in rows:
            row.update({name: msgspec.Raw(row[name].encode()) for name in _OBJECTS if name in row})
            if "tags" in row:
                row["tags"] = dict(row["tags"])
            file.write(encode(row) + b"\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[dict[str, Any]], raw: IO[bytes], out: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    types = {
        "messages": pa.list_(message), "prefix_ids": pa.list_(pa.int64()), "input_tokens": pa.int32(),
        "output_tokens": pa.int32(), "turn": pa.int32(), "block_tokens": pa.int32(), "cached_tokens": pa.int32(),
        "max_tokens": pa.int32(), "expected": pa.list_(pa.string()), "weight": pa.float64(),
    }  # fmt: skip
    default = {True: pa.float64(), False: pa.string()}
    schema = pa.schema([(name, types.get(name) or default[name.endswith("_s")]) for name in FIELDS])
    count = 0
    with pq.ParquetWriter(raw, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _BATCH)):
            for row in batch:
                if "tags" in row:
                    row["tags"] = msgspec.json.encode(dict(row["tags"])).decode()
            count += len(batch)
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return count
