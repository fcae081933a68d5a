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
import pytest

from harness.errors import TraceError
from harness.formats import unpacked
from harness.records import open_trace

Kind = Literal["file", "stream"]
KINDS: tuple[Kind, ...] = ("file", "stream")
MIB = 2**20
READ = """
import resource, sys
import pyarrow.compute, pyarrow.parquet
from harness.errors import HarnessError
from harness.records import open_trace
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
    path = arrow(tmp_path / "t", zeros(18_000_000), kind, compression)
    took, rows, said = read_apart(path)
    assert rows == 0 and said.endswith("write it in smaller batches") and "274 MiB of memory" in said
    assert path.stat().st_size < 16 * MIB and took < 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_counts_too(tmp_path: Path, kind: Kind) -> None:
    words = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["a" * 150 * MIB, "b" * 150 * MIB]))
    path = arrow(tmp_path / "t", {**zeros(2), "prompt": words}, kind)
    del words
    took, rows, said = read_apart(path)
    assert rows == 0 and "300 MiB of memory" in said and took < 100


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
    monkeypatch.setattr(unpacked, "MOST_BYTES", 20_000)
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
