"""The compiled reader stores what fits the pattern and passes on the rest; neither reader loses or invents a byte."""

from __future__ import annotations

import gc
import os
import shutil
import socket
import struct
import sys
import time
import weakref
from array import array
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.scenarios.client import reader as reading
from harness.scenarios.client.events import is_text

PYTHON: Any = SimpleNamespace(
    Reader=reading.PythonReader,
    ReceiveBuffer=reading.PythonReceiveBuffer,
    Pattern=reading.PythonPattern,
    COMPILED=False,
)
needs_compiled = pytest.mark.skipif(not reading.COMPILED, reason="no compiled reader here")
STORING: list[Any] = [pytest.param(reading, marks=needs_compiled, id="compiled")]
READERS: list[Any] = [pytest.param(PYTHON, id="python"), *STORING]
BEFORE, AFTER = b'data: {"id":"x","choices":[{"text":"', b'","finish_reason":null}]}'
OTHER_BEFORE, OTHER_AFTER = b'data: {"x":"', b'"}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(content: bytes, *, upper: bool = False) -> bytes:
    return (b"%X" if upper else b"%x") % len(content) + b"\r\n" + content + b"\r\n"


def plain(text: bytes, *, upper: bool = False, before: bytes = BEFORE, after: bytes = AFTER) -> bytes:
    return chunk(before + text + after + b"\n\n", upper=upper)


def same(data: bytes) -> bytes:
    return b"=" * len(data)


def pattern(path: Any, opening: bytes = b"") -> Any:
    events = ((BEFORE, same(BEFORE), AFTER + b"\n\n"), (OTHER_BEFORE, same(OTHER_BEFORE), OTHER_AFTER))
    return path.Pattern(opening, same(opening), events)


class Source:
    """Writes down what it is told."""

    def __init__(self, path: Any, opening: bytes = b"") -> None:
        self.here, self.there = socket.socketpair()
        self.there.setblocking(False)
        self.recvmsg = self.there.recvmsg
        self.reader, self.buffer = path.Reader(), path.ReceiveBuffer()
        self.pattern = pattern(path, opening)
        self.told: list[tuple[str, object]] = []
        self.reader.add(self.there.fileno(), self, True)

    def store(self, *, opening: bool = False) -> None:
        self.reader.store(self.there.fileno(), self.buffer, self.pattern, opening)

    def received(self, data: bytes, stamp: int) -> None:
        assert 0 <= time.monotonic_ns() - stamp < 60e9
        self.told.append(("received", data))

    def unmatched(self, data: bytes, stamp: int) -> None:
        assert 0 <= time.monotonic_ns() - stamp < 60e9
        self.told.append(("unmatched", data))

    def ended(self, stamp: int) -> None:
        assert 0 <= time.monotonic_ns() - stamp < 60e9
        self.told.append(("ended", None))

    def lost(self, trouble: str | None) -> None:
        self.told.append(("lost", trouble))
        self.reader.remove(self.there.fileno())

    def failed(self, code: int) -> None:
        self.told.append(("failed", code))
        self.reader.remove(self.there.fileno())

    def runs(self) -> list[tuple[int, list[bytes]]]:
        """What is stored, looked at in every way there is."""
        runs = self.buffer.runs(0, True)
        stamps = [stamp for _, stamps, _ in runs for stamp in array("q", stamps)]
        assert stamps == sorted(stamps)
        assert len(self.buffer) == len(stamps) == sum(len(parts) for _, _, parts in runs)
        assert self.buffer.last_ns >= (stamps[-1] if stamps else 0)
        assert self.buffer.chunk_bytes == sum(len(part) for kind, _, parts in runs for part in parts if not kind)
        assert self.buffer.size >= sum(len(part) for _, _, parts in runs for part in parts)
        texts = [text for kind, _, parts in runs for text in parts if kind]
        simple = all(32 <= byte < 127 and byte not in b'"\\' for text in texts for byte in text)
        assert is_text(texts) or not simple
        since = stamps[0] if stamps else 1
        for (kind, all_stamps, parts), (kind_too, some, few) in zip(runs, self.buffer.runs(since, False), strict=True):
            assert kind == kind_too
            assert array("q", some).tolist() == [stamp - since for stamp in array("q", all_stamps)]
            assert few == (None if kind and simple else parts)
        kinds = [kind for kind, _, _ in runs]
        assert all(a != b for a, b in pairwise(kinds))
        return [(kind, parts) for kind, _, parts in runs]

    def texts(self) -> list[bytes]:
        """The texts, when nothing else is stored."""
        runs = self.runs()
        assert all(runs), "texts alone"
        return [text for kind, parts in runs for text in parts if kind]

    def close(self) -> None:
        self.reader.close()
        self.here.close()
        self.there.close()


TEXTS = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"a", b"", b" ", b"x" * 300, AFTER, BEFORE, b'","finish_reason":null}]}'])
)
PIECES = st.one_of(
    TEXTS.map(plain),
    TEXTS.map(plain),
    TEXTS.map(lambda t: plain(t, upper=True)),
    TEXTS.map(lambda t: plain(t, before=OTHER_BEFORE, after=b'"}')),
    TEXTS.map(lambda t: plain(t, after=b'"}]}')),
    TEXTS.map(lambda t: plain(t, before=b"data: ")),
    TEXTS.map(chunk),
    TEXTS.map(lambda t: chunk(t + b"\n\r\n")),
    TEXTS.map(lambda t: b"0" + plain(t)),
    TEXTS.map(lambda t: plain(t)[:-1]),
    TEXTS.map(lambda t: plain(t)[1:]),
    TEXTS.map(lambda t: plain(t).replace(b"\r\n", b"\n")),
    st.sampled_from(
        [END, b"\r\n", b"ffffff\r\n", b"fffff\r\n", b"1_0\r\n", b" 5\r\n", b"+5\r\n", b"-1\r\n", b"0\r\nX: y\r\n\r\n"]
    ),
    st.sampled_from([HEAD, HEAD[:5], b"3;x=y\r\nabc\r\n", chunk(b"x" * 20_000)]),
    st.binary(min_size=1, max_size=30),
)


@needs_compiled
@settings(max_examples=700, deadline=None)
@given(
    pieces=st.lists(PIECES, min_size=1, max_size=20), cuts=st.lists(st.integers(0, 3000), max_size=6),
    opening=st.booleans(), sound=st.booleans(), last=st.booleans(),
)  # fmt: skip
def test_every_byte_is_stored_or_passed_on_once(
    pieces: list[bytes], cuts: list[int], opening: bool, sound: bool, last: bool
) -> None:
    if sound:  # whole chunks, as most streams are
        pieces = [plain(piece.replace(b"\n", b"") or b"x") for piece in pieces] + [END] * last
    body = (HEAD if opening and sound else b"") + b"".join(pieces)
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    writes = [body[a:b] for a, b in pairwise(edges)]
    source = Source(reading, HEAD if opening else b"")
    try:
        source.store(opening=opening)
        for write in writes:
            source.here.sendall(write)
            source.reader.read()
        source.here.close()
        source.reader.read()
        source.reader.read()
        runs, events, rest, opened = (
            source.runs(),
            source.reader.events,
            source.buffer.take_partial(),
            source.buffer.opening_matched,
        )
    finally:
        source.close()
    stored = (HEAD if opened else b"") + b"".join(framed(kind, part) for kind, parts in runs for part in parts)
    told = b"".join(data for _, data in source.told if data)  # type: ignore[misc]
    taken = stored + rest + told
    if sound:
        assert taken == body, "no byte is lost, moved or taken twice"
    else:  # a line end may be taken for granted that never comes
        assert without_line_ends(taken) == without_line_ends(body)
    assert all(text for kind, parts in runs for text in parts if kind)
    assert source.told[-1] == ("lost", None)
    assert source.reader.bytes == len(body)
    assert not sound or [kind for kind, _ in source.told] == ["ended"] * last + ["lost"]
    contents = [part for _, parts in runs for part in parts if part]
    passed_on = sum(kind in ("received", "unmatched") for kind, _ in source.told)
    assert events == opened + len(contents) + passed_on
    assert source.reader.shared <= max(sum(len(parts) for kind, parts in runs if kind) - 1, 0)


def framed(kind: int, part: bytes) -> bytes:
    """The chunk that was stored as this."""
    return (chunk(part), plain(part), plain(part, before=OTHER_BEFORE, after=b'"}'))[kind]


def without_line_ends(data: bytes) -> bytes:
    return data.lower().translate(None, b"\r\n")


@pytest.mark.parametrize("path", STORING)
def test_an_event_in_a_chunk_that_is_not_whole_is_not_kept_waiting(path: Any) -> None:
    """Of a chunk with several events that comes bit by bit each has its own time: by the book."""
    source = Source(path)
    source.store()
    source.here.sendall(b"fff\r\n" + BEFORE)
    source.reader.read()
    assert source.told == []
    source.here.sendall(b"text" + AFTER + b"\n\n")
    source.reader.read()
    assert source.told == [("unmatched", b"fff\r\n" + BEFORE + b"text" + AFTER + b"\n\n")]
    source.close()


@pytest.mark.parametrize("path", STORING)
def test_an_answer_is_told_of_only_at_its_end(path: Any) -> None:
    """However it is cut: byte by byte, whole, or in any two parts."""
    answer = HEAD + plain(b"one") + plain(b"two") + chunk(b"data: [DONE]\n\n") + END
    cuts = [[answer[i : i + 1] for i in range(len(answer))], *([answer[:i], answer[i:]] for i in range(1, len(answer)))]
    for parts in cuts:
        source = Source(path, HEAD)
        source.store(opening=True)
        for i, part in enumerate(parts):
            source.here.sendall(part)
            source.reader.read()
            assert source.told == ([("ended", None)] if i == len(parts) - 1 else [])
        assert source.buffer.opening_matched
        (one, texts), (zero, rest) = source.runs()
        assert (one, texts, zero, rest) == (1, [b"one", b"two"], 0, [b"data: [DONE]\n\n", b""])
        source.here.sendall(b"and more")
        source.reader.read()
        assert source.told[1:] == [("received", b"and more")]
        source.close()


@pytest.mark.parametrize("path", STORING)
def test_an_answer_of_unknown_events_is_told_of_at_the_first(path: Any) -> None:
    """Another model behind the same server: what its events look like is learned at once."""
    source = Source(path, HEAD)
    source.store(opening=True)
    source.here.sendall(HEAD)
    source.reader.read()
    source.here.sendall(chunk(b"data: 1\n\n") + plain(b"text"))
    source.reader.read()
    assert (source.buffer.opening_matched, source.runs()) == (True, [])
    assert source.told == [("unmatched", chunk(b"data: 1\n\n") + plain(b"text"))]
    source.close()


@pytest.mark.parametrize("path", STORING)
def test_an_event_that_is_not_over_hides_no_other(path: Any) -> None:
    """Chunks need not end where events do: what follows half an event is the rest of it, however plain it looks."""
    source = Source(path)
    source.store()
    source.here.sendall(chunk(b"data: half") + plain(b"no event") + chunk(b"\n\n") + plain(b"text"))
    source.reader.read()
    assert [kind for kind, _ in source.runs()] == [0, 1]
    source.close()
    source = Source(path)
    source.store()
    source.here.sendall(chunk(b": half") + chunk(b" of a comment") + plain(b"no event") + plain(b"text"))
    source.reader.read()
    assert [(kind, len(parts)) for kind, parts in source.runs()] == [(0, 3), (1, 1)]
    source.close()


@pytest.mark.parametrize("path", STORING)
@pytest.mark.parametrize(
    ("may", "fits", "not_"),
    [("w", b"a", b'"'), ("w", b"-", b"\\"), ("d", b"7", b"a"), ("v", b'"', b"\n"), ("=", b"?", b"a")],
)
def test_what_is_loose_may_differ_in_its_own_way_alone(path: Any, may: str, fits: bytes, not_: bytes) -> None:
    before = b'data: {"?":"'
    loose = same(before)[:8] + may.encode() + same(before)[9:]
    for byte, plain_too in ((fits, True), (not_, False)):
        content = before.replace(b"?", byte)
        source = Source(path)
        source.pattern = path.Pattern(before, loose, ((before, loose, b'"}\n\n'),))
        source.store()
        source.here.sendall(chunk(content + b'text"}\n\n'))
        source.reader.read()
        assert [kind for kind, _ in source.runs()] == [int(plain_too)]
        source.buffer.clear()
        source.store(opening=True)
        source.here.sendall(content)
        source.reader.read()
        assert (source.buffer.opening_matched, source.told) == (
            plain_too,
            [] if plain_too else [("unmatched", content)],
        )
        source.close()


@pytest.mark.parametrize("path", STORING)
def test_what_is_not_whole_outlives_what_was_taken(path: Any) -> None:
    source = Source(path)
    source.store()
    whole = plain(b"second")
    source.here.sendall(plain(b"first") + whole[:9])
    source.reader.read()
    assert source.texts() == [b"first"]
    source.buffer.clear()
    assert (len(source.buffer), source.buffer.size, source.buffer.chunk_bytes) == (0, 0, 0)
    source.store()  # by another pattern, perhaps
    source.here.sendall(whole[9:] + b"1")
    source.reader.read()
    assert source.texts() == [b"second"]
    assert (source.buffer.take_partial(), source.buffer.take_partial()) == (b"1", b"")
    source.close()


def test_the_python_reader_passes_on_bytes_that_were_read_elsewhere() -> None:
    source = Source(PYTHON)
    source.reader.remove(source.there.fileno())
    source.reader.add(source.there.fileno(), source, False)
    source.here.sendall(b"ciphers")
    assert source.reader.read() is False
    now = time.monotonic_ns()
    source.reader.take(source.there.fileno(), b"plain", now)
    source.reader.remove(source.there.fileno())
    source.reader.take(source.there.fileno(), b"gone", now)
    assert source.told == [("received", b"plain")]
    assert (source.reader.events, source.reader.bytes, source.reader.reads) == (1, 5, 0)
    source.close()


@pytest.mark.parametrize("path", STORING)
def test_bytes_can_be_taken_that_were_read_elsewhere(path: Any) -> None:
    """Those of a connection with TLS, however many."""
    source = Source(path)
    source.reader.remove(source.there.fileno())
    source.reader.add(source.there.fileno(), source, False)
    source.store()
    source.here.sendall(b"ciphers")
    source.reader.read()
    assert source.told == []
    now = time.monotonic_ns()
    source.reader.take(source.there.fileno(), plain(b"text") * 2000 + END, now)
    assert ([text for kind, parts in source.runs() for text in parts if kind], source.told) == (
        [b"text"] * 2000,
        [("ended", None)],
    )
    source.reader.remove(source.there.fileno())
    source.reader.take(source.there.fileno(), b"gone", now)
    assert len(source.told) == 1
    source.close()


@pytest.mark.parametrize("path", STORING)
def test_a_read_of_several_plain_events_is_all_texts(path: Any) -> None:
    source = Source(path)
    source.store()
    source.here.sendall(b"".join(plain(b"t%d" % i) for i in range(9)))
    source.reader.read()
    assert source.texts() == [b"t%d" % i for i in range(9)]
    assert (source.told, source.reader.shared, source.reader.reads) == ([], 8, 1)
    source.buffer.clear()
    assert source.texts() == []
    source.close()


@pytest.mark.parametrize("path", READERS)
def test_more_than_fits_one_read_arrives_in_order(path: Any) -> None:
    source = Source(path)
    source.there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    source.here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    body = bytes(range(256)) * 700
    source.here.sendall(body)
    source.here.close()
    for _ in range(8):
        source.reader.read()
    assert source.told[-1] == ("lost", None)
    assert b"".join(data for _, data in source.told[:-1]) == body  # type: ignore[misc]
    source.close()


@pytest.mark.parametrize("path", READERS)
def test_many_sockets_are_read_in_several_rounds(path: Any) -> None:
    """A round that takes long says that there is more, so that what is due meanwhile goes out."""
    source = Source(path)
    pairs = [socket.socketpair() for _ in range(390)]
    for here, there in pairs:
        source.reader.add(there.fileno(), SimpleNamespace(received=slow(source), recvmsg=there.recvmsg), True)
        here.sendall(b"x")
    rounds = 1
    while source.reader.read():
        rounds += 1
        assert len(source.told) < 390
    assert (len(source.told), rounds > 2) == (390, True)
    source.close()
    for pair in pairs:
        for end in pair:
            end.close()


def slow(source: Source) -> Any:
    def received(data: bytes, stamp: int) -> None:
        time.sleep(0.0001)
        source.received(data, stamp)

    return received


@pytest.mark.parametrize("path", STORING)
def test_bytes_and_an_end_that_come_together_are_both_told(path: Any) -> None:
    source = Source(path)
    source.store()
    source.here.sendall(plain(b"last"))
    source.here.close()
    for _ in range(3):
        source.reader.read()
    assert (source.texts(), source.told) == ([b"last"], [("lost", None)])
    source.close()


class Late(Source):
    """On a TCP connection whose packets the kernel stamps; it notes what it is told and when."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.reader.remove(self.there.fileno())
        self.here.close()
        self.there.close()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.there = socket.create_connection(listener.getsockname())
            self.here = listener.accept()[0]
        self.here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.there.setblocking(False)
        self.there.setsockopt(socket.SOL_SOCKET, reading.SO_TIMESTAMPNS, 1)
        self.recvmsg = self.there.recvmsg
        self.reader.add(self.there.fileno(), self, True)
        self.heard: list[int] = []
        for _ in range(200):  # the kernel begins a moment after it was asked
            _, read = self.send(b"?", 0.02)
            if self.heard.pop() < read - 10_000_000:
                break
        else:
            pytest.fail("the kernel stamps no packet")

    def received(self, data: bytes, stamp: int) -> None:
        self.heard.append(stamp)

    def send(self, data: bytes, late_s: float) -> tuple[int, int]:
        """Send, read so much later; when it was sent, and when it was read."""
        sent = time.monotonic_ns()
        self.here.sendall(data)
        time.sleep(late_s)
        read = time.monotonic_ns()
        self.reader.read()
        return sent, read


@pytest.mark.parametrize("path", READERS)
def test_a_stamp_is_when_bytes_came_not_when_they_were_read(path: Any) -> None:
    source = Late(path)
    try:
        times = [source.send(b"no event", 0.1) for _ in range(3)]
        source.store()
        times += [source.send(plain(b"text"), 0.1) for _ in range(3)]
        times += [source.send(plain(b"t" * 5000), 0.1)]
        stamps = source.heard + [ns for _, some, _ in source.buffer.runs(0, False) for ns in array("q", some)]
        assert len(stamps) == len(times)
        for stamp, (sent, read) in zip(stamps, times, strict=True):
            assert sent <= stamp < sent + (read - sent) / 2
    finally:
        source.close()


@pytest.mark.parametrize("path", STORING)
def test_events_that_share_a_read_have_the_stamp_of_the_last(path: Any) -> None:
    source = Late(path)
    try:
        source.store()
        source.here.sendall(plain(b"first"))
        time.sleep(0.05)
        sent, read = source.send(plain(b"second"), 0.1)
        first, second = array("q", source.buffer.runs(0, False)[0][1])
        assert first == second
        assert sent <= second < sent + (read - sent) / 2
    finally:
        source.close()


@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_a_wall_clock_that_is_set_moves_no_stamp_past_the_reads_around_it(
    step_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel stamps in wall-clock time; set between a packet and its read, that says nothing any more."""
    came = time.time_ns()
    said = [(socket.SOL_SOCKET, reading.SO_TIMESTAMPNS, struct.pack("qq", came // 10**9, came % 10**9))]
    after = time.monotonic_ns()
    monkeypatch.setattr(reading, "time_ns", lambda: time.time_ns() + step_s * 10**9)
    assert after <= reading.arrived_ns(said, after) <= time.monotonic_ns()


@pytest.mark.parametrize("said", [[], [(0, 0, b"")], [(1, 35, b"short")], [(1, 36, bytes(16))]])
def test_without_a_stamp_of_the_kernel_the_time_of_the_read_counts(said: list[tuple[int, int, bytes]]) -> None:
    before = time.monotonic_ns()
    assert before <= reading.arrived_ns(said, 0) <= time.monotonic_ns()


@pytest.mark.parametrize("path", READERS)
def test_a_reset_is_told_with_its_number(path: Any) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    source = Source(path)
    source.reader.remove(source.there.fileno())
    source.there.close()
    source.there = socket.create_connection(listener.getsockname())
    source.there.setblocking(False)
    source.recvmsg = source.there.recvmsg
    source.reader.add(source.there.fileno(), source, True)
    peer = listener.accept()[0]
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    listener.close()
    deadline = time.monotonic() + 10
    while not source.told and time.monotonic() < deadline:
        source.reader.read()
    assert source.told == [("failed", 104)]
    source.close()


@pytest.mark.parametrize("path", READERS)
def test_an_error_in_one_connection_loses_nothing_of_another(path: Any) -> None:
    first, second = Source(path), Source(path)
    second.reader.remove(second.there.fileno())
    first.reader.add(second.there.fileno(), second, True)
    told: list[bytes] = []

    def broken(data: bytes, stamp: int) -> None:
        told.append(data)
        raise RuntimeError(data.decode())

    first.received = broken  # type: ignore[method-assign]
    first.here.sendall(b"one")
    second.here.sendall(b"two")
    with pytest.raises(RuntimeError, match="one"):
        first.reader.read()
    first.reader.read()
    assert (told, second.told) == ([b"one"], [("received", b"two")])
    second.close()
    first.close()


@pytest.mark.parametrize("path", READERS)
def test_a_connection_closed_by_another_in_the_same_round_is_left_alone(path: Any) -> None:
    first, second = Source(path), Source(path)
    second.reader.remove(second.there.fileno())
    first.reader.add(second.there.fileno(), second, True)

    def close(which: Source) -> Any:
        return lambda data, stamp: first.reader.remove(which.there.fileno())

    first.received, second.received = close(second), close(first)  # type: ignore[method-assign]
    first.here.sendall(b"one")
    second.here.sendall(b"two")
    first.reader.read()
    first.reader.read()
    assert first.told == second.told == []
    second.close()
    first.close()


@pytest.mark.parametrize("path", STORING)
def test_nothing_is_held_once_it_is_closed(path: Any) -> None:
    source = Source(path)
    source.store()
    source.here.sendall(plain(b"text") + b"other")
    source.reader.read()
    buffer, shape = source.buffer, source.pattern
    source.store()
    source.close()
    held = weakref.ref(source)
    del source
    gc.collect()
    assert held() is None
    assert (sys.getrefcount(buffer), sys.getrefcount(shape)) == (2, 2)


@pytest.mark.parametrize("path", READERS)
def test_what_cannot_be_read_is_refused(path: Any) -> None:
    reader = path.Reader()
    here, there = socket.socketpair()
    reader.add(here.fileno(), there, True)
    with pytest.raises(ValueError, match="cannot be added"):
        reader.add(here.fileno(), there, False)
    for closed in (1_000_000, 2**31 - 1):
        with pytest.raises((OSError, ValueError)):
            reader.add(closed, there, True)
        with pytest.raises((OSError, ValueError)):
            reader.add(closed, there, False)
    reader.remove(here.fileno())
    reader.remove(here.fileno())  # twice is no error
    reader.stop_storing(here.fileno())
    reader.store(here.fileno(), path.ReceiveBuffer(), None, True)  # nor is what is gone
    reader.close()
    here.close()
    there.close()


@pytest.mark.parametrize("path", STORING)
def test_a_pattern_says_of_every_byte_whether_it_may_differ(path: Any) -> None:
    for wrong in ((b"ab", b"=", ()), (b"", b"", ((b"ab", b"=", b""),)), (b"", b"", ((b"a", b"=", b""),) * 16)):
        with pytest.raises(ValueError, match=r"differ|more than"):
            path.Pattern(*wrong)


@needs_compiled
def test_the_compiled_path_believes_nothing_of_another_kind() -> None:
    for wrong in ((), ("text", b"====", ()), (b"", b"", []), (b"", b"", ((b"", b""),)), (b"", b"", ("abc",))):
        with pytest.raises(TypeError):
            reading.Pattern(*wrong)  # type: ignore[arg-type]
    reader, buffer = reading.Reader(), reading.ReceiveBuffer()
    here, there = socket.socketpair()
    reader.add(here.fileno(), SimpleNamespace(), True)  # type: ignore[arg-type]
    for what in ((buffer, SimpleNamespace()), (object(), None), (buffer, reading.PythonPattern(b"", b"", ()))):
        with pytest.raises(TypeError):
            reader.store(here.fileno(), *what, True)  # type: ignore[arg-type]
    there.sendall(b"x")
    with pytest.raises(AttributeError):
        reader.read()
    reader.close()
    here.close()
    there.close()


@pytest.mark.skipif(
    shutil.which("cc") is None or bool(os.environ.get("HARNESS_INTERPRETED")), reason="no C compiler here"
)
def test_the_compiled_path_was_built_where_it_could_be() -> None:
    assert reading.COMPILED
