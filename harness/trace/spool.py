"""What is kept of a trace of any length while memory stays bounded: a little for each session, and rows that are to be
put in order. (Numbers, a few a row, are held.)

All begin in memory, and what is too much goes to temporary files without a name, where Python's `tempfile` and SQLite
put things. Where that is memory itself (a tmpfs), set TMPDIR to a disk.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import pickle
import sqlite3
import tempfile
from collections.abc import Callable, Hashable, Iterator
from typing import IO, Any, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from harness.errors import HarnessError

V = TypeVar("V")

HELD_SESSIONS = 2**18
"""Sessions that are held in memory, and as many of those that were last used before them."""
HELD_BYTES = 2**26
"""Of what is sorted, about so much is held in memory."""
BLOCK = 2**18


class Sessions(Generic[V]):
    """A dict from sessions to small values that stays small itself: what was not set for long lies in a file.

    Keys are told apart by 64 bits of a hash, the same in every process: of ten million, two are mistaken for one with a
    chance of three in a million. Values must not change after they were set.
    """

    def __init__(self, kind: type[V], *, in_turn: bool = False) -> None:
        """``in_turn``: keys begin with the pass over the trace; one is over when the next begins, and is forgotten."""
        self._in_turn, self._pass = in_turn, None
        self._young: dict[int, V] = {}
        self._old: dict[int, V] = {}
        self._file: sqlite3.Connection | None = None
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def get(self, key: Hashable) -> V | None:
        """What was set last. Raises `HarnessError` when the file cannot be read."""
        at = _place(key)
        found = self._young.get(at)
        if found is None:
            found = self._old.get(at)
        if found is None and self._file is not None:
            row = self._asked(self._file.execute, "SELECT value FROM kept WHERE key = ?", (at,)).fetchone()
            return None if row is None else self._decode(row[0])
        return found

    def set(self, key: Hashable, value: V) -> None:
        """Keep ``value``. Raises `HarnessError` on a full disk."""
        if self._in_turn and isinstance(key, tuple) and key[0] != self._pass:
            self._forget()
            self._pass = key[0]
        self._young[_place(key)] = value
        if len(self._young) >= HELD_SESSIONS:
            self._store({at: kept for at, kept in self._old.items() if at not in self._young})
            self._old, self._young = self._young, {}

    def _forget(self) -> None:
        self._young, self._old = {}, {}
        if self._file is not None:
            self._file.close()
        self._file = None

    def _store(self, kept: dict[int, V]) -> None:
        if not kept:
            return
        if self._file is None:
            self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            for line in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16384"):
                self._file.execute(f"PRAGMA {line}")
            self._file.execute("CREATE TABLE kept (key INTEGER PRIMARY KEY, value BLOB NOT NULL)")
        rows = ((at, self._encode(kept[at])) for at in sorted(kept))  # in order: neighbours share a page
        self._file.execute("BEGIN")
        self._asked(self._file.executemany, "INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)
        self._asked(self._file.execute, "COMMIT")

    def _asked(self, ask: Callable[..., sqlite3.Cursor], *what: Any) -> sqlite3.Cursor:
        try:
            return ask(*what)
        except sqlite3.Error as e:
            raise _no_room("the sessions of the trace", str(e)) from e


def _place(key: Hashable) -> int:
    digest = hashlib.blake2b(repr(key).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


T = TypeVar("T")


class Sorter(Generic[T]):
    """Things that are added in any order and come out sorted, equal ones as they were added; read once.

    Beyond `HELD_BYTES` they are sorted in parts that lie in a file, and merged as they are read.
    """

    def __init__(self, key: Callable[[T], Any], weight: Callable[[T], int]) -> None:
        """``weight``: about how many bytes one takes."""
        self._key, self._weight = key, weight
        self._held: list[T] = []
        self._size = 0
        self._file: IO[bytes] | None = None
        self._parts: list[list[tuple[int, int]]] = []

    def add(self, thing: T) -> None:
        """The next one. Raises `HarnessError` on a full disk."""
        self._held.append(thing)
        self._size += self._weight(thing)
        if self._size >= HELD_BYTES:
            self._store()

    def __iter__(self) -> Iterator[T]:
        self._held.sort(key=self._key)
        if not self._parts:
            return iter(self._held)
        return heapq.merge(*(self._stored(part) for part in self._parts), self._held, key=self._key)

    def _store(self) -> None:
        self._held.sort(key=self._key)
        blocks: list[tuple[int, int]] = []
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="harness-")  # noqa: SIM115  # lives as long as the sorter
            for block in self._blocks():
                data = pickle.dumps(block, pickle.HIGHEST_PROTOCOL)
                blocks.append((self._file.seek(0, os.SEEK_END), len(data)))
                self._file.write(data)
            self._file.flush()
        except OSError as e:
            raise _no_room("rows to be sorted", e.strerror or str(e)) from e
        self._parts.append(blocks)
        self._held, self._size = [], 0

    def _blocks(self) -> Iterator[list[T]]:
        block: list[T] = []
        size = 0
        for thing in self._held:
            block.append(thing)
            size += self._weight(thing)
            if size >= min(HELD_BYTES, 2**20):
                yield block
                block, size = [], 0
        if block:
            yield block

    def _stored(self, part: list[tuple[int, int]]) -> Iterator[T]:
        assert self._file is not None
        for at, size in part:
            yield from pickle.loads(os.pread(self._file.fileno(), size, at))  # noqa: S301  # our own file, without a name


def filled(n: int, of: Callable[[slice], Any], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array of ``n`` entries, of which ``of`` says those of a slice."""
    return np.asarray(of(slice(0, n)), dtype=kind)


def blocks(n: int) -> Iterator[slice]:
    """Slices of `BLOCK` entries that cover ``n``, in order."""
    return (slice(at, min(at + BLOCK, n)) for at in range(0, n, BLOCK))


def _no_room(what: str, why: str) -> HarnessError:
    return HarnessError(f"{tempfile.gettempdir()}: cannot keep {what} there ({why}); set TMPDIR to another disk")
