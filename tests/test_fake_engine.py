"""The laboratory's engine behind the fake server: in real time it does what it does in virtual time."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, FakeServer, StartServer, in_time, wait_for
from hypothesis import given
from hypothesis import strategies as st

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.fake.pacing import step_ms
from harness.cluster.engines.simulated import simulated_engine
from harness.cluster.simulator.blocks import block_keys
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.scheduler import Limits, Scheduler, Sequence
from harness.cluster.simulator.step_time import LinearStep

HANG_S = 120.0
"""Longer than anything here takes on a busy machine."""
ENDLESS = 100_000
STEP = ("--step", "8,0.6,0.01")
LINEAR = LinearStep(*(ms / 1000 for ms in step_ms(STEP[1])))


async def ask(url: str, at_s: float, prompt: int, tokens: int, **more: object) -> bytes:
    """One request on a connection of its own."""
    await asyncio.sleep(at_s)
    where = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    body = {"model": "fake", "prompt": [7] * prompt, "max_tokens": tokens, "stream": True, **more}
    raw = json.dumps(body).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
    try:
        return await reader.readuntil(b"0\r\n\r\n" if more.get("stream", True) else b"}}")
    finally:
        writer.close()


async def ask_all(url: str, plan: list[tuple[float, int, int]]) -> list[bytes]:
    return list(await asyncio.gather(*(ask(url, *one) for one in plan)))


def metrics(url: str) -> dict[str, float]:
    """By name without its labels."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=HANG_S) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name.split("{")[0]: float(value) for name, value in pairs}


def truth_of(server: FakeServer, n: int) -> list[dict[str, Any]]:
    """Of n answers, in the order in which the engine counted them."""
    wait_for(lambda: len(server.truth()) >= n, HANG_S, f"{n} lines of truth")
    return sorted(server.truth(), key=lambda row: row["came_ns"])


@pytest.mark.parametrize(
    ("slots", "batched_tokens", "ahead"), [(4, None, False), (4, 64, False), (4, 64, True)],
    ids=["whole prompts", "chunked prompts", "planned ahead"],
)  # fmt: skip
def test_real_and_virtual_time_agree(
    fake_server: StartServer, slots: int, batched_tokens: int | None, ahead: bool
) -> None:
    limits = Limits(max_num_seqs=slots, max_num_batched_tokens=batched_tokens, async_scheduling=ahead)
    more = [] if batched_tokens is None else ["--max-num-batched-tokens", str(batched_tokens)]
    more += ["--async-scheduling"] * ahead

    def play() -> dict[str, bool]:
        server = fake_server(*STEP, "--slots", str(slots), *more)
        counted, written, first = played_late_s(server, limits)
        return {
            f"a request was counted {counted} s late": counted == 0,
            f"a token was written {written} s late": written < 0.002,
            f"TTFT was off by {first} s": first < 0.002,
        }

    in_time(play, attempts=4)


def played_late_s(server: FakeServer, limits: Limits) -> tuple[float, ...]:
    """Play a workload and hold it, exactly, against virtual time; then, by how much things were late at the median.

    In order: that a request was counted after the kernel had it; that a token was written after it was due (TTFT is
    late by that of the first and TPOT by the difference of the last's and the first's over n - 1, so it bounds what a
    median of either is off by); and that TTFT was off, s.
    """
    rng = np.random.default_rng(15)
    n, rate = 80, 30.0  # some 80 % of what it can do, so that requests also wait
    arrivals = np.cumsum(rng.exponential(1 / rate, n)).tolist()
    plan = list(zip(arrivals, rng.integers(1, 150, n).tolist(), rng.geometric(1 / 10, n).tolist(), strict=True))
    asyncio.run(ask_all(server.url, plan))
    rows = truth_of(server, n)
    assert sorted((row["prompt_tokens"], row["tokens"]) for row in rows) == sorted((p, t) for _, p, t in plan)

    # The same requests in virtual time, from when they came.
    tokens = np.array([row["tokens"] for row in rows])
    load = Workload(
        arrival_s=np.array([row["came_ns"] for row in rows]) / 1e9,
        input_tokens=np.array([row["prompt_tokens"] for row in rows]), output_tokens=tokens,
    )  # fmt: skip
    virtual = simulate(load, limits, [LINEAR])
    assert metrics(server.url)["vllm:iteration_tokens_total_count"] == len(virtual.step_end_s[0])
    assert np.ptp(virtual.step_end_s[0][virtual.first_step] - load.arrival_s) > 0.02, "nobody waited: it proves little"
    for k, row in enumerate(rows):
        # each token at the end of the same step; 1 us is the rounding of float seconds many times over
        assert np.abs(np.array(row["due_ns"]) / 1e9 - virtual.token_s(k, tokens[k])).max() < 1e-6

    # A request counts from when the kernel had it, except where a step began before it could be read.
    late_ns = np.array([row["came_ns"] - row["received_ns"] for row in rows])
    assert late_ns.min() >= 0
    # Nothing is written before it is due.
    written_late = np.concatenate([np.array(row["chunk_ns"]) - row["due_ns"] for row in rows]) / 1e9
    assert written_late.min() > -1e-6
    ttft = np.array([row["chunk_ns"][0] - row["received_ns"] for row in rows]) / 1e9
    off = ttft - (virtual.first_token_s - virtual.due_s)
    return float(np.median(late_ns)) / 1e9, float(np.median(written_late)), float(np.median(np.abs(off)))


async def until(url: str, what: str, reached: Callable[[dict[str, float]], bool]) -> dict[str, float]:
    """The metrics once they say so."""
    end = time.monotonic() + HANG_S
    while not reached(found := await asyncio.to_thread(metrics, url)):
        assert time.monotonic() < end, f"{what}: {found}"
        await asyncio.sleep(0.01)
    return found


def queue(found: dict[str, float]) -> tuple[float, float]:
    return found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]


async def hung_up(asking: asyncio.Task[bytes]) -> None:
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


def test_the_books_are_vllms(fake_server: StartServer) -> None:
    server = fake_server("--step", "2,0,0", "--slots", "2")

    async def play() -> tuple[dict[str, float], dict[str, float]]:
        asking = [asyncio.create_task(ask(server.url, 0, 10, ENDLESS)) for _ in range(3)]
        during = await until(
            server.url, "two run", lambda m: queue(m) == (2, 1) and m["vllm:generation_tokens_total"] > 2
        )
        for one in asking:
            await hung_up(one)
        return during, await until(server.url, "none is left", lambda m: queue(m) == (0, 0))

    during, before = asyncio.run(play())
    assert during["vllm:prompt_tokens_total"] == 20, "of prompts that were read"
    assert during["vllm:generation_tokens_total"] < 2 * ENDLESS, "as they come, not when an answer is over"
    assert (before["vllm:request_success_total"], before["vllm:prompt_tokens_total"]) in ((0, 20), (0, 30))

    asyncio.run(ask_all(server.url, [(0, 10, 20)] * 3))
    after = metrics(server.url)
    moved = {name: after[name] - before[name] for name in after}
    assert queue(after) == (0, 0)
    assert (moved["vllm:prompt_tokens_total"], moved["vllm:generation_tokens_total"]) == (30, 60)
    assert moved["vllm:request_success_total"] == 3
    assert moved["vllm:iteration_tokens_total_count"] >= 40


def test_who_hangs_up_frees_the_slot(fake_server: StartServer) -> None:
    server = fake_server("--step", "10,0,0", "--slots", "1")

    async def play() -> None:
        going = asyncio.create_task(ask(server.url, 0, 5, ENDLESS))
        await until(server.url, "it goes on", lambda m: m["vllm:generation_tokens_total"] > 0)
        waiting = asyncio.create_task(ask(server.url, 0, 5, ENDLESS))
        await until(server.url, "the next one waits", lambda m: queue(m) == (1, 1))
        await hung_up(waiting)
        await until(server.url, "it waits no more", lambda m: queue(m) == (1, 0))
        last = asyncio.create_task(ask(server.url, 0, 5, 3))
        await until(server.url, "the last one waits", lambda m: queue(m) == (1, 1))
        await hung_up(going)
        assert b"[DONE]" in await asyncio.wait_for(last, HANG_S)

    asyncio.run(play())
    wait_for(lambda: len(server.truth()) == 3, HANG_S, "a line for each, those that hung up too")
    assert sorted(row["tokens"] > 0 for row in server.truth()) == [False, True, True]
    found = metrics(server.url)
    assert queue(found) == (0, 0)
    assert found["vllm:request_success_total"] == 1


@pytest.mark.parametrize(
    ("fault", "chunks"), [("bundle", 3), ("short", 3), ("cut", 2), ("error_event", 2), ("no_done", 6), ("crlf", 6)]
)
def test_faults_are_acted_out_by_steps(fake_server: StartServer, fault: str, chunks: int) -> None:
    server = fake_server("--step", "5,0,0", "--slots", "4")

    async def play() -> None:
        try:
            await asyncio.wait_for(ask(server.url, 0, 5, 6, fault=fault), HANG_S)
        except asyncio.IncompleteReadError:
            assert fault == "cut"

    asyncio.run(play())
    (row,) = truth_of(server, 1)
    assert len(row["due_ns"]) == chunks
    steps = 2 if fault == "bundle" else 1
    assert np.diff(row["due_ns"]) == pytest.approx(steps * 5e6, abs=1000)


def test_an_answer_in_one_piece_comes_with_its_last_token(fake_server: StartServer) -> None:
    server = fake_server("--step", "5,0,0")
    answer = asyncio.run(ask(server.url, 0, 5, 6, stream=False))
    assert b'"completion_tokens": 6' in answer
    (row,) = truth_of(server, 1)
    assert row["due_ns"][0] - row["came_ns"] == pytest.approx(6 * 5e6, abs=1000)


@pytest.mark.parametrize(
    "args",
    [
        ["--step", "20"],
        ["--step", "0,0,1"],
        ["--step", "1,1,nan"],
        ["--max-num-batched-tokens", "8"],
        ["--async-scheduling"],
    ],
)
def test_what_cannot_be_is_refused(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.cluster.engines.fake.server", *args],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and args[0].encode() in done.stderr


Act = tuple[str, int, int]
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 30), st.integers(1, 6)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
        st.tuples(st.just("drop waiting"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("drop reading"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("drop decoding"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("drop gone"), st.integers(0, 5), st.just(0)),
    ),
    min_size=25,
    max_size=80,
)


@given(ACTS, st.integers(1, 4), st.one_of(st.none(), st.integers(5, 20)))
def test_who_is_dropped_leaves_nothing_behind(acts: list[Act], slots: int, room: int | None) -> None:
    scheduler = Scheduler(Limits(max_num_seqs=slots, max_num_batched_tokens=room))
    tokens: dict[Sequence, int] = {}  # of everyone in flight, counted here
    gone: list[Sequence] = []
    dropped = number = 0

    def step() -> None:
        chunks, decoding, context = scheduler.begin()
        assert decoding + len(scheduler.reading) <= slots
        assert decoding == sum(n > 0 for n in tokens.values())
        assert context == sum(s.input_tokens + n for s, n in tokens.items() if n)
        if room is not None:
            assert sum(chunk.new for chunk in chunks) + decoding <= max(room, decoding)
        done = scheduler.end()
        for sequence in [s for s, n in tokens.items() if n or s.first_step >= 0]:
            tokens[sequence] += 1
        assert set(done) == {s for s, n in tokens.items() if n == s.output_tokens}
        for sequence in done:
            gone.append(sequence)
            del tokens[sequence]

    for act, index, outputs in acts:
        if act == "add":
            sequence = Sequence(number, index, outputs)
            number += 1
            scheduler.add(sequence)
            tokens[sequence] = 0
        elif act == "step":
            step()
        else:
            state = act.removeprefix("drop ")
            there = {
                "waiting": list(scheduler.waiting), "reading": scheduler.reading, "gone": gone,
                "decoding": sorted(scheduler.decoding, key=lambda s: s.number),
            }[state]  # fmt: skip
            if there:
                sequence = there[index % len(there)]
                scheduler.drop(sequence)
                dropped += tokens.pop(sequence, None) is not None
                gone.append(sequence)
        assert scheduler.in_flight == len(tokens)
        assert scheduler.context == sum(s.input_tokens + n for s, n in tokens.items() if n)
    for _ in range(2000):
        if not scheduler.in_flight:
            break
        step()
    assert (scheduler.in_flight, scheduler.context) == (0, 0)
    assert len(set(gone)) == number


def test_first_come_first_served_also_after_a_hang_up() -> None:
    scheduler = Scheduler(Limits(max_num_seqs=1))
    first, second, third = (Sequence(k, 0, 5) for k in range(3))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    order = []
    for gone in (first, second):
        scheduler.begin()
        scheduler.end()
        order.append([s.number for s in scheduler.decoding])
        scheduler.drop(gone)
    scheduler.begin()
    scheduler.end()
    order.append([s.number for s in scheduler.decoding])
    assert order == [[0], [1], [2]]
    assert all(b >= a for a, b in pairwise([first.first_step, second.first_step, third.first_step]))


def test_it_is_vllm_with_a_model_on_a_tier(fake_server: StartServer) -> None:
    server = fake_server("--simulate", "smollm2-135m", "aws-m7a.large", *STEP)
    rng = np.random.default_rng(3)
    lengths = zip(rng.integers(1, 900, 40).tolist(), rng.geometric(0.1, 40).tolist(), strict=True)
    asyncio.run(ask_all(server.url, [(0.02 * k, prompt, answer) for k, (prompt, answer) in enumerate(lengths)]))
    assert b"maximum context length is 8192" in asyncio.run(ask(server.url, 0, 8000, 300, stream=False))
    rows = truth_of(server, 40)
    engine = simulated_engine(get_model("smollm2-135m"), get_tier("aws-m7a.large"), LINEAR)
    assert engine.limits.block_size == 128 and engine.limits.prefix_cache
    tokens = np.array([row["tokens"] for row in rows])
    prompts = [row["prompt_tokens"] for row in rows]
    load = Workload(
        arrival_s=np.array([row["came_ns"] for row in rows]) / 1e9, input_tokens=np.array(prompts),
        output_tokens=tokens, keys=[block_keys([7] * n, 128) for n in prompts],
    )  # fmt: skip
    virtual = simulate(load, engine.limits, [LINEAR])
    for k, row in enumerate(rows):
        assert np.abs(np.array(row["due_ns"]) / 1e9 - virtual.token_s(k, tokens[k])).max() < 1e-6
    after = metrics(server.url)
    assert virtual.cached_tokens is not None
    assert after["vllm:prefix_cache_hits_total"] == virtual.cached_tokens.sum() > 0
    assert after["vllm:prefix_cache_queries_total"] == sum(prompts)
    assert (after["vllm:kv_cache_usage_perc"], after["vllm:num_preemptions_total"]) == (0, 0)
