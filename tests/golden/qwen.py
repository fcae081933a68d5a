"""A measured run: Qwen3-32B on two RTX PRO 6000, 300 requests, vLLM 0.19."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harness.analysis.cost.split import Samples, token_mix

HERE = Path(__file__).parent
USD_PER_HOUR = 16.57216 / 2
"""Half of a g7e.24xlarge (four GPUs) at its on-demand list price in us-east-1."""

REQUESTS = np.genfromtxt(HERE / "qwen3_32b_requests.csv", delimiter=",", names=True)
TICKS = np.genfromtxt(HERE / "qwen3_32b_timeseries.csv", delimiter=",", names=True)
"""One row a second: t (its end), tokens in it, requests running and waiting at its end."""
SPAN_S = float(REQUESTS["last_token_s"].max() - REQUESTS["queued_s"].min())
USAGE = token_mix(float(REQUESTS["input_tokens"].sum()), None, float(REQUESTS["output_tokens"].sum()))


def samples() -> Samples:
    """The run as its server counted it, second by second."""
    running = TICKS["running"]
    return Samples(
        seconds=np.ones(len(TICKS)),
        uncached_input=TICKS["prompt_throughput"],
        cached_input=None,
        output=TICKS["gen_throughput"],
        steps=None,
        running=np.minimum(running, np.concatenate(([0.0], running[:-1]))),
        prefill_request_s=float((REQUESTS["first_token_s"] - REQUESTS["scheduled_s"]).sum()),
        decode_request_s=float((REQUESTS["last_token_s"] - REQUESTS["first_token_s"]).sum()),
    )
