"""Arrays of one entry a request: their types, and how they stay out of memory when a run is long.

From `HELD` bytes on an array lives in a temporary file without a name, mapped: its pages are the kernel's to write out
and to drop, so memory does not grow with the run. Work on such arrays goes by `blocks`, so that no step makes a
temporary array as long as the run. They lie where Python's `tempfile` puts things (TMPDIR).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.errors import ResultsError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

HELD = 1 << 20
"""Bytes of the longest array that is held in memory."""
BLOCK = 1 << 17
"""Entries that are worked on at a time."""


def empty(n: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """An array of ``n`` entries, not yet written, in memory or in a file. Raises `ResultsError` on a full disk."""
    kind = np.dtype(dtype)
    size = n * kind.itemsize
    if size < HELD:
        return np.empty(n, kind)
    try:
        with tempfile.TemporaryFile(prefix="harness-") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a crash at some later write
            return np.frombuffer(mmap.mmap(file.fileno(), size), kind)
    except OSError as e:
        folder, need = tempfile.gettempdir(), f"{size / 1e6:,.0f} MB"
        raise ResultsError(f"{folder}: no room for {need} of columns ({e.strerror}); set TMPDIR to another disk") from e


def zeros(n: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """An array of ``n`` zeros; those of a file take room on disk, and memory only where they are written."""
    return empty(n, dtype) if n * np.dtype(dtype).itemsize >= HELD else np.zeros(n, dtype)


def blocks(n: int) -> Iterator[slice]:
    """Slices of `BLOCK` entries that cover ``n``, in order."""
    for start in range(0, n, BLOCK):
        yield slice(start, min(start + BLOCK, n))


def filled(n: int, of: Callable[[slice], Any], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """An array of ``n`` entries, worked out a block at a time."""
    made = empty(n, dtype)
    for part in blocks(n):
        made[part] = of(part)
    return made


def kept(values: npt.NDArray[Any], where: Bools) -> npt.NDArray[Any]:
    """``values[where]``, a block at a time."""
    made, at = empty(int(np.count_nonzero(where)), values.dtype), 0
    for part in blocks(len(values)):
        some = values[part][where[part]]
        made[at : at + len(some)] = some
        at += len(some)
    return made


def flags(n: int, of: Callable[[slice], Any]) -> Bools:
    """``n`` truths, worked out a block at a time."""
    return filled(n, of, np.bool_)


def finite(values: Floats) -> Bools:
    """Which of ``values`` are known."""
    return flags(len(values), lambda part: np.isfinite(values[part]))


def running(n: int, of: Callable[[slice], Any], dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """Running sums of ``n`` numbers, worked out a block at a time."""
    made, total = empty(n, dtype), 0
    for part in blocks(n):
        values = np.array(of(part), dtype)
        values[0] += total  # first, so that sums are those of one piece to the last bit
        total = np.cumsum(values, out=made[part])[-1]
    return made


def ranked(values: npt.NDArray[Any], where: Bools | None = None) -> npt.NDArray[Any]:
    """A sorted copy of ``values``, or of those ``where`` says."""
    made = filled(len(values), lambda part: values[part], values.dtype) if where is None else kept(values, where)
    made.sort()
    return made


def ranked_gaps(times: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Gaps between ``times``, sorted."""
    return ranked(np.subtract(times[1:], times[:-1], out=empty(len(times) - 1, times.dtype)))


def mean_distance(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Mean of |a - b|."""
    return sum(float(np.abs(a[part] - b[part]).sum()) for part in blocks(len(a))) / len(a)


def differing(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """Share of places at which the two differ."""
    return sum(int(np.count_nonzero(a[part] != b[part])) for part in blocks(len(a))) / len(a)


def forget(array: npt.NDArray[Any]) -> None:
    """Let go of the memory of an array that lives in a file; what is in it stays, and is read again when it is used."""
    base: Any = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)
