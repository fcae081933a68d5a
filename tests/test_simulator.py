"""The engine of known truth: small cases by hand, laws that hold for all, and the same result twice."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.cluster.simulator.blocks import KVCache, block_keys
from harness.cluster.simulator.clock import SimulatedReplica
from harness.cluster.simulator.fleet import Outcomes, Workload, simulate
from harness.cluster.simulator.scheduler import Limits, Scheduler, Sequence
from harness.cluster.simulator.step_time import Chunk, LinearStep, NoisyStep, PaddedStep, StepTime
from harness.cluster.simulator.vllm_limits import graph_sizes
from tests.simulator_cases import digest

STEP = LinearStep(base_s=0.020, per_sequence_s=0.0015, per_prompt_token_s=0.00002)
EIGHT = Limits(max_num_seqs=8)


def workload(arrivals: list[float], inputs: list[int], outputs: list[int], **more: object) -> Workload:
    return Workload(
        arrival_s=np.array(arrivals), input_tokens=np.array(inputs), output_tokens=np.array(outputs), **more
    )  # type: ignore[arg-type]


def test_one_request_alone_by_hand() -> None:
    found = simulate(workload([1.0], [100], [3]), EIGHT, [STEP])
    # the prompt: 20 + 1.5 + 100 x 0.02 ms; then two steps of 20 + 1.5 ms
    assert found.first_token_s[0] == pytest.approx(1.0 + 0.0235)
    assert found.finished_s[0] == pytest.approx(1.0 + 0.0235 + 2 * 0.0215)
    assert found.token_s(0, 3) == pytest.approx([1.0235, 1.0450, 1.0665])


def test_who_comes_while_a_step_runs_waits_for_its_end() -> None:
    found = simulate(workload([0.0, 0.001], [0, 0], [2, 1]), EIGHT, [STEP])
    # first step 21.5 ms; in the second, two sequences: 23 ms
    assert found.first_token_s.tolist() == pytest.approx([0.0215, 0.0445])
    assert found.finished_s.tolist() == pytest.approx([0.0445, 0.0445])


def test_the_ninth_waits_for_a_slot() -> None:
    found = simulate(workload([0.0] * 9, [0] * 9, [2] * 9), EIGHT, [STEP])
    step_s = 0.020 + 8 * 0.0015
    assert found.finished_s[:8] == pytest.approx([2 * step_s] * 8)
    assert found.first_token_s[8] == pytest.approx(2 * step_s + 0.0215)


def test_a_token_bound_cuts_a_prompt_into_chunks() -> None:
    scheduler = Scheduler(Limits(max_num_seqs=8, max_num_batched_tokens=100))
    scheduler.add(Sequence(0, 150, 2))
    scheduler.add(Sequence(1, 80, 1))
    assert scheduler.begin() == ([Chunk(100, 0)], 0, 0)
    assert scheduler.end() == []
    assert scheduler.begin() == ([Chunk(50, 100), Chunk(50, 0)], 0, 0)
    scheduler.end()
    # the first decodes now, with one token of the bound; its context is its prompt and its first token
    assert scheduler.begin() == ([Chunk(30, 50)], 1, 151)
    assert [s.number for s in scheduler.end()] == [0, 1]
    assert (scheduler.in_flight, scheduler.context) == (0, 0)


def test_a_session_waits_for_the_answer_before() -> None:
    found = simulate(
        workload([0.0, 0.01, 9.0], [0, 0, 0], [1, 1, 1], after=np.array([-1, 0, 1]), think_s=np.full(3, 1.0)),
        EIGHT, [STEP],
    )  # fmt: skip
    assert found.due_s.tolist() == pytest.approx([0.0, 0.0215 + 1.0, 9.0])


def test_a_closed_loop_keeps_its_slots() -> None:
    found = simulate(workload([0.0] * 100, [50] * 100, [5] * 100), EIGHT, [STEP], concurrency=3)
    order = np.argsort(found.due_s, kind="stable")
    for k in order[3:-3]:  # the last leave slots free
        now = found.due_s[k]
        assert np.sum((found.due_s <= now) & (found.finished_s > now)) == 3


def test_what_the_end_cuts_off_is_not_known() -> None:
    found = simulate(workload([0.0, 0.0, 5.0], [0, 0, 0], [3, 100, 1]), EIGHT, [STEP], until_s=1.0)
    assert np.isfinite(found.finished_s).tolist() == [True, False, False]
    assert np.isfinite(found.due_s).tolist() == [True, True, False]
    assert 30 < len(found.token_s(1, 100)) < 100


def test_the_shortest_queue_is_joined() -> None:
    found = simulate(
        workload([0.0, 0.0, 0.001, 0.002], [0] * 4, [100, 1, 1, 1]), Limits(max_num_seqs=1), [STEP, STEP],
        router="least in flight",
    )  # fmt: skip
    # the second is served when the third comes, and not before its step has ended
    assert found.replica.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("bad", [workload([1.0, 0.0], [0, 0], [1, 1]), workload([0.0], [0], [0])])
def test_a_workload_out_of_order_is_refused(bad: Workload) -> None:
    with pytest.raises(ValueError, match=r"order| out"):
        simulate(bad, EIGHT, [STEP])


def by_steps(load: Workload, slots: int) -> Outcomes:
    """The same engine again, written as plainly as can be: every sequence is looked at in every step."""
    waiting, running, now, steps = [], {}, 0.0, []
    n, due = len(load), load.arrival_s
    first, last, coming = np.full(n, np.nan), np.full(n, np.nan), 0
    while coming < n or waiting or running:
        if not waiting and not running:
            now = max(now, due[coming])
        while coming < n and due[coming] <= now:
            waiting.append(coming)
            coming += 1
        begun = []
        while waiting and len(running) + len(begun) < slots:
            begun.append(waiting.pop(0))
        batch = len(running) + len(begun)
        now += 0.020 + 0.0015 * batch + 0.00002 * sum(int(load.input_tokens[k]) for k in begun)
        steps.append(now)
        for k in [*running, *begun]:
            running[k] = running.get(k, 0) + 1
            if running[k] == 1:
                first[k] = now
            if running[k] == load.output_tokens[k]:
                last[k] = now
                del running[k]
    none = np.full(n, -1)
    return Outcomes(
        due_s=due, first_token_s=first, finished_s=last, replica=none, first_step=none, step_end_s=[np.array(steps)]
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.floats(1.0, 40.0))
def test_it_is_the_plain_engine(seed: int, slots: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    load = Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate, 120)), input_tokens=rng.integers(0, 500, 120),
        output_tokens=rng.geometric(0.1, 120),
    )  # fmt: skip
    plain, found = by_steps(load, slots), simulate(load, Limits(max_num_seqs=slots), [STEP])
    assert found.first_token_s == pytest.approx(plain.first_token_s, abs=1e-9)
    assert found.finished_s == pytest.approx(plain.finished_s, abs=1e-9)


def test_noise_is_the_seeds_and_has_mean_one() -> None:
    draws = [NoisyStep(STEP, 0.2, seed)([], 1, 0) for seed in range(4000)]
    assert np.mean(draws) == pytest.approx(0.0215, rel=0.02) and np.std(np.log(draws)) == pytest.approx(0.2, rel=0.1)
    load = workload([0.0] * 20, [50] * 20, [5] * 20)
    once, again = (simulate(load, EIGHT, [NoisyStep(STEP, 0.2, 7)]) for _ in range(2))
    assert np.array_equal(once.finished_s, again.finished_s)


def test_noise_is_the_gauss_of_the_standard_library() -> None:
    step, draw = NoisyStep(STEP, 0.3, 11), random.Random(11).gauss
    assert [step([], 2, 0) for _ in range(50)] == [0.023 * math.exp(draw(-(0.3**2) / 2, 0.3)) for _ in range(50)]


def test_work_is_that_of_vllm_by_hand() -> None:
    """Worked out by hand and said by vLLM itself: 10 ms + 0.1 ms a prompt token + 1 ms a decode + 0.1 us a token."""
    load = workload([0.0, 0.001, 0.020], [100, 30, 50], [5, 8, 3])
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=64, kv_blocks=40)
    work: list[tuple[list[Chunk], int, int]] = []

    def step(chunks: list[Chunk], decoding: int, context: int) -> float:
        work.append((list(chunks), decoding, context))
        return 0.010 + 0.0001 * sum(chunk.new for chunk in chunks) + 0.001 * decoding + 1e-7 * context

    found = simulate(load, limits, [step])  # type: ignore[list-item]
    assert [chunks for chunks, _, _ in work[:3]] == [
        [Chunk(64, 0)],
        [Chunk(36, 64), Chunk(28, 0)],
        [Chunk(2, 28), Chunk(50, 0)],
    ]
    assert found.step_end_s[0][:4] == pytest.approx([0.0164, 0.0328, 0.0490101, 0.0620285])


def test_a_sequence_that_was_thrown_out_has_all_its_tokens() -> None:
    # 4 blocks of 4: two prompts of 7 fit, and the second needs a block when the first has taken the last
    limits = Limits(max_num_seqs=4, kv_blocks=5, block_size=4)
    found = simulate(workload([0.0, 0.0], [7, 7], [8, 8]), limits, [STEP])
    assert found.resumed.keys() == {1}
    times = [found.token_s(k, 8) for k in (0, 1)]
    assert [len(one) for one in times] == [8, 8] and all(np.all(np.diff(one) > 0) for one in times)
    assert [one[-1] for one in times] == found.finished_s.tolist()
    had, step = found.resumed[1][0]
    assert times[1][had] == found.step_end_s[0][step] and np.diff(times[1]).max() > 3 * STEP.base_s


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("blocks", [None, 300])
def test_an_equal_prefix_is_read_once(ahead: bool, blocks: int | None) -> None:
    keys = block_keys(list(range(64)), 16)
    load = workload([0.0, 1.0, 2.0], [70, 64, 80], [3, 3, 3], keys=[keys, keys, keys[:2]])
    read: list[int] = []

    def step(chunks: list[Chunk], decoding: int, context: int) -> float:
        read.extend(chunk.new for chunk in chunks)
        return 0.01

    limits = Limits(max_num_seqs=4, kv_blocks=blocks, prefix_cache=True, async_scheduling=ahead)
    simulate(load, limits, [step])  # type: ignore[list-item]
    assert read == [70, 16, 48]  # the last block of a prompt that is all there is read again


def test_a_step_is_planned_while_the_one_before_it_runs() -> None:
    load = workload([0.0, 0.001, 0.030], [10, 10, 10], [4, 2, 1])
    plain, ahead = (
        simulate(load, Limits(max_num_seqs=2, async_scheduling=ahead), [LinearStep(0.010, 0.0, 0.0)])
        for ahead in (False, True)
    )
    assert plain.first_token_s == pytest.approx([0.010, 0.020, 0.040])
    # the second comes when the second step is planned already; the third, too, when the fourth is
    assert ahead.first_token_s == pytest.approx([0.010, 0.030, 0.050])


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="KV cache holds 64 tokens"):
        simulate(workload([0.0], [60], [6]), Limits(max_num_seqs=1, kv_blocks=4), [STEP])
    with pytest.raises(ValueError, match="at least max_num_seqs"):
        Limits(max_num_seqs=64, max_num_batched_tokens=32, kv_blocks=4)


def test_nine_sequences_cost_a_graph_of_sixteen() -> None:
    sizes = graph_sizes(Limits(max_num_seqs=256, max_num_batched_tokens=2048), compute_capability=9)
    step = PaddedStep(STEP, sizes)
    assert step([], 9, 900) == STEP([], 16, 900) and step([], 513, 9) == STEP([], 513, 9)
    assert step([Chunk(9, 0)], 9, 900) == STEP([Chunk(9, 0)], 9, 900)


def random_engine(seed: int) -> Callable[[], Outcomes]:
    """A workload on an engine with its limits, a step time and a router of their own; served anew by every call."""
    rng = np.random.default_rng([seed, 19])
    n, kind = int(rng.integers(20, 120)), seed % 3
    inputs = np.full(n, 100) if rng.integers(0, 2) else rng.integers(0, 400, n)
    outputs = rng.integers(1, int(rng.choice([5, 60, 400])), n)
    keys = None
    if rng.integers(0, 2):
        texts = zip(rng.integers(0, 5, n).tolist(), (inputs + outputs).tolist(), rng.integers(0, 30, n), strict=True)
        keys = [[(text, j) for j in range(min(length // 16, shared))] for text, length, shared in texts]
    waits = kind == 1
    load = Workload(
        arrival_s=np.cumsum(rng.exponential(float(rng.choice([0.01, 0.3, 3.0])), n)), input_tokens=inputs,
        output_tokens=outputs, after=np.where(rng.integers(0, 2, n) == 1, np.arange(n) - 1, -1) if waits else None,
        think_s=rng.integers(0, 300, n) / 1000 if waits else None, keys=keys,
    )  # fmt: skip
    seats = int(rng.integers(1, 20))
    blocks = int((inputs + outputs).max()) // 16 + 1 + int(rng.integers(0, 60)) if rng.integers(0, 2) else None
    limits = Limits(
        max_num_seqs=seats, max_num_batched_tokens=int(rng.integers(seats, 512)), kv_blocks=blocks,
        prefix_cache=bool(rng.integers(0, 2)), async_scheduling=bool(rng.integers(0, 2)),
    )  # fmt: skip
    step = LinearStep(base_s=0.02, per_sequence_s=0.0015, per_prompt_token_s=0.00002, per_context_token_s=1e-7)
    kind_of_step, replicas = int(rng.integers(0, 4)), int(rng.integers(1, 4))
    steps: list[Callable[[], StepTime]] = [
        lambda: step, lambda: PaddedStep(step, [1, 2, 4, 8, 16]), lambda: NoisyStep(step, 0.1, seed),
        lambda: PaddedStep(NoisyStep(step, 0.1, seed), [1, 2, 4, 8, 16]),
    ]  # fmt: skip
    asked = {
        "router": "least in flight" if rng.integers(0, 2) else "round robin",
        "concurrency": int(rng.integers(1, 20)) if kind == 2 else None,
        "until_s": 20.0 if rng.integers(0, 5) == 0 else math.inf,
        "sample_s": 1.0 if rng.integers(0, 2) else None,
    }
    return lambda: simulate(load, limits, [steps[kind_of_step]() for _ in range(replicas)], **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("seeds", [range(k, k + 20) for k in range(0, 120, 20)], ids=str)
def test_steps_that_are_skipped_are_those_gone_through_one_by_one(
    seeds: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = [random_engine(seed) for seed in seeds]
    skipped = [one() for one in served]
    monkeypatch.setattr(SimulatedReplica, "skip", lambda self, before_s: None)
    for seed, one, found in zip(seeds, served, skipped, strict=True):
        plain = one()
        assert digest(found) == digest(plain), seed
        assert (found.resumed, found.samples) == (plain.resumed, plain.samples), seed


def test_steps_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, engine = [], SimulatedReplica.advance
    monkeypatch.setattr(SimulatedReplica, "advance", lambda self: (asked.append(1), engine(self))[1])
    limits = Limits(max_num_seqs=8, max_num_batched_tokens=512, kv_blocks=2000, async_scheduling=True)
    found = simulate(workload([0.0, 100.0], [300, 300], [3000, 3000]), limits, [STEP])
    assert len(found.step_end_s[0]) == 6000 and len(asked) < 40


def test_turns_of_a_session_go_to_one_replica() -> None:
    load = workload([0.0, 0.1, 0.2, 0.3], [0] * 4, [1] * 4, session=np.array([5, 4, 5, 4]))
    assert simulate(load, EIGHT, [STEP, STEP], router="session").replica.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="session"):
        simulate(workload([0.0], [0], [1]), EIGHT, [STEP, STEP], router="session")


def test_a_prompt_goes_where_most_of_it_was_sent() -> None:
    keys = [["a", "b"], ["c"], ["a", "d"], ["a", "d"], ["e"], ["c", "f"]]
    load = workload([0.1 * k for k in range(6)], [40] * 6, [100] * 6, keys=keys)
    limits = Limits(max_num_seqs=8, prefix_cache=True)
    found = simulate(load, limits, [STEP, STEP], router="prefix")
    # the fifth, unknown, joins the shorter queue
    assert found.replica.tolist() == [0, 1, 0, 0, 1, 1]
    assert found.cached_tokens is not None and found.cached_tokens.tolist() == [0, 0, 16, 32, 0, 16]


def test_a_router_that_asks_seldom_sends_all_to_one() -> None:
    load = workload([0.0, 0.2, 0.4, 1.1, 1.2], [0] * 5, [400] * 5)
    found = simulate(load, EIGHT, [STEP, STEP], router="least in flight", stale_s=1.0)
    assert found.replica.tolist() == [0, 0, 0, 1, 1]
    assert simulate(load, EIGHT, [STEP, STEP], router="least in flight").replica.tolist() == [0, 1, 0, 1, 0]


def test_the_engine_gets_a_request_after_its_delay() -> None:
    load = workload([0.0, 0.01], [0, 0], [1, 1], delay_s=np.array([0.5, 0.1]))
    found = simulate(load, EIGHT, [STEP])
    assert found.due_s.tolist() == [0.0, 0.01]
    assert found.first_token_s.tolist() == pytest.approx([0.5 + 0.0215, 0.11 + 0.0215])


def test_samples_say_who_runs_and_what_is_free() -> None:
    limits = Limits(max_num_seqs=1, max_num_batched_tokens=512, kv_blocks=100)
    found = simulate(workload([0.0, 0.5], [160, 16], [100, 1]), limits, [STEP], sample_s=1.0)
    first = found.samples[0][0]
    assert (first.at_s, first.running, first.waiting) == (1.0, 1, 1)
    # 10 blocks of the prompt, and those of the answers of the steps so far and of the one in progress
    assert first.kv_free == 100 - math.ceil((160 + first.steps) / 16)
    assert found.samples[0][-1].running == found.samples[0][-1].waiting == 0


def test_a_prefix_is_found_up_to_the_first_block_that_is_gone() -> None:
    cache = KVCache(3)
    cache.take(3)
    blocks = [cache.remember(key) for key in "abc"]
    cache.give_back(0, [blocks[1]])
    cache.take(1)  # what nobody uses makes room
    assert cache.find("abc") == [blocks[0]]
