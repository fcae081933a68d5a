"""Parquet and Arrow files (IPC file or stream): with our own columns (`harness.trace.formats.jsonl`), or as any table.

Read a batch at a time, as small as long values make it. Missing columns and nulls mean not given; any integer or float
width will do; ``prefix_ids`` is a list of integers, ``messages`` a list of structs with ``role`` and ``content``. Of a
file with other columns those are read that make a table (`harness.trace.formats.table`), and no others.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.errors import TraceError
from harness.trace.formats.columns import is_table, recognised
from harness.trace.formats.jsonl import FIELDS
from harness.trace.formats.record import Role, RowError, safe
from harness.trace.formats.unpacked import check_arrow, check_pages, group_pages
from harness.trace.source import MAX_LINE_BYTES, TraceFile, magic

MAGICS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
"""First bytes of Parquet, an Arrow file and an Arrow stream."""
_ROWS = 4096
_BATCH_BYTES = 2**26
_OURS_ALONE = {"prompt", "messages", "prefix_ids", "block_tokens"}
"""Columns by which a file is meant to be in our format, whatever else it has."""


def is_columnar(file: TraceFile) -> bool:
    """Whether the bytes of a file say so."""
    return magic(file).startswith(MAGICS)


def is_ours(file: TraceFile, asked: Mapping[Role, str]) -> bool:
    """Whether all columns are ours, times in seconds as ours are. Raises `TraceError`."""
    return _is_ours(_schema(file), asked)


def rows(file: TraceFile, asked: Mapping[Role, str]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """(row from 1, column -> value without nulls) of the columns that are ours, or a table's.

    Raises `TraceError` for a damaged file, and for one whose columns are no trace's.
    """
    return chosen_rows(file, _wanted(file, _schema(file), asked))


def column_names(file: TraceFile) -> list[str]:
    """Of a columnar file. Raises `TraceError`."""
    names: list[str] = _schema(file).names
    return names


def chosen_rows(file: TraceFile, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """The same of these columns. Raises `TraceError` for a damaged file."""
    import pyarrow as pa

    number = 0
    try:
        for batch in _batches(file, wanted):
            batch.validate(full=True)  # Arrow trusts offsets: a damaged file would read outside its memory
            names = batch.schema.names
            for values in zip(*(_values(column) for column in batch.columns), strict=True):
                number += 1
                row = {name: value for name, value in zip(names, values, strict=True) if value is not None}
                yield number, row if all(_is_short(value) for value in values) else _too_long()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise _damaged(file, number + 1, e) from e


def _damaged(file: TraceFile, row: int | None, error: Exception) -> TraceError:
    """What to say of a file that Arrow cannot read; its words may hold any byte of it."""
    return TraceError(file.name, row, f"damaged columnar file ({safe(str(error).strip(), 300)}): copy it again")


def _is_short(value: Any) -> bool:
    return not isinstance(value, str | bytes) or len(value) <= MAX_LINE_BYTES


def _too_long() -> RowError:
    return RowError("line too long", f"longer than {MAX_LINE_BYTES // 2**20} MiB: not a trace line")


def _values(column: Any) -> list[Any]:
    """Python's values of a column, times written out; equal texts of a dictionary are one object."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        used = column.indices.unique().drop_null()
        words = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
        return [words.get(at) for at in column.indices.to_pylist()]
    if pa.types.is_timestamp(column.type):
        column = pc.strftime(column.cast(pa.timestamp(column.type.unit)), format="%Y-%m-%d %H:%M:%S")
    found: list[Any] = column.to_pylist()
    return found


def _schema(file: TraceFile) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = magic(file)
    try:
        if kind.startswith(b"PAR1"):
            schema = pq.read_schema(str(file.path))
        else:
            with pa.OSFile(str(file.path), "rb") as raw:
                schema = (pa.ipc.open_file if kind.startswith(b"ARROW1") else pa.ipc.open_stream)(raw).schema
        schema.names  # noqa: B018  # decoded only here
        return schema
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise _damaged(file, None, e) from e


def _is_ours(schema: Any, asked: Mapping[Role, str]) -> bool:
    import pyarrow as pa

    names = schema.names
    if asked or not names or not set(names) <= set(FIELDS):
        return False
    kind = schema.field("arrival_s").type if "arrival_s" in names else pa.float64()
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def _batches(file: TraceFile, wanted: Sequence[str]) -> Iterator[Any]:
    import pyarrow as pa

    kind = magic(file)
    if kind.startswith(b"PAR1"):
        yield from _parquet(file, wanted)
        return
    check_arrow(file)
    with pa.OSFile(str(file.path), "rb") as raw:
        if kind.startswith(b"ARROW1"):
            with pa.ipc.open_file(raw) as reader:
                parts = (reader.get_batch(i) for i in range(reader.num_record_batches))
                yield from (part for batch in parts for part in _cut(batch.select(list(wanted))))
        else:
            with pa.ipc.open_stream(raw) as reader:
                yield from (part for batch in reader for part in _cut(batch.select(list(wanted))))


def _parquet(file: TraceFile, wanted: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    path = str(file.path)
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as parquet, file.path.open("rb") as raw:
        written = parquet.metadata
        for at in range(written.num_row_groups):
            group = written.row_group(at)
            columns = {(c := group.column(k)).path_in_schema: c for k in range(written.num_columns)}
            columns = {name: column for name, column in columns.items() if name.split(".")[0] in wanted}
            pages = group_pages(file, raw, columns)
            # Equal numbers are written as one: unpacked each has its own place.
            rows, size = group.num_rows, sum(max(each.total, 8 * each.values) for each in pages.values())
            if size > MAX_LINE_BYTES * max(rows, 1):
                raise TraceError(
                    file.name, None, f"its rows have {size // max(rows, 1) // 2**20} MiB each on average: not a trace"
                )
            check_pages(file, pages)
            # A value that is repeated is written once: a row may be as large as all that is written, but for numbers.
            texts = sum(
                pages[name].total if name in wanted else pages[name].dictionary
                for name, column in columns.items()
                if column.physical_type in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
            )
            fit = min(_ROWS, _BATCH_BYTES * rows // max(size, 1), _BATCH_BYTES // max(texts, 1))
            yield from parquet.iter_batches(max(1, fit), row_groups=[at], columns=list(wanted), use_threads=False)


def _cut(batch: Any) -> Iterator[Any]:
    """Parts of a batch that are as large in Python as one may be."""
    rows, size = max(batch.num_rows, 1), max(batch.get_total_buffer_size(), 1)
    # Rows of some kinds may all be the same bytes: each is as large as all that is there.
    repeated = sum(column.get_total_buffer_size() for column in batch.columns if _repeats(column.type))
    fit = max(1, min(_ROWS, _BATCH_BYTES * rows // size, _BATCH_BYTES // max(repeated, 1)))
    yield from (batch.slice(at, fit) for at in range(0, batch.num_rows, fit))


def _repeats(kind: Any) -> bool:
    """Whether values of a type, or in it, may share bytes."""
    import pyarrow.types as types

    shares = (types.is_string_view, types.is_binary_view, types.is_list_view, types.is_large_list_view,
              types.is_run_end_encoded)  # fmt: skip
    return any(of(kind) for of in shares) or any(_repeats(kind.field(i).type) for i in range(kind.num_fields))


def _wanted(file: TraceFile, schema: Any, asked: Mapping[Role, str]) -> list[str]:
    """The columns to read. Raises `TraceError`."""
    if b"harness.plan" in (schema.metadata or {}):
        raise TraceError(file.name, None, "is a plan, already made from a trace: use it with 'harness run'")
    names: list[str] = schema.names
    unknown = [name for name in names if name not in FIELDS]
    if _is_ours(schema, asked):
        return names
    found = {**recognised(names), **asked}
    top = {column.partition(".")[0] if column not in names else column for column in found.values()}
    if is_table(found) and top <= set(names) and not (_OURS_ALONE & set(names) and not asked):
        return [name for name in names if name in top]
    if missing := sorted(top - set(names)):
        raise TraceError(file.name, None, f"no column {safe(', '.join(missing), 200)}; there are {_listed(names)}")
    near = {name: difflib.get_close_matches(name, FIELDS, 1, 0.8) for name in unknown}
    hints = ", ".join(f"{name!r}" + (f" (did you mean {best[0]}?)" if best else "") for name, best in near.items())
    raise TraceError(
        file.name,
        None,
        f"columns that a trace does not have: {safe(hints, 500)}; valid: {', '.join(FIELDS)}. Of any other table say "
        "which columns are what: --map arrival=COLUMN,input=COLUMN,output=COLUMN",
    )


def _listed(names: Iterable[str]) -> str:
    return safe(", ".join(names), 500)
