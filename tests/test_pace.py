"""Reading every so often instead of at once: only where it saves something and hides nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from types import SimpleNamespace

import gevent
import pytest

from harness.record.run_spec import BATCH_READS_FROM
from harness.scenarios.client import reader as pace
from harness.scenarios.client.reader import MAX_INTERVAL_NS, Reader, ReadPacer

MS = 1_000_000


class Rig:
    """A pace over a reader and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_from: int = BATCH_READS_FROM) -> None:
        self.pipe = os.pipe()
        self.events = self.shared = self.unstamped = self.now = self.streams = 0
        self.looked = 0
        self.periods: list[int] = []
        monkeypatch.setattr(pace, "monotonic_ns", lambda: self.now)
        self.pace = ReadPacer(self, lambda: self.streams, batch_from)  # type: ignore[arg-type]
        monkeypatch.setattr(self.pace._ticker, "every", self.periods.append)

    def fileno(self) -> int:
        return self.pipe[0]

    def read(self) -> bool:
        return False

    def rounds(self, events: int, every_ns: int, n: int = 300, shared: float = 0) -> None:
        """So many rounds of reading, each of so many events, of which so many share a stamp."""
        for i in range(n):
            self.now += every_ns
            self.events += events
            self.shared += int((i + 1) * shared) - int(i * shared)
            if self.now - self.looked > 100 * MS:
                self.looked = self.now
                self.pace._adapt()

    def close(self) -> None:
        self.pace.close()
        for fd in self.pipe:
            os.close(fd)

    @property
    def waits(self) -> str:
        """What for: "bytes" or "time"."""
        assert self.pace._ready.active != bool(self.pace._interval_ns), "for one of both, always"
        return "bytes" if self.pace._ready.active else "time"


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("streams", "events", "every_ns", "period_ms"),
    [
        pytest.param(1000, 40, MS // 2, 2.5, id="a thousand streams of 80 tokens/s: a quarter of 12.5 ms is too much"),
        pytest.param(400, 40, MS // 2, 1.25, id="of 200 tokens/s: a quarter of 5 ms"),
        pytest.param(100, 40, MS // 2, None, id="of 800 tokens/s: two tokens of a stream would share a stamp"),
        pytest.param(8, 400, MS, None, id="a few streams as fast as they can"),
        pytest.param(100, 10, MS, None, id="a hundred streams: 25 events an interval, there is nothing to save"),
        pytest.param(0, 40, MS // 2, None, id="bytes for nobody"),
    ],
)
def test_it_reads_four_times_between_two_tokens(
    rig: Rig, streams: int, events: int, every_ns: int, period_ms: float | None
) -> None:
    rig.streams = streams
    rig.rounds(events, every_ns)
    assert rig.waits == ("time" if period_ms else "bytes")
    if period_ms:
        assert rig.periods[-1] == pytest.approx(period_ms * MS, rel=0.02)
        assert rig.periods[-1] <= MAX_INTERVAL_NS


@pytest.mark.parametrize(("batch_from", "batched"), [(BATCH_READS_FROM, True), (50, True), (51, False), (80, False)])
def test_batching_begins_where_this_machine_was_calibrated_to_profit(
    monkeypatch: pytest.MonkeyPatch, batch_from: int, batched: bool
) -> None:
    """200 streams of 100 tokens/s: 50 events per interval of 2.5 ms. It never changes its mind: no run is a trial."""
    rig = Rig(monkeypatch, batch_from)
    rig.streams = 200
    rig.rounds(20, MS)
    for _ in range(100):
        rig.rounds(20, MS, 100)
        assert rig.waits == ("time" if batched else "bytes")
    rig.close()


def test_it_reads_at_once_again_when_less_comes(rig: Rig) -> None:
    rig.streams = 1000
    rig.rounds(100, MS)
    assert rig.waits == "time"
    rig.rounds(1, 2 * MS, 10)
    assert rig.waits == "time", "a lull is no reason"
    rig.rounds(1, 2 * MS, 100)
    assert rig.waits == "bytes"
    rig.rounds(100, MS)
    assert rig.waits == "time"


def test_without_stamps_of_the_kernel_it_reads_at_once(rig: Rig) -> None:
    """A stamp would be the time of the read, which waiting makes later."""
    rig.streams = 1000
    rig.rounds(100, MS)
    assert rig.waits == "time"
    rig.unstamped += 1
    rig.rounds(100, MS, 102)
    assert rig.waits == "bytes"
    rig.rounds(100, MS, 202)
    assert rig.waits == "time"


def test_periods_get_shorter_until_events_hardly_ever_share_a_stamp(rig: Rig) -> None:
    """Some streams are faster than the mean says."""
    rig.streams = 1000
    periods = []
    for _ in range(300):
        # As if 5 % of the streams had tokens 1.2 ms apart: a longer period joins some of them.
        period_ns = rig.periods[-1] if rig.waits == "time" else 0
        rig.rounds(100, MS, 102, shared=max(period_ns - 1.2 * MS, 0) / MS)
        periods.append(period_ns / MS)
    assert max(periods[20:]) < 1.2 + 0.2 + 3 * 0.16, "what is rare, and a step or two"
    assert 0.7 < sum(periods[20:]) / len(periods[20:]) < 1.2, "no longer, and not given up"
    rig.rounds(100, MS, 102 * 20, shared=1)
    assert rig.waits == "bytes"
    rig.rounds(100, MS, 102 * 20)
    assert rig.periods[-1] == MAX_INTERVAL_NS


def test_bytes_are_read_at_once_or_when_it_is_time() -> None:
    """With the real reader, loop and timer: nothing is left lying, and what waited is read in one round."""
    reader = Reader()
    heard: list[bytes] = []
    here, there = socket.socketpair()
    there.setblocking(False)
    reader.add(
        there.fileno(), SimpleNamespace(received=lambda data, _: heard.append(data), recvmsg=there.recvmsg), True
    )
    made = ReadPacer(reader, lambda: 1)
    made._timer.stop()
    try:
        for period_ns in (0, 200 * MS, 0):
            made._set_interval(period_ns)
            heard.clear()
            began = time.monotonic_ns()
            for part in (b"one", b"two"):
                here.sendall(part)
                gevent.sleep(0.01)
            early = time.monotonic_ns() - began < 190 * MS
            assert not early or heard == ([] if period_ns else [b"one", b"two"])
            while b"".join(heard) != b"onetwo":
                assert time.monotonic_ns() - began < 20e9
                gevent.sleep(0.01)
            assert not period_ns or heard == [b"onetwo"] or not early
    finally:
        made.close()
        reader.close()
        here.close()
        there.close()


def test_where_there_is_no_timerfd_it_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.scenarios.client.timers._libc", object())
    rig = Rig(monkeypatch)
    rig.streams = 1000
    rig.rounds(100, MS)
    assert rig.pace._ready.active
    assert rig.periods == []
    rig.close()
