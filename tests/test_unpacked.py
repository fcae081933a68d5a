"""Columnar files of a few kilobytes that unpack to gigabytes: one clear line, in bounded memory."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness.errors import TraceError
from harness.trace.formats import columnar
from harness.trace.formats.columnar import pages_of
from harness.trace.io import open_trace
from harness.trace.source import open_source

Kind = Literal["file", "stream"]
KINDS: tuple[Kind, ...] = ("file", "stream")
MIB = 2**20
READ = """
import resource, sys
import pyarrow.compute, pyarrow.parquet
from harness.errors import HarnessError
from harness.trace.io import open_trace
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows, said = 0, ""
try:
    for row in open_trace(sys.argv[1], skip_bad=True):
        rows += 1
except HarnessError as e:
    said = str(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, rows, said)
"""


def read_apart(path: Path) -> tuple[int, int, str]:
    """(MiB that reading the file took, rows, what was said), in a process of its own."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    took, rows, *said = done.stdout.split(" ", 2)
    return int(took), int(rows), "".join(said).strip()


def written(path: Path, table: pa.Table, kind: Kind, compression: str | None, rows: int | None = None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return path


def arrow(path: Path, columns: dict[str, Any], kind: Kind, compression: str | None = "zstd") -> Path:
    return written(path, pa.table(columns), kind, compression)


def zeros(rows: int) -> dict[str, Any]:
    return {name: pa.array(np.full(rows, 5)) for name in ("input_tokens", "output_tokens")}


@pytest.mark.parametrize(("kind", "compression"), [("file", "zstd"), ("stream", "lz4")])
def test_a_batch_that_unpacks_to_more_than_fits_is_refused_before_it_is_unpacked(
    tmp_path: Path, kind: Kind, compression: str
) -> None:
    path = arrow(tmp_path / "t", zeros(274) | {"prompt": pa.array(["x" * MIB] * 274)}, kind, compression)
    took, rows, said = read_apart(path)
    assert rows == 0 and said.endswith("write it in smaller batches") and "274 MiB of memory" in said
    assert path.stat().st_size < 16 * MIB and took < 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_counts_too(tmp_path: Path, kind: Kind, monkeypatch) -> None:
    monkeypatch.setattr(columnar, "MOST_BYTES", 2 * MIB)
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["a" * MIB, "b" * MIB]))
    with pytest.raises(TraceError, match="a batch of it takes 2 MiB of memory once unpacked"):
        list(open_trace(arrow(tmp_path / "t", {**zeros(2), "prompt": words}, kind)))
    monkeypatch.setattr(columnar, "MOST_BYTES", 2 * MIB + 1000)
    assert [len(r.text or "") for r in open_trace(tmp_path / "t")] == [MIB, MIB]


@pytest.mark.parametrize(("kind", "compression"), [("file", "lz4"), ("stream", None)])
def test_what_fits_is_read_in_parts(tmp_path: Path, kind: Kind, compression: str | None) -> None:
    """Texts of 10 MiB, and of one text that all rows share: as Python's values they would be gigabytes."""
    text = b"x" * 10 * MIB
    if compression is None:
        views = struct.pack("<i4sii", len(text), text[:4], 0, 0) * 100
        texts = pa.Array.from_buffers(pa.string_view(), 100, [None, pa.py_buffer(views), pa.py_buffer(text)])
    else:
        texts = pa.array([text.decode()] * 20)
    path = arrow(tmp_path / "t", {"prompt": texts}, kind, compression)
    count = len(texts)
    del texts
    took, rows, said = read_apart(path)
    assert (rows, said) == (count, "") and took < 700


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compression", ["zstd", None])
def test_many_batches_are_no_large_one(tmp_path: Path, kind: Kind, compression: str | None, monkeypatch) -> None:
    monkeypatch.setattr(columnar, "MOST_BYTES", 20_000)
    table = pa.table(zeros(10_000) | {"model": pa.array(["a", "b"] * 5000).dictionary_encode()})
    path = written(tmp_path / "t", table, kind, compression, rows=500)
    assert [r.model for r in open_trace(path)] == ["a", "b"] * 5000
    with pytest.raises(TraceError, match="smaller batches"):
        list(open_trace(arrow(tmp_path / "one", zeros(10_000), kind, compression)))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_headers_are_one_error(tmp_path: Path, kind: Kind) -> None:
    whole = arrow(tmp_path / "t", zeros(50), kind).read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(100):
        raw = bytearray(whole)
        for at in rng.integers(8, len(raw), 3):
            raw[at] = rng.integers(256)
        (tmp_path / "t").write_bytes(raw)
        try:
            list(open_trace(tmp_path / "t", skip_bad=True))
        except TraceError as e:
            assert "\n" not in str(e)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20


# --- Parquet ---------------------------------------------------------------------------------------------------------


def test_a_large_dictionary_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    words = [chr(65 + k) * MIB for k in range(57)]
    table = pa.table(zeros(200) | {"prompt": pa.array([words[k % 57] for k in range(200)])})
    pq.write_table(table, tmp_path / "t", compression="zstd", dictionary_pagesize_limit=2**27)
    del table
    took, rows, said = read_apart(tmp_path / "t")
    assert rows == 0 and "a dictionary of it takes 57 MiB" in said and took < 60
    assert (tmp_path / "t").stat().st_size < MIB


def test_a_large_page_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(columnar, "MOST_BYTES", 3 * MIB)
    table = pa.table(zeros(100) | {"prompt": pa.array(["x" * 2**16] * 100)})
    pq.write_table(table, tmp_path / "t", compression="zstd", use_dictionary=False, data_page_size=2**30)
    with pytest.raises(TraceError, match="a page of each of its columns takes 6 MiB"):
        list(open_trace(tmp_path / "t"))
    pq.write_table(table, tmp_path / "t", use_dictionary=False, data_page_size=2**20, write_batch_size=10)
    assert len(list(open_trace(tmp_path / "t"))) == 100


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_equal_values_in_lists_are_read_in_parts(tmp_path: Path, version: Literal["1.0", "2.0"], monkeypatch) -> None:
    """16 MB of ids and 33 of messages, in a few kilobytes, as one MiB at a time."""
    monkeypatch.setattr(columnar, "_BATCH_BYTES", MIB)
    ids = pa.array([[7] * 4096] * 500, pa.list_(pa.int64()))
    chats = pa.array([[{"role": "user", "content": "x" * 65_536}]] * 500)
    for name, column in (("prefix_ids", ids), ("messages", chats)):
        path = tmp_path / name
        pq.write_table(pa.table({name: column}), path, compression="zstd", data_page_version=version)
        assert path.stat().st_size < 50_000
        sizes = [batch.nbytes for batch in columnar._batches(open_source(path), [name])]
        assert sum(sizes) > 16_000_000 and max(sizes) < 2 * MIB, name


def test_sizes_in_the_footer_are_not_believed(tmp_path: Path) -> None:
    """The same pages whatever the writer says: they are walked."""
    table = pa.table(
        zeros(5000) | {"model": pa.array(["a", "b"] * 2500), "session_id": pa.array(map(str, range(5000)))}
    )
    pq.write_table(table, tmp_path / "t", data_page_size=2000, row_group_size=2000, compression="gzip")
    path = tmp_path / "t"
    with pq.ParquetFile(path) as parquet, path.open("rb") as raw:
        for at in range(parquet.metadata.num_row_groups):
            group = parquet.metadata.row_group(at)
            columns = {(c := group.column(k)).path_in_schema: c for k in range(4)}
            found = {name: pages_of(raw, column) for name, column in columns.items()}
            for name, column in columns.items():
                assert found[name].values == column.num_values
                headers = column.total_uncompressed_size - found[name].total
                assert 0 < headers < 100 * (column.num_values // 100 + 2), name
    assert len(list(open_trace(path))) == 5000
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(100):
        raw_bytes = bytearray(whole)
        for place in rng.integers(4, len(whole), 3):
            raw_bytes[place] = rng.integers(256)
        path.write_bytes(raw_bytes)
        try:
            list(open_trace(path, skip_bad=True))
        except TraceError as e:
            assert "\n" not in str(e)
