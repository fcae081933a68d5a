"""Loads that others measured, on a simulated engine."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.simulator.clock import SimulatedReplica
from harness.cluster.simulator.scheduler import Sequence

Floats = npt.NDArray[np.float64]


def serve(
    engine: HardwareEngine, inputs: Items[int], outputs: Items[int], *, concurrency: int | None = None,
    sent_s: Items[float] = (),
) -> tuple[Floats, Floats, Floats]:  # fmt: skip
    """TTFT, TPOT and end of each request, s: of a closed loop of ``concurrency`` slots, or as they are sent."""
    n = len(inputs)
    replica = SimulatedReplica(engine.limits, engine.step_time)
    asked_s, first, ended_s = np.zeros(n), [0] * n, np.zeros(n)
    coming: list[tuple[float, int]] = []

    def send(k: int, at_s: float) -> None:
        asked_s[k] = at_s
        heapq.heappush(coming, (at_s + engine.arrival_s + engine.arrival_per_token_s * inputs[k], k))

    following = n if concurrency is None else min(concurrency, n)
    for k in range(following):
        send(k, 0.0 if concurrency is not None else sent_s[k])
    while coming or replica.next_s < math.inf:
        end_s = coming[0][0] if coming else math.inf
        while replica.next_s < end_s:
            replica.skip(end_s)
            now_s = replica.next_s
            if now_s >= end_s:
                break
            for sequence in replica.advance():
                first[sequence.number], ended_s[sequence.number] = sequence.first_step, now_s
                if following < n:
                    send(following, now_s)
                    following += 1
                    end_s = coming[0][0]
        if coming and coming[0][0] <= replica.next_s:
            at_s, k = heapq.heappop(coming)
            replica.submit(Sequence(k, inputs[k], outputs[k]), at_s)
    first_s = np.asarray(replica.step_end_s)[first]
    return first_s - asked_s, (ended_s - first_s) / np.maximum(np.asarray(outputs) - 1, 1), ended_s
