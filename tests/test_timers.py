"""Calls that come every so often: on time, together after a stall, again at once when asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import gevent
import gevent.monkey
import pytest

from harness.scenarios.client.timers import Ticker

MS = 1_000_000
hold_up = gevent.monkey.get_original("time", "sleep")


def fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(params=[True, False], ids=["timerfd", "libev"])
def ticker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ticker]:
    """Makes tickers, with and without a timerfd; their descriptors are given back."""
    if not request.param:
        monkeypatch.setattr("harness.scenarios.client.timers._libc", object())
    made: list[Ticker] = []

    def make(call: Callable[[], object]) -> Ticker:
        made.append(Ticker(call))
        assert made[-1].precise == request.param
        return made[-1]

    gevent.sleep(0)  # the loop's own descriptors are there
    before = fds()
    request.addfinalizer(lambda: [*(one.close() for one in made * 2), check(before)])
    return make


def wait_for(calls: list[int], n: int) -> None:
    deadline = time.monotonic() + 20
    while len(calls) < n:
        assert time.monotonic() < deadline, f"{len(calls)} of {n} calls"
        gevent.sleep(0.002)


def check(before: int) -> None:
    assert fds() == before


def test_a_call_each_period_until_it_is_stopped(ticker: Callable[..., Ticker]) -> None:
    calls: list[int] = []
    one = ticker(lambda: calls.append(time.monotonic_ns()))
    gevent.sleep(0.02)
    assert calls == []
    begin = time.monotonic_ns()
    one.every(10 * MS)
    wait_for(calls, 20)
    one.stop()
    assert all(at - begin >= (n * 10 - 1) * MS for n, at in enumerate(calls, 1)), "none before its time"
    stopped = len(calls)
    gevent.sleep(0.05)
    assert len(calls) == stopped
    one.every(10 * MS)
    wait_for(calls, stopped + 1)


def test_periods_that_end_while_the_loop_is_held_up_make_one_call(ticker: Callable[..., Ticker]) -> None:
    calls: list[int] = []
    one = ticker(lambda: calls.append(time.monotonic_ns()))
    one.every(20 * MS)
    hold_up(0.21)
    held_until = time.monotonic_ns()
    wait_for(calls, 1)
    gevent.sleep(0)
    assert sum(at < held_until + 5 * MS for at in calls) <= 2, "of ten periods"


@pytest.mark.parametrize("ticker", [True], indirect=True)
def test_a_call_that_is_not_done_is_made_again_at_once(ticker: Callable[..., Ticker]) -> None:
    calls: list[int] = []

    def call() -> bool:
        calls.append(time.monotonic_ns())
        return len(calls) < 6

    one = ticker(call)
    one.every(1000 * MS)
    wait_for(calls, 6)
    assert calls[-1] - calls[0] < 900 * MS


def test_a_call_may_change_its_period_and_end_it(ticker: Callable[..., Ticker]) -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(time.monotonic_ns())
        if len(calls) == 2:
            one.every(30 * MS)
        elif len(calls) == 4:
            one.stop()

    one = ticker(call)
    one.every(10 * MS)
    wait_for(calls, 4)
    gevent.sleep(0.1)
    assert len(calls) == 4
    assert calls[3] - calls[1] >= 58 * MS
