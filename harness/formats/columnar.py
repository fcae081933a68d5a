"""Parquet and Arrow files (IPC file or stream) with the columns of our own format, `harness.formats.jsonl`.

Read a batch at a time. Missing columns and nulls mean not given; any integer or float width will do; ``prefix_ids`` is
a list of integers, ``messages`` a list of structs with ``role`` and ``content``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import msgspec

from harness.errors import TraceError
from harness.formats.jsonl import FIELDS, BlockSizes, Line, row_of
from harness.formats.row import Reader, Row, safe
from harness.formats.values import decode_error
from harness.source import Source, magic

_ROWS = 4096
_MESSAGE = {"role", "content"}


class Columnar(Reader):
    """Reader of columnar files; the first bytes tell which kind."""

    summary = "Parquet or Arrow file with the columns of our JSON Lines"
    clock = "arrival_s in seconds, by its name"
    sends_text = True

    def __init__(self) -> None:
        self._sizes = BlockSizes()

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The magic bytes of Parquet, an Arrow file or an Arrow stream."""
        return record.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"))

    def records(self, file: Source) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row from 1, column -> value without nulls)."""
        import pyarrow as pa

        number = 0
        try:
            for batch in _batches(file):
                batch.validate(full=True)  # Arrow trusts offsets: a damaged file would read outside its memory
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
            raise TraceError(file.name, number + 1, f"damaged columnar file ({e}): copy it again") from e

    def parse(self, record: dict[str, Any]) -> Row:
        """Check one row as a line of JSON would be."""
        try:
            row = row_of(msgspec.convert(record, Line))
            self._sizes.see(row)
            return row
        except msgspec.ValidationError as e:
            raise decode_error(e, b"", FIELDS) from None

    def blocks(self) -> str | None:
        """As ``block_tokens`` says."""
        return self._sizes.said()


def _batches(file: Source) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = magic(file)
    if kind.startswith(b"PAR1"):
        with pq.ParquetFile(str(file.path)) as parquet:
            _check(file, parquet.schema_arrow)
            yield from parquet.iter_batches(batch_size=_ROWS)
        return
    with pa.OSFile(str(file.path), "rb") as raw:
        if kind.startswith(b"ARROW1"):
            with pa.ipc.open_file(raw) as reader:
                _check(file, reader.schema)
                yield from (part for i in range(reader.num_record_batches) for part in _cut(reader.get_batch(i)))
        else:
            with pa.ipc.open_stream(raw) as reader:
                _check(file, reader.schema)
                yield from (part for batch in reader for part in _cut(batch))


def _cut(batch: Any) -> Iterator[Any]:
    yield from (batch.slice(at, _ROWS) for at in range(0, batch.num_rows, _ROWS))


def _check(file: Source, schema: Any) -> None:
    if b"harness.plan" in (schema.metadata or {}):
        raise TraceError(file.name, None, "is a plan, already made from a trace: use it with 'harness run'")
    unknown = [name for name in schema.names if name not in FIELDS]
    if unknown or not schema.names:
        near = {name: difflib.get_close_matches(name, FIELDS, 1, 0.4) for name in unknown}
        hints = ", ".join(f"{name!r}" + (f" (did you mean {best[0]}?)" if best else "") for name, best in near.items())
        raise TraceError(
            file.name, None, f"columns that a trace does not have: {safe(hints, 500)}; valid: {', '.join(FIELDS)}"
        )
