"""Pauses between rounds of reading: only where they save something and hide nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from scenarios import pace
from scenarios.pace import MOST_NS, Pace

MS = 1_000_000


class Rig:
    """A pace over a reader and a clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pipe = os.pipe()
        self.events = self.shared = self.unstamped = self.now = self.streams = 0
        self.more = False
        self.set: list[int] = []
        monkeypatch.setattr(pace, "monotonic_ns", lambda: self.now)
        self.pace = Pace(self, lambda: self.streams)  # type: ignore[arg-type]
        monkeypatch.setattr(self.pace._timer, "set", self.set.append)

    def fileno(self) -> int:
        return self.pipe[0]

    def read(self) -> bool:
        return self.more

    def rounds(self, events: int, every_ns: int, n: int = 300, shared: float = 0) -> None:
        """So many rounds of reading, each of so many events, of which so many share a stamp."""
        for i in range(n):
            self.now += every_ns
            self.events += events
            self.shared += int((i + 1) * shared) - int(i * shared)
            self.pace._read()

    @property
    def waits(self) -> str:
        """What for: "bytes" or "time"."""
        ready, resume = self.pace._ready.active, self.pace._resume.active
        assert ready != resume, "for one of both, always"
        return "bytes" if ready else "time"


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    made.pace.close()
    for fd in made.pipe:
        os.close(fd)


@pytest.mark.parametrize(
    ("streams", "events", "every_ns", "pause_ms"),
    [
        pytest.param(1000, 40, MS // 2, 2, id="a thousand streams of 80 tokens/s: a fifth of 12.5 ms is more than 2"),
        pytest.param(400, 40, MS // 2, 1, id="of 200 tokens/s: a fifth of 5 ms"),
        pytest.param(100, 40, MS // 2, None, id="of 800 tokens/s: two tokens of a stream would share a stamp"),
        pytest.param(8, 400, MS, None, id="a few streams as fast as they can"),
        pytest.param(1000, 2, MS, None, id="slow streams: there is nothing to save"),
        pytest.param(0, 40, MS // 2, None, id="bytes for nobody"),
    ],
)
def test_a_pause_is_a_fifth_of_the_gap_between_tokens(
    rig: Rig, streams: int, events: int, every_ns: int, pause_ms: float | None
) -> None:
    rig.streams = streams
    rig.rounds(events, every_ns)
    assert rig.waits == ("time" if pause_ms else "bytes")
    if pause_ms:
        assert rig.set[-1] - rig.now == pytest.approx(pause_ms * MS, rel=0.02)
        assert rig.set[-1] - rig.now <= MOST_NS


def test_it_reads_at_once_again_when_less_comes(rig: Rig) -> None:
    rig.streams = 1000
    rig.rounds(100, MS)
    assert rig.waits == "time"
    rig.rounds(1, 2 * MS, 40)
    assert rig.waits == "time", "a lull is no reason"
    rig.rounds(1, 2 * MS, 70)
    assert rig.waits == "bytes"
    rig.rounds(100, MS)
    assert rig.waits == "time"


def test_a_round_in_parts_is_one_round(rig: Rig) -> None:
    """The reader comes back in between so that requests can go out; its last part may be small."""
    rig.streams = 1000
    rig.rounds(100, MS)
    for more, events in ((True, 64), (True, 64), (False, 3)):
        rig.more = more
        set_before = len(rig.set)
        rig.rounds(events, MS // 4, 1)
        assert rig.waits == "time"
        assert len(rig.set) - set_before == (not more), "what is due stays due"


def test_without_stamps_of_the_kernel_there_is_no_pause(rig: Rig) -> None:
    """A stamp would be the time of the read, which a pause makes later."""
    rig.streams = 1000
    rig.rounds(100, MS)
    assert rig.waits == "time"
    rig.unstamped += 1
    rig.rounds(100, MS, 102)
    assert rig.waits == "bytes"
    rig.rounds(100, MS, 202)
    assert rig.waits == "time"


def test_pauses_get_shorter_until_events_hardly_ever_share_a_stamp(rig: Rig) -> None:
    """Some streams are faster than the mean says."""
    rig.streams = 1000
    pauses = []
    for _ in range(300):
        # As if 5 % of the streams had tokens 1.2 ms apart: a longer pause joins some of them.
        pause_ns = rig.set[-1] - rig.now if rig.set and rig.waits == "time" else 0
        rig.rounds(100, MS, 102, shared=max(pause_ns - 1.2 * MS, 0) / MS)
        pauses.append(pause_ns / MS)
    assert max(pauses[20:]) < 1.2 + 0.2 + 3 * 0.125, "what is rare, and a step or two"
    assert 0.7 < sum(pauses[20:]) / len(pauses[20:]) < 1.2, "no longer, and not given up"
    rig.rounds(100, MS, 102 * 20, shared=1)
    assert rig.waits == "bytes"
    rig.rounds(100, MS, 102 * 20)
    assert rig.set[-1] - rig.now == MOST_NS


def test_where_there_is_no_timerfd_it_reads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scenarios.alarm._libc", object())
    rig = Rig(monkeypatch)
    rig.streams = 1000
    rig.rounds(100, MS)
    assert rig.pace._ready.active
    assert rig.set == []
    rig.pace.close()
