"""The simulator's scheduler against vLLM's own, step by step: ``python -m tests.vllm_oracle [--draws N] [--seed S]``.

vLLM's `Scheduler` and `AsyncScheduler` run on the CPU without weights: a made-up answer of the model ends each step.
Both sides serve the same random requests and must agree in every step: who is read or decodes, how many tokens of whom,
from what the prefix cache held, and how many blocks are free. Importing vLLM takes 15 s, so this is a process of its
own. It prints a summary as JSON and leaves with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
import vllm
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from harness.cluster.simulator import scheduler as ours
from harness.cluster.simulator.blocks import block_keys
from harness.cluster.simulator.fleet import Workload, simulate
from harness.cluster.simulator.step_time import Chunk, LinearStep
from tests.vllm_limits_oracle import limits_differ

STEP = LinearStep(0.010, 0.001, 0.0001, 0.0000001)
MAX_LEN = 4096
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 128,
    "max_position_embeddings": MAX_LEN, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a workload, with the answer that the made-up model gives."""

    arrival_s: float
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A workload and the engine that serves it."""

    limits: ours.Limits
    requests: list[Request]
    aborts: dict[int, int]
    """Requests whose clients hang up, by the step after whose end they do. `simulate` is not asked of such a case."""


There = dict[int, tuple[int, int]]
"""Of each sequence in a step, by number: new tokens, and those that the KV cache held already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one side planned."""

    there: There
    decoding: int
    free: int
    """Blocks, after the plan."""
    step_s: float


class Side(Protocol):
    """A scheduler, as the clock here asks it."""

    def add(self, number: int, request: Request) -> None:
        """A request comes."""

    def plan(self) -> Step | None:
        """The next step; None: there is nothing to do."""

    def end(self, now_s: float) -> None:
        """The first of the steps in progress ends."""

    def abort(self, number: int) -> None:
        """A client hangs up, if its request has come and is not over."""


def draw(seed: int) -> Case:
    """Sizes so that often blocks are few, seats are few, and prompts begin alike."""
    rng = np.random.default_rng([seed, 19])
    n = int(rng.integers(5, 60))
    budget = int(rng.choice([32, 64, 128, 256]))
    seqs = int(rng.choice([2, 4, 8, 16, 32]))
    cached = bool(rng.integers(0, 4))
    size = int(rng.choice([4, 8, 16]))
    stems = [rng.integers(0, 100, int(rng.integers(1, 130))).tolist() for _ in range(int(rng.integers(1, 5)))]
    gap_s = float(rng.choice([0.002, 0.02, 0.05, 0.2]))
    requests: list[Request] = []
    now_s = 0.0
    for _ in range(n):
        now_s += float(rng.exponential(gap_s)) if rng.integers(0, 4) else 0.0  # some come together
        kind = rng.integers(0, 4) if cached else 0
        stem: list[int] = []
        if kind == 1:
            stem = stems[int(rng.integers(0, len(stems)))]
        elif kind == 2 and requests:  # the next turn of an earlier one
            before = requests[int(rng.integers(0, len(requests)))]
            stem = (before.prompt + before.answer)[:500]
        elif kind == 3 and requests:  # the same prompt again
            stem = requests[int(rng.integers(0, len(requests)))].prompt
        new = [] if kind == 3 and stem else rng.integers(0, 100, int(rng.integers(1, 150))).tolist()
        # few different answers, so that two sequences also fill equal blocks while they decode
        answer = rng.integers(0, 2 if kind == 3 else 100, int(rng.integers(1, 60))).tolist()
        requests.append(Request(arrival_s=now_s, prompt=stem + new, answer=answer))
    need = max(-(-(len(one.prompt) + len(one.answer)) // size) for one in requests)
    limits = ours.Limits(
        max_num_seqs=seqs, max_num_batched_tokens=max(budget, seqs),
        kv_blocks=need + int(rng.choice([0, 2, 6, 20, 60, 2000])), block_size=size, prefix_cache=cached,
        async_scheduling=bool(rng.integers(0, 2)),
    )  # fmt: skip
    steps = rng.integers(0, 40, n) if rng.integers(0, 4) == 0 else []
    return Case(limits=limits, requests=requests, aborts={int(step): k for k, step in enumerate(steps)})


class Ours:
    """The simulator's scheduler."""

    def __init__(self, case: Case) -> None:
        self.limits = case.limits
        self.engine = ours.Scheduler(case.limits)
        self.sequences: dict[int, ours.Sequence] = {}
        self.token_s: dict[int, list[float]] = {}

    def add(self, number: int, request: Request) -> None:
        self.sequences[number] = ours.Sequence(
            number, len(request.prompt), len(request.answer), keys=keys(self.limits, request)
        )
        self.token_s[number] = []
        self.engine.add(self.sequences[number])

    def plan(self) -> Step | None:
        engine = self.engine
        held = {s: s.to_read + engine.begun - s.since - 1 for s in engine.decoding}
        before = {s: (s.read, s.given) for s in (*held, *engine.reading, *engine.waiting)}
        number = engine.begun
        chunks, decoding, context = engine.begin()
        if engine.begun == number:
            return None
        there = {s.number: (1, done) for s, done in held.items() if before[s] == (s.read, s.given)}
        read = [s.number for s in engine.running if s in before and before[s] != (s.read, s.given)]
        assert (len(there), context) == (decoding, sum(done + 1 for _, done in there.values()))
        there |= {k: (chunk.new, chunk.done) for k, chunk in zip(read, chunks, strict=True)}
        assert engine.kv_free is not None
        return Step(there=there, decoding=decoding, free=engine.kv_free, step_s=STEP(chunks, decoding, context))

    def end(self, now_s: float) -> None:
        for sequence, tokens in self.engine.tokens_given():
            self.token_s[sequence.number].append(now_s)
            assert tokens == len(self.token_s[sequence.number])
        self.engine.end()

    def abort(self, number: int) -> None:
        if number in self.sequences:
            self.engine.drop(self.sequences[number])


class Vllm:
    """vLLM's scheduler, and a model whose answers are known beforehand."""

    def __init__(self, case: Case, model: str) -> None:
        self.case, limits = case, case.limits
        assert limits.kv_blocks is not None and limits.max_num_batched_tokens is not None
        blocks = limits.kv_blocks + 1  # one is vLLM's own
        cache = CacheConfig(block_size=limits.block_size, enable_prefix_caching=limits.prefix_cache)
        cache.num_gpu_blocks = blocks
        config = VllmConfig(
            model_config=ModelConfig(model=model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=MAX_LEN),
            scheduler_config=SchedulerConfig(
                max_num_batched_tokens=limits.max_num_batched_tokens, max_num_seqs=limits.max_num_seqs,
                max_model_len=MAX_LEN, is_encoder_decoder=False, enable_chunked_prefill=True,
                async_scheduling=limits.async_scheduling,
            ),
            cache_config=cache, device_config=DeviceConfig("cpu"),
        )  # fmt: skip
        spec = FullAttentionSpec(block_size=limits.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        kv = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["l"], spec)])
        kind = AsyncScheduler if limits.async_scheduling else VllmScheduler
        self.engine = kind(
            vllm_config=config, kv_cache_config=kv, structured_output_manager=StructuredOutputManager(config),
            block_size=limits.block_size, log_stats=False,
        )  # fmt: skip
        self.hasher = get_request_block_hasher(limits.block_size, sha256) if limits.prefix_cache else None
        self.requests: dict[str, Any] = {}
        self.flying: deque[tuple[Any, list[str], list[bool]]] = deque()
        self.decodes: dict[str, int] = {}
        """Whose prompt was read to its end, and how often it had been thrown out then."""
        self.token_s: dict[int, list[float]] = {}

    @property
    def preemptions(self) -> int:
        return sum(one.num_preemptions for one in self.requests.values())

    def add(self, number: int, request: Request) -> None:
        self.requests[str(number)] = VllmRequest(
            request_id=str(number), prompt_token_ids=list(request.prompt), pooling_params=None,
            sampling_params=SamplingParams(max_tokens=len(request.answer), ignore_eos=True), block_hasher=self.hasher,
        )  # fmt: skip
        self.token_s[number] = []
        self.engine.add_request(self.requests[str(number)])

    def plan(self) -> Step | None:
        said = self.engine.schedule()
        if not said.total_num_scheduled_tokens:
            # an empty step takes no time: where no other is in progress, vLLM plans again at once
            return self.plan() if not self.flying and self.engine.has_unfinished_requests() else None
        there: There = {}
        chunks: list[Chunk] = []
        decoding = context = 0
        samples: list[bool] = []
        for name, new in said.num_scheduled_tokens.items():
            request = self.requests[name]
            done = request.num_computed_tokens - new  # `schedule` has counted them already
            there[int(name)] = (new, done)
            if self.decodes.get(name) == request.num_preemptions:
                decoding, context = decoding + 1, context + done + 1
            else:
                chunks.append(Chunk(new, done))
            if not request.is_prefill_chunk:
                self.decodes[name] = request.num_preemptions
            samples.append(not request.is_prefill_chunk)
        self.flying.append((said, list(said.num_scheduled_tokens), samples))
        free = self.engine.kv_cache_manager.block_pool.get_num_free_blocks()
        return Step(there=there, decoding=decoding, free=free, step_s=STEP(chunks, decoding, context))

    def end(self, now_s: float) -> None:
        said, names, samples = self.flying.popleft()
        tokens = []
        for name, sampled in zip(names, samples, strict=True):
            given = self.token_s[int(name)]
            tokens.append([self.case.requests[int(name)].answer[len(given)]] if sampled else [])
            if sampled:
                given.append(now_s)
        answer = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: k for k, name in enumerate(names)}, sampled_token_ids=tokens,
            logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
        )  # fmt: skip
        self.engine.update_from_output(said, answer)

    def abort(self, number: int) -> None:
        if str(number) in self.engine.requests:
            self.engine.finish_requests(str(number), RequestStatus.FINISHED_ABORTED)


def keys(limits: ours.Limits, request: Request) -> list[int]:
    return block_keys(request.prompt + request.answer, limits.block_size) if limits.prefix_cache else []


def drive(side: Side, case: Case) -> list[tuple[float, Step]]:
    """Every step with its end, on vLLM's loops: `EngineCore.step`, and `step_with_batch_queue` with a queue of two."""
    steps: list[tuple[float, Step]] = []
    coming = deque(enumerate(case.requests))
    ahead: Step | None = None
    now_s = 0.0
    while True:
        while coming and coming[0][1].arrival_s <= now_s:
            side.add(*coming.popleft())
        step = ahead or side.plan()
        if step is None:
            if not coming:
                return steps
            now_s = coming[0][1].arrival_s
            continue
        ahead = side.plan() if case.limits.async_scheduling else None
        now_s += step.step_s
        steps.append((now_s, step))
        side.end(now_s)
        if (gone := case.aborts.get(len(steps))) is not None:
            side.abort(gone)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One workload on both sides."""

    seed: int
    limits: ours.Limits
    steps: int
    aborts: int
    preemptions: int
    hit_tokens: int
    """That a prompt found in the prefix cache."""
    differs: str
    """The first difference; empty: none."""


def compare(seed: int, model: str) -> Compared:
    """Serve one workload on both sides, and by `simulate`."""
    case = draw(seed)
    theirs, mine = Vllm(case, model), Ours(case)
    expected, found = drive(theirs, case), drive(mine, case)
    differs = ""
    if mine.engine.preemptions != theirs.preemptions:
        differs = f"{mine.engine.preemptions} preemptions, vLLM {theirs.preemptions}"
    for k, (one, other) in enumerate(zip_longest(found, expected)):
        if one != other:
            differs = f"step {k}: {one}, vLLM {other}"
            break
    load = Workload(
        arrival_s=np.array([one.arrival_s for one in case.requests]),
        input_tokens=np.array([len(one.prompt) for one in case.requests]),
        output_tokens=np.array([len(one.answer) for one in case.requests]),
        keys=[keys(case.limits, one) for one in case.requests],
    )  # fmt: skip
    served = simulate(load, case.limits, [STEP])
    for k, token_s in theirs.token_s.items():
        if case.aborts:
            break
        if not differs and mine.token_s[k] != token_s:
            differs = f"request {k} has its tokens at other times"
        if not differs and served.token_s(k, len(case.requests[k].answer)).tolist() != token_s:
            differs = f"request {k} of `simulate` has its tokens at other times"
        if not differs and (served.first_token_s[k], served.finished_s[k]) != (token_s[0], token_s[-1]):
            differs = f"request {k} of `simulate` begins or ends at another time"
    seen: set[int] = set()
    hits = 0
    for _, step in expected:
        hits += sum(done for k, (_, done) in step.there.items() if k not in seen)
        seen |= step.there.keys()
    return Compared(
        seed=seed, limits=case.limits, steps=len(expected), aborts=len(case.aborts),
        preemptions=theirs.preemptions, hit_tokens=hits, differs=differs,
    )  # fmt: skip


def compare_all(draws: int, seed: int) -> list[Compared]:
    """``draws`` workloads, from ``seed`` on."""
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory(prefix="harness-oracle-") as model:
        Path(model, "config.json").write_text(json.dumps(CONFIG))
        return [compare(k, model) for k in range(seed, seed + draws)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = compare_all(args.draws, args.seed)
    wrong = [one for one in found if one.differs]
    for one in wrong:
        print(f"seed {one.seed}, {one.limits}: {one.differs}", file=sys.stderr)
    limits = limits_differ()
    print("\n".join(limits), file=sys.stderr)
    print(json.dumps({"vllm": vllm.__version__, **summary(found), "limits that differ": len(limits)}))
    sys.exit(bool(wrong or limits))


def summary(found: list[Compared]) -> dict[str, int]:
    """What was compared, in numbers."""
    return {
        "workloads": len(found), "identical": sum(not one.differs for one in found),
        "asynchronous": sum(one.limits.async_scheduling for one in found),
        "with preemptions": sum(one.preemptions > 0 for one in found),
        "with hang-ups": sum(one.aborts > 0 for one in found),
        "with prefix hits": sum(one.hit_tokens > 0 for one in found),
        "with both": sum(one.preemptions > 0 and one.hit_tokens > 0 for one in found),
        "steps": sum(one.steps for one in found), "preemptions": sum(one.preemptions for one in found),
        "hit tokens": sum(one.hit_tokens for one in found),
    }  # fmt: skip


if __name__ == "__main__":
    main()
