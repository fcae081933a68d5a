"""Logs of agents, servers, routers and gateways: each call once, with its whole prompt, at its arrival."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import TraceError
from harness.trace.io import Trace, TraceRecord, open_trace


def read(tmp_path: Path, *lines: object, **options: Any) -> tuple[list[TraceRecord], Trace]:
    path = tmp_path / "log"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    trace = open_trace(path, **options)
    return list(trace), trace


def counts(rows: list[TraceRecord]) -> list[tuple[int | None, int | None]]:
    return [(row.input_tokens, row.output_tokens) for row in rows]


def arrivals(rows: list[TraceRecord]) -> list[float | None]:
    return [row.arrival_s for row in rows]


# --- coding agents -------------------------------------------------------------------------------------------------


def claude(second: int, id_: str = "m1", output: int = 5, **line: Any) -> dict[str, Any]:
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 10, "cache_read_input_tokens": 100}
    message = {"id": id_, "role": "assistant", "model": "claude-x", "usage": {**usage, "output_tokens": output}}
    time = f"2026-09-30T10:00:{second:02}.000Z"
    return {"type": "assistant", "sessionId": "s", "timestamp": time, "requestId": "r", "message": message, **line}


def said(second: int, **line: Any) -> dict[str, Any]:
    return claude(second, type="user", message={"role": "user", "content": "x"}, **line)


def test_claude_code_writes_one_answer_on_several_lines(tmp_path: Path) -> None:
    rows, trace = read(
        tmp_path,
        {"type": "summary", "summary": "x", "leafUuid": "u"},
        said(1), claude(4, output=1), claude(5, output=7),
        said(6), claude(9, "m2"), claude(9, "m2"),
        claude(5, output=7),
    )  # fmt: skip
    assert trace.format == "claude-code"
    assert counts(rows) == [(113, 7), (113, 5)], "the last of equal ids counts, cached tokens are input"
    assert arrivals(rows) == [0.0, 5.0], "when the user or a tool had spoken"
    assert [row.cached_tokens for row in rows] == [100, 100]
    assert {row.session_id for row in rows} == {"s"}


def test_claude_code_sub_agents_errors_and_made_up_answers(tmp_path: Path) -> None:
    synthetic = claude(7, "m4")
    synthetic["message"]["model"] = "<synthetic>"
    rows, trace = read(
        tmp_path, said(1), claude(2), claude(3, "m2", isSidechain=True, agentId="a1"),
        claude(5, "m3", isApiErrorMessage=True), synthetic,
    )  # fmt: skip
    assert [row.session_id for row in rows] == ["s", "s/a1"]
    assert trace.rows_dropped == {"failed call (API error)": 1}


def codex(second: int, kind: str, **payload: Any) -> dict[str, Any]:
    return {"timestamp": f"2026-09-30T10:00:{second:02}Z", "type": kind, "payload": payload}


def test_codex_takes_the_tokens_of_each_call_and_never_the_running_total(tmp_path: Path) -> None:
    last = {"input_tokens": 100, "cached_input_tokens": 90, "output_tokens": 12, "reasoning_output_tokens": 4}
    first, second = ({"total_token_usage": {"input_tokens": n}, "last_token_usage": last} for n in (100, 200))
    rows, trace = read(
        tmp_path,
        codex(0, "session_meta", id="c1"), codex(0, "turn_context", model="gpt-x"),
        codex(1, "event_msg", type="user_message"), codex(4, "event_msg", type="token_count", info=first),
        codex(5, "event_msg", type="token_count", info=first),
        codex(6, "response_item", type="function_call_output"),
        codex(9, "event_msg", type="token_count", info=None),
        codex(9, "event_msg", type="token_count", info=second),
    )  # fmt: skip
    assert trace.format == "codex"
    assert counts(rows) == [(100, 12), (100, 12)]
    assert arrivals(rows) == [0.0, 5.0]
    assert {(row.session_id, row.model, row.cached_tokens) for row in rows} == {("c1", "gpt-x", 90)}
    assert sum(trace.rows_dropped.values()) == 1


# --- servers and routers -------------------------------------------------------------------------------------------

BANNER = [f"[2026-09-30 08:00:00] loading {i}" for i in range(300)]


def test_sglang_request_statistics(tmp_path: Path) -> None:
    stats = "[2026-09-30 08:00:10 TP0] ReqTimeStats(rid={}, input_len={}, cached_input_len=900, output_len={}, type={})"
    new = ": queue_duration=1.56ms, forward_duration=2s, entry_time=1790755200.25"
    old = ": queue_duration=500ms, forward_duration=2.5s, entry_time=123456.789"
    rows, trace = read(
        tmp_path, *BANNER,
        stats.format("a", 1000, 50, "unified") + new, stats.format("a", 1000, 50, "unified") + new,
        stats.format("b", 2000, 60, "unified") + old, stats.format("HEALTH_CHECK_1", 1, 1, "unified") + new,
    )  # fmt: skip
    assert trace.format == "sglang-log"
    assert counts(rows) == [(1000, 50), (2000, 60)]
    assert arrivals(rows) == [0.0, 6.75], "08:00:00.25, and the line at :10 less 3 s: entry_time is of another clock"
    assert rows[0].cached_tokens == 900


def test_sglang_joins_prefill_and_decode(tmp_path: Path) -> None:
    stats = "[2026-09-30 08:00:1{}] ReqTimeStats(rid={}, bootstrap_room={}, input_len=100, output_len={}, type={}): x=1"
    rows, trace = read(
        tmp_path, stats.format(0, "p", 7, 1, "prefill"), stats.format(5, "d", 7, 40, "decode"),
        stats.format(6, "q", 8, 1, "prefill"),
    )  # fmt: skip
    assert counts(rows) == [(100, 40)]
    assert trace.rows_dropped == {"a prefill without its decode line": 1}


def test_sglang_finish_lines(tmp_path: Path) -> None:
    line = (
        "[2026-09-30 08:00:10] Finish: obj=GenerateReqInput(rid='a', text='b'), out={'text': 'c', 'meta_info': {"
        "'id': 'a', 'prompt_tokens': 9, 'completion_tokens': 4, 'cached_tokens': 3, 'e2e_latency': 1.5}}"
    )
    (row,), _ = read(tmp_path, line)
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (9, 4, 3)


def dynamo(ms: object, tokens: object, hashes: list[int], **request: Any) -> dict[str, Any]:
    replay = {"trace_block_size": 2, "input_length": 3, "input_sequence_hashes": hashes}
    event = {"schema": "dynamo.request.trace.v1", "event_type": "request_end", "event_time_unix_ms": 1}
    facts = {"request_id": f"{ms}", "request_received_ms": ms, "output_tokens": tokens, "replay": replay, **request}
    return {**event, "request": facts, "agent_context": {"session_id": "s"}}


def test_dynamo_request_trace(tmp_path: Path) -> None:
    rows, trace = read(
        tmp_path,
        dynamo("2500.0", "4", [2**64 - 1, 5], cached_tokens=2), {"timestamp": 1, "event": dynamo(1000, 4, [1, 2])},
        dynamo(3000, None, [1, 2]), {**dynamo(1, 1, []), "event_type": "tool_end"},
    )  # fmt: skip
    assert trace.format == "dynamo"
    assert counts(rows) == [(3, 4), (3, 4)]
    assert arrivals(rows) == [0.0, 1.5]
    assert rows[1].prefix_ids == (2**63 - 1, 5)
    assert (rows[1].block_tokens, rows[1].cached_tokens, rows[1].session_id) == (2, 2, "s")
    assert trace.rows_dropped == {"failed call (no output tokens)": 1}
    with pytest.raises(TraceError, match="1 input_sequence_hashes for input_length 3, expected 2"):
        read(tmp_path, dynamo(1, 1, [1]))


def bedrock(second: int, **input_: int) -> dict[str, Any]:
    return {
        "schemaType": "ModelInvocationLog", "timestamp": f"2026-09-30T10:00:{second:02}Z", "requestId": str(second),
        "modelId": "m", "input": {"inputTokenCount": 10, **input_}, "output": {"outputTokenCount": 8},
    }  # fmt: skip


def test_bedrock_invocation_log(tmp_path: Path) -> None:
    lines = [
        bedrock(3, cacheReadInputTokenCount=100, cacheWriteInputTokenCount=5), bedrock(1), bedrock(1),
        {**bedrock(4), "errorCode": "ThrottlingException", "output": {}}, {**bedrock(5), "output": {}},
    ]  # fmt: skip
    rows, trace = read(tmp_path, *lines)
    assert trace.format == "bedrock"
    assert counts(rows) == [(10, 8), (115, 8)], "cached tokens stand beside the input"
    assert arrivals(rows) == [0.0, 2.0]
    assert rows[1].cached_tokens == 100
    assert sum(trace.rows_dropped.values()) == 3
    exported, _ = read(tmp_path, {"events": [{"timestamp": 1, "message": json.dumps(line)} for line in lines[:2]]})
    assert counts(exported) == [(10, 8), (115, 8)]


# --- gateways ------------------------------------------------------------------------------------------------------


def kong(ms: int, ai: object, status: int = 200) -> dict[str, Any]:
    request = {"method": "POST", "uri": "/v1/chat/completions"}
    return {"started_at": ms, "latencies": {}, "request": request, "response": {"status": status}, "ai": ai}


def test_kong(tmp_path: Path) -> None:
    usage = {"usage": {"prompt_tokens": 9, "completion_tokens": 3}, "meta": {"response_model": "m"}}
    rows, trace = read(tmp_path, kong(1790755201500, {"ai-proxy": usage}), kong(1790755200000, {"proxy": usage}),
                       kong(1790755200000, {"proxy": usage}, 499), kong(1790755200000, {}, 503))  # fmt: skip
    assert trace.format == "kong"
    assert counts(rows) == [(9, 3), (9, 3)]
    assert arrivals(rows) == [0.0, 1.5]
    assert trace.rows_dropped == {"cancelled by the client (HTTP 499)": 1, "failed call (HTTP 503)": 1}


def test_cloudflare(tmp_path: Path) -> None:
    one = {"id": "1", "created_at": "2026-09-30T10:00:01Z", "tokens_in": 9, "tokens_out": 3, "success": True}
    page = [one, one, {**one, "id": "2", "cached": True}, {**one, "id": "3", "success": False}]
    rows, trace = read(tmp_path, {"result": page, "success": True})
    assert trace.format == "cloudflare"
    assert counts(rows) == [(9, 3)]
    assert sum(trace.rows_dropped.values()) == 3


def test_azure_api_management_writes_a_call_on_three_rows(tmp_path: Path) -> None:
    def part(number: int, **facts: Any) -> dict[str, Any]:
        return {
            "TimeGenerated": "2026-09-30T10:00:01.1234567Z",
            "CorrelationId": "c",
            "SequenceNumber": number,
            **facts,
        }

    rows, trace = read(tmp_path, part(0, PromptTokens=9, CompletionTokens=3, ModelName="m"), part(1), part(2))
    assert trace.format == "azure-gateway"
    assert counts(rows) == [(9, 3)]


def test_azure_diagnostics_and_gateways_without_counts_give_arrivals(tmp_path: Path) -> None:
    azure = {
        "category": "RequestResponse", "time": "2026-09-30T10:00:03Z", "operationName": "ChatCompletions_Create",
        "durationMs": 1500, "resultSignature": "200", "properties": '{"responseLength": 7}',
    }  # fmt: skip
    request = {"method": "POST", "uri": "/v1/chat/completions"}
    caddy = {"ts": 1790755203.5, "duration": 1.5, "request": request, "status": 200}
    traefik = {
        "StartUTC": "2026-09-30T10:00:03.000000001Z", "RequestMethod": "POST", "RequestPath": "/v1/messages",
        "DownstreamStatus": 200,
    }  # fmt: skip
    for name, line, later in (
        ("azure-gateway", azure, {**azure, "durationMs": 500}),
        ("caddy", caddy, {**caddy, "duration": 0.5}),
        ("traefik", traefik, {**traefik, "StartUTC": "2026-09-30T10:00:04.000000001Z"}),
    ):
        rows, trace = read(tmp_path, later, line, arrivals_only=True)
        assert trace.format == name
        assert arrivals(rows) == [0.0, 1.0]
        assert counts(rows) == [(None, None)] * 2


# --- spans ---------------------------------------------------------------------------------------------------------


def test_openinference_spans_of_an_agent_are_a_session(tmp_path: Path) -> None:
    def span(id_: str, kind: str, second: int, **attributes: Any) -> dict[str, Any]:
        times = {"start_time": f"2026-09-30T10:00:0{second}-07:00", "end_time": f"2026-09-30T10:00:0{second + 1}-07:00"}
        above = None if id_ == "0" else "0"
        context = {"trace_id": "t", "span_id": id_}
        return {"context": context, "parent_id": above, "span_kind": kind, **times, "attributes": attributes}

    call = {"llm": {"token_count": {"prompt": 50, "completion": 5, "prompt_details": {"cache_read": 40}}}}
    flat = {"llm.token_count.prompt": 60, "llm.token_count.completion": 6, "llm.model_name": "m"}
    rows, trace = read(
        tmp_path,
        [span("0", "AGENT", 0), span("1", "LLM", 1, **call), span("2", "TOOL", 2), span("3", "LLM", 3, **flat),
         {**span("4", "LLM", 5, **flat), "status_code": "ERROR"}],
    )  # fmt: skip
    assert trace.format == "otel"
    assert counts(rows) == [(50, 5), (60, 6)]
    assert [row.cached_tokens for row in rows] == [40, None]
    assert {row.session_id for row in rows} == {"t"}
    assert trace.rows_failed == 1


def test_jaeger(tmp_path: Path) -> None:
    def span(id_: str, start: int, parent: str | None = None, **tags: Any) -> dict[str, Any]:
        references = [{"refType": "CHILD_OF", "spanID": parent}] if parent else []
        named = [{"key": name.replace("__", "."), "type": "string", "value": value} for name, value in tags.items()]
        return {
            "traceID": "t",
            "spanID": id_,
            "startTime": start,
            "duration": 1_000_000,
            "references": references,
            "tags": named,
        }

    usage = {"gen_ai__usage__input_tokens": "9", "gen_ai__usage__output_tokens": 3, "gen_ai__operation__name": "chat"}
    start = 1_790_755_200_000_000
    spans = [span("a", start + 1_500_000, **usage), span("b", start, **usage), span("c", start, "b", **usage),
             span("d", start, error=True, **usage)]  # fmt: skip
    rows, trace = read(tmp_path, {"data": [{"traceID": "t", "spans": spans, "processes": {}}]})
    assert trace.format == "otel"
    assert counts(rows) == [(9, 3), (9, 3)], "c is b seen from below"
    assert arrivals(rows) == [0.0, 1.5]
    assert trace.rows_failed == 1


# --- what was known, in other shapes -------------------------------------------------------------------------------


def test_litellm_callback_payload(tmp_path: Path) -> None:
    line = {
        "id": "1", "call_type": "acompletion", "status": "success", "cache_hit": None, "startTime": 1768809251.711881,
        "prompt_tokens": 800, "completion_tokens": 1700, "total_tokens": 2500,
        "metadata": {"usage_object": {"prompt_tokens_details": {"cached_tokens": 768}}},
    }  # fmt: skip
    (row,), trace = read(tmp_path, line, line, {**line, "id": "2", "cache_hit": True})
    assert (row.input_tokens, row.output_tokens, row.cached_tokens) == (800, 1700, 768)
    assert sum(trace.rows_dropped.values()) == 2


def test_anthropic_batches(tmp_path: Path) -> None:
    usage = {"input_tokens": 5, "cache_read_input_tokens": 30000, "output_tokens": 50}
    done = {"type": "succeeded", "message": {"type": "message", "model": "m", "content": [], "usage": usage}}
    rows, trace = read(tmp_path, {"custom_id": "a", "result": done}, {"custom_id": "b", "result": {"type": "expired"}})
    assert counts(rows) == [(30005, 50)]
    assert trace.rows_dropped == {"failed call (batch: expired)": 1}
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    (row,), _ = read(tmp_path, {"custom_id": "a", "params": asked})
    assert row.messages == ({"role": "user", "content": "hello"},)


@pytest.mark.parametrize(
    "header",
    [
        "usage_date_utc,model_version,usage_input_tokens_no_cache,usage_output_tokens",
        "start_time,n_requests,n_context_tokens_total,n_generated_tokens_total",
    ],
)
def test_totals_of_days_are_recognised_as_such(tmp_path: Path, header: str) -> None:
    with pytest.raises(TraceError, match=r"totals of days.*trace synth"):
        read(tmp_path, header, "2026-09-30,m,5,6")
