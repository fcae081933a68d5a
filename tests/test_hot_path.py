"""The compiled hot path does what the one in Python does, byte by byte; neither loses, invents or keeps anything."""

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
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios import hot_path, reading
from scenarios.plain import Template

PATHS: list[Any] = [reading, *([hot_path] if hot_path.COMPILED else [])]
BEFORE, AFTER = b'data: {"id":"x","choices":[{"text":"', b'","finish_reason":null}]}'


def plain(text: bytes, *, upper: bool = False, before: bytes = BEFORE, after: bytes = AFTER) -> bytes:
    event = before + text + after + b"\n\n"
    return (b"%X" if upper else b"%x") % len(event) + b"\r\n" + event + b"\r\n"


class Source:
    """Writes down what it is told."""

    def __init__(self, path: Any, template: Template, again: bool) -> None:
        self.here, self.there = socket.socketpair()
        self.there.setblocking(False)
        self.recvmsg = self.there.recvmsg
        self.reader, self.kept = path.Reader(), path.Kept()
        self.template, self.again = template, again
        self.told: list[tuple[str, object]] = []
        self.reader.add(self.there.fileno(), self)

    def keep_texts(self) -> None:
        self.reader.keep_texts(self.there.fileno(), self.kept, self.template)

    def received(self, data: bytes, stamp: int) -> None:
        assert 0 <= time.monotonic_ns() - stamp < 60e9
        self.told.append(("received", data))

    def other(self, data: bytes, stamp: int) -> None:
        assert 0 <= time.monotonic_ns() - stamp < 60e9
        self.told.append(("other", data))
        if not self.again:
            self.reader.keep_all(self.there.fileno())

    def lost(self, trouble: str | None) -> None:
        self.told.append(("lost", trouble))
        self.reader.remove(self.there.fileno())

    def failed(self, code: int) -> None:
        self.told.append(("failed", code))
        self.reader.remove(self.there.fileno())

    def texts(self) -> list[bytes]:
        """What is kept, looked at in every way there is."""
        texts: list[bytes] = self.kept.texts()
        stamps = array("q", self.kept.stamps(0)).tolist()
        assert len(self.kept) == len(texts) == len(stamps)
        assert stamps == sorted(stamps)
        assert self.kept.last_ns == (stamps[-1] if stamps else 0)
        assert array("q", self.kept.stamps(stamps[0] if stamps else 1)).tolist() == [s - stamps[0] for s in stamps]
        simple = all(32 <= byte < 127 and byte not in b'"\\' for text in texts for byte in text)
        assert self.kept.simple is simple
        assert Template.fit(self.kept.joined()) or not simple
        assert self.kept.joined() == b" ".join(texts)
        return texts

    def close(self) -> None:
        self.reader.close()
        self.here.close()
        self.there.close()


@pytest.fixture
def template() -> Template:
    learned = Template.learn(plain(b"some text"))
    assert learned is not None
    return learned


TEXTS = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"a", b"", b" ", b"x" * 300, AFTER, BEFORE, b'","finish_reason":null}]}'])
)
PIECES = st.one_of(
    TEXTS.map(plain),
    TEXTS.map(plain),
    TEXTS.map(lambda t: plain(t, upper=True)),
    TEXTS.map(lambda t: plain(t, after=b'"}]}')),
    TEXTS.map(lambda t: plain(t, before=b"data: ")),
    TEXTS.map(lambda t: b"0" + plain(t)),
    TEXTS.map(lambda t: plain(t)[:-1]),
    TEXTS.map(lambda t: plain(t)[1:]),
    TEXTS.map(lambda t: plain(t).replace(b"\r\n", b"\n")),
    st.sampled_from([b"0\r\n\r\n", b"\r\n", b"ffffff\r\n", b"fffff\r\n", b"1_0\r\n", b" 5\r\n", b"+5\r\n", b"-1\r\n"]),
    st.binary(min_size=1, max_size=30),
)


@settings(max_examples=500, deadline=None)
@given(
    writes=st.lists(st.lists(PIECES, min_size=1, max_size=6).map(b"".join), min_size=1, max_size=8),
    upper=st.booleans(), again=st.booleans(),
)  # fmt: skip
def test_both_paths_take_the_same_bytes_the_same_way(writes: list[bytes], upper: bool, again: bool) -> None:
    found = []
    for path in PATHS:
        template = Template(BEFORE, AFTER, b"\n\n", b"%X" if upper else b"%x")
        source = Source(path, template, again)
        try:
            source.keep_texts()
            for write in writes:
                source.here.sendall(write)
                source.reader.read()
            source.here.close()
            source.reader.read()
            source.reader.read()
            texts = source.texts()
        finally:
            source.close()
        parts = [data for kind, data in source.told if kind != "lost"]
        rebuilt = sum(map(len, parts)) + sum(len(plain(text)) for text in texts)  # type: ignore[arg-type]
        assert rebuilt == sum(map(len, writes)), "no byte is lost or taken twice"
        assert all(texts)
        assert source.told[-1] == ("lost", None)
        assert source.reader.bytes == sum(map(len, writes))
        assert source.reader.events == len(texts) + len(parts)
        found.append((texts, source.told))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("path", PATHS)
def test_a_read_of_several_plain_events_is_all_texts(path: Any, template: Template) -> None:
    source = Source(path, template, again=False)
    source.keep_texts()
    source.here.sendall(b"".join(plain(b"t%d" % i) for i in range(9)))
    source.reader.read()
    assert source.texts() == [b"t%d" % i for i in range(9)]
    assert source.told == []
    source.kept.clear()
    assert source.texts() == []
    source.close()


@pytest.mark.parametrize("path", PATHS)
def test_more_than_fits_one_read_arrives_in_order(path: Any, template: Template) -> None:
    source = Source(path, template, again=True)
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


@pytest.mark.parametrize("path", PATHS)
def test_bytes_and_an_end_that_come_together_are_both_told(path: Any, template: Template) -> None:
    source = Source(path, template, again=True)
    source.keep_texts()
    source.here.sendall(plain(b"last"))
    source.here.close()
    for _ in range(3):
        source.reader.read()
    assert (source.texts(), source.told) == ([b"last"], [("lost", None)])
    source.close()


class Late(Source):
    """On a TCP connection whose packets the kernel stamps; it notes what it is told and when."""

    def __init__(self, path: Any, template: Template) -> None:
        super().__init__(path, template, again=True)
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
        self.reader.add(self.there.fileno(), self)
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


@pytest.mark.parametrize("path", PATHS)
def test_a_stamp_is_when_bytes_came_not_when_they_were_read(path: Any, template: Template) -> None:
    source = Late(path, template)
    try:
        times = [source.send(b"no event", 0.1) for _ in range(3)]
        source.keep_texts()
        times += [source.send(plain(b"text"), 0.1) for _ in range(3)]
        times += [source.send(plain(b"t" * 5000), 0.1)]  # more than the usual read takes
        stamps = source.heard + array("q", source.kept.stamps(0)).tolist()
        assert len(stamps) == len(times)
        for stamp, (sent, read) in zip(stamps, times, strict=True):
            assert sent <= stamp < sent + (read - sent) / 2
    finally:
        source.close()


@pytest.mark.parametrize("path", PATHS)
def test_events_that_share_a_read_have_the_stamp_of_the_last(path: Any, template: Template) -> None:
    source = Late(path, template)
    try:
        source.keep_texts()
        source.here.sendall(plain(b"first"))
        time.sleep(0.05)
        sent, read = source.send(plain(b"second"), 0.1)
        first, second = array("q", source.kept.stamps(0))
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


@pytest.mark.parametrize("path", PATHS)
def test_a_reset_is_told_with_its_number(path: Any, template: Template) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    source = Source(path, template, again=True)
    source.reader.remove(source.there.fileno())
    source.there.close()
    source.there = socket.create_connection(listener.getsockname())
    source.there.setblocking(False)
    source.recvmsg = source.there.recvmsg
    source.reader.add(source.there.fileno(), source)
    peer = listener.accept()[0]
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    listener.close()
    deadline = time.monotonic() + 10
    while not source.told and time.monotonic() < deadline:
        source.reader.read()
    assert source.told == [("failed", 104)]
    source.close()


@pytest.mark.parametrize("path", PATHS)
def test_an_error_in_one_connection_loses_nothing_of_another(path: Any, template: Template) -> None:
    first, second = Source(path, template, again=True), Source(path, template, again=True)
    second.reader.remove(second.there.fileno())
    first.reader.add(second.there.fileno(), second)
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


@pytest.mark.parametrize("path", PATHS)
def test_a_connection_closed_by_another_in_the_same_round_is_left_alone(path: Any, template: Template) -> None:
    first, second = Source(path, template, again=True), Source(path, template, again=True)
    second.reader.remove(second.there.fileno())
    first.reader.add(second.there.fileno(), second)

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


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_held_once_it_is_closed(path: Any, template: Template) -> None:
    source = Source(path, template, again=True)
    source.keep_texts()
    source.here.sendall(plain(b"text") + b"other")
    source.reader.read()
    source.close()
    held = weakref.ref(source)
    counts = sys.getrefcount(template.before), sys.getrefcount(template.after)
    del source
    gc.collect()
    assert held() is None
    assert counts == (sys.getrefcount(template.before), sys.getrefcount(template.after))


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_read_is_refused(path: Any, template: Template) -> None:
    reader = path.Reader()
    here, there = socket.socketpair()
    reader.add(here.fileno(), there)
    with pytest.raises(ValueError, match="cannot be added"):
        reader.add(here.fileno(), there)
    for closed in (1_000_000, 2**31 - 1):
        with pytest.raises((OSError, ValueError)):
            reader.add(closed, there)
    reader.remove(here.fileno())
    reader.remove(here.fileno())  # twice is no error
    reader.keep_all(here.fileno())
    reader.keep_texts(here.fileno(), path.Kept(), template)  # nor is what is gone
    reader.close()
    here.close()
    there.close()


@pytest.mark.skipif(not hot_path.COMPILED, reason="no compiled hot path here")
def test_the_compiled_path_believes_no_template_of_another_kind() -> None:
    reader, kept = hot_path.Reader(), hot_path.Kept()
    here, there = socket.socketpair()
    reader.add(here.fileno(), SimpleNamespace())  # type: ignore[arg-type]
    for wrong in (SimpleNamespace(), SimpleNamespace(before="text", after=b"", upper=False)):
        with pytest.raises((AttributeError, TypeError)):
            reader.keep_texts(here.fileno(), kept, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        reader.keep_texts(here.fileno(), object(), wrong)  # type: ignore[arg-type]
    there.sendall(b"x")
    with pytest.raises(AttributeError):
        reader.read()
    reader.close()
    here.close()
    there.close()


@pytest.mark.skipif(not hot_path.COMPILED, reason="no compiled hot path here")
def test_the_compiled_path_survives_a_template_that_adds_connections() -> None:
    """Its table of lanes grows, and moves, while the template is asked."""
    reader, kept = hot_path.Reader(), hot_path.Kept()
    pairs = [socket.socketpair() for _ in range(200)]
    told: list[bytes] = []
    source: Any = SimpleNamespace(received=lambda data, stamp: told.append(data), other=lambda data, stamp: None)

    class Adding:
        upper, before = False, BEFORE

        @property
        def after(self) -> bytes:
            for here, _ in pairs[1:]:
                reader.add(here.fileno(), source)
            return AFTER + b"\n\n\r\n"

    reader.add(pairs[0][0].fileno(), source)
    reader.keep_texts(pairs[0][0].fileno(), kept, Adding())  # type: ignore[arg-type]
    pairs[0][1].sendall(plain(b"text"))
    pairs[1][1].sendall(b"other")
    reader.read()
    assert (kept.texts(), told) == ([b"text"], [b"other"])
    reader.close()
    for here, there in pairs:
        here.close()
        there.close()


@pytest.mark.skipif(
    shutil.which("cc") is None or bool(os.environ.get("HARNESS_INTERPRETED")), reason="no C compiler here"
)
def test_the_compiled_path_was_built_where_it_could_be() -> None:
    assert hot_path.COMPILED
