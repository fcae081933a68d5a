"""Each trace format is read with its own traps; figures come from an independent reading of the same file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import TraceError, UsageError
from harness.trace.edit import anonymize, write_trace
from harness.trace.formats.detect import claims
from harness.trace.formats.jsonl import FIELDS
from harness.trace.formats.record import TableOptions
from harness.trace.formats.values import epoch_ns, iso_ns
from harness.trace.io import FAILED_CALL, TraceRecord, open_trace
from harness.trace.source import open_source, records

SAMPLES = Path(__file__).resolve().parent.parent / "scenarios" / "traces"

# file -> format, rows read, rows dropped
SHIPPED = {
    "azure-code-2023.csv": ("azure", 300, {}),
    "azure-conv-2023.csv": ("azure", 600, {}),
    "bailian-constructed.jsonl": ("bailian", 40, {}),
    "burstgpt-v1.csv": ("burstgpt", 100, {FAILED_CALL: 5}),
    "burstgpt-v3.csv": ("burstgpt", 100, {}),
    "envoy-constructed.log": (
        "envoy",
        30,
        {"not a call of a text completion API": 3, "failed call (HTTP 429)": 1, "failed call (HTTP 502)": 1},
    ),
    "example.jsonl": ("jsonl", 20, {}),
    "langfuse-constructed.json": ("langfuse", 11, {"failed call (level ERROR)": 1}),
    "litellm-spend-constructed.csv": ("litellm", 25, None),
    "litellm-spend-constructed.json": (
        "litellm",
        25,
        {
            "same request_id as an earlier row (a copy)": 1,
            "not a text completion (aembedding)": 1,
            "answered from LiteLLM's response cache": 1,
            "failed call (status failure)": 1,
        },
    ),
    "mooncake-conversation.jsonl": ("mooncake", 200, {}),
    "nginx-constructed.log": (
        "nginx",
        30,
        {"not a call of a text completion API": 3, "failed call (HTTP 429)": 1, "failed call (HTTP 502)": 1},
    ),
    "openai-batch-constructed.jsonl": ("openai", 8, {"not a text completion (/v1/embeddings)": 1}),
    "otel-genai-constructed.jsonl": (
        "otel",
        15,
        {"another span of the same call": 3, "failed call (status error)": 1},
    ),
    "sharegpt-constructed.json": ("chat", 13, {"empty answer (failed call)": 1}),
    "vllm-requests.log": ("vllm-log", 9, {"failed call (finish_reason abort)": 1}),
}


def write(tmp_path: Path, content: bytes | str, name: str = "t") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path: Path | str, **options: object) -> tuple[list[TraceRecord], object]:
    trace = open_trace(path, **options)  # type: ignore[arg-type]
    kept = list(trace)
    assert trace.rows_read == trace.rows_kept + sum(trace.rows_dropped.values())
    assert trace.rows_kept == len(kept)
    return kept, trace


def problem(path: Path, **options: object) -> str:
    with pytest.raises(TraceError) as caught:
        list(open_trace(path, **options))  # type: ignore[arg-type]
    return str(caught.value)


# --- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_samples_are_found_and_read_whole(name):
    format_, rows, dropped = SHIPPED[name]
    kept, trace = read(SAMPLES / name, arrivals_only=True)
    assert (trace.format, trace.rows_read) == (format_, rows)
    if dropped is not None:
        assert trace.rows_dropped == dropped
    times = [r.arrival_s for r in kept if r.arrival_s is not None]
    assert times == sorted(times)
    assert not times or times[0] == 0.0
    for record in kept:
        if record.prefix_ids is not None:
            assert len(record.prefix_ids) == -(-record.input_tokens // record.block_tokens)


@pytest.mark.parametrize("name", SHIPPED)
def test_exactly_one_format_claims_a_sample(name):
    first = next(record for _, record in records(open_source(SAMPLES / name)) if claims(record))
    assert claims(first) == [SHIPPED[name][0]]


@pytest.mark.parametrize("name", SHIPPED)
def test_each_says_its_clock_and_blocks_where_it_has_any(name):
    records, trace = read(SAMPLES / name, arrivals_only=True)
    assert (trace.clock is None) is (records[0].arrival_s is None)
    assert (trace.blocks is None) is all(record.prefix_ids is None for record in records)
    for size in {record.block_tokens for record in records} - {None}:
        assert str(size) in trace.blocks
    failed = {why: n for why, n in trace.rows_dropped.items() if "failed call" in why}
    assert trace.rows_failed == sum(failed.values())


def test_the_evidence_for_a_block_size_is_counted(tmp_path):
    def row(tokens: int, ids: list[int]) -> dict[str, object]:
        return {"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": ids}

    _, trace = read(write(tmp_path, lines(row(512, [1]), row(513, [1, 2]), row(1, [3]))))
    assert trace.blocks == "512 tokens: one id per block on all 3 rows, 1 of them of several blocks"
    path = write(tmp_path, lines(row(512, [1]), row(5, [2])))
    assert "nothing shows the unit of timestamp" in problem(path)
    _, trace = read(path, table=TableOptions(unit="ms"))
    assert "nothing in the file shows it" in trace.blocks


def test_a_clock_that_runs_too_fast_is_asked_about(tmp_path):
    """Seconds where milliseconds should be: 200 rows within 0.2 s."""
    rows = [{"timestamp": i, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]} for i in range(200)]
    _, trace = read(write(tmp_path, lines(*rows)))
    assert any("is the clock what it was read as (timestamp in milliseconds" in note for note in trace.notes)
    _, trace = read(write(tmp_path, lines(*(row | {"timestamp": 1000 * i} for i, row in enumerate(rows)))))
    assert not any("is the clock" in note for note in trace.notes)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("pack", ["gzip", "zstd"])
def test_compressed_is_the_same(tmp_path, name, pack):
    raw = (SAMPLES / name).read_bytes()
    packed = gzip.compress(raw) if pack == "gzip" else pa.Codec("zstd").compress(raw, asbytes=True)
    plain = read(SAMPLES / name, arrivals_only=True)[0]
    assert read(write(tmp_path, packed), arrivals_only=True)[0] == plain


def test_a_json_array_of_rows_is_read_as_lines_are(tmp_path):
    for name in ("mooncake-conversation.jsonl", "bailian-constructed.jsonl", "example.jsonl"):
        rows = [json.loads(line) for line in (SAMPLES / name).read_text().splitlines()]
        for indent in (None, 2):
            path = write(tmp_path, json.dumps(rows, indent=indent))
            got = [r._replace(line=0) for r in read(path)[0]]
            want = [r._replace(line=0) for r in read(SAMPLES / name)[0]]
            assert got == want
    kept, _ = read(write(tmp_path, '[\n{"prompt": "a"},\n\n {"prompt": "b"}\n]'))
    assert [r.line for r in kept] == [2, 4]


def test_rows_are_sorted_beyond_what_memory_may_hold(tmp_path, monkeypatch):
    from harness.trace import spool

    rows = [{"arrival_s": (i * 7919) % 1000 / 8, "input_tokens": 1 + i, "output_tokens": 1} for i in range(1000)]
    path = write(tmp_path, lines(*rows))
    whole = read(path, sort=True)[0]
    monkeypatch.setattr(spool, "HELD_BYTES", 64 * 500)
    spilled, trace = read(path, sort=True)
    assert spilled == whole
    assert [r.arrival_s for r in whole] == sorted(r["arrival_s"] for r in rows)
    assert "rows sorted by arrival: as asked" in trace.notes
    assert "before the row above" in problem(path)


def test_parts_begin_where_time_goes_back(tmp_path):
    times = [5, 6, 7, 0, 1, 0, 0, 3]
    path = write(tmp_path, lines(*({"arrival_s": t, "input_tokens": 1} for t in times)))
    got = [[r.arrival_s for r in read(path, part=part)[0]] for part in (1, 2, 3)]
    assert got == [[0.0, 1.0, 2.0], [0.0, 1.0], [0.0, 0.0, 3.0]]
    assert "8 in another part of the file" in problem(path, part=4)
    with pytest.raises(UsageError, match="exclude"):
        open_trace(path, part=1, sort=True)


# --- BurstGPT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_burstgpt_is_read_by_column_name(version):
    rows = list(csv.DictReader((SAMPLES / f"burstgpt-{version}.csv").open()))
    good = [r for r in rows if r["Request tokens"] != "0" and r["Response tokens"] != "0"]
    kept, _ = read(SAMPLES / f"burstgpt-{version}.csv")
    first = float(good[0]["Timestamp"])
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.session_id) for r in kept] == [
        (
            float(r["Timestamp"]) - first,
            int(r["Request tokens"]),
            int(r["Response tokens"]),
            r.get("Session ID") or None,
        )
        for r in good
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("5,ChatGPT,472,18,491,Conversation log", "472 + 18"),
        ("-5,ChatGPT,472,18,490,Conversation log", "Timestamp is '-5'"),
        ("1e5,ChatGPT,472,18,490,Conversation log", "Timestamp is '1e5'"),
        ("1667210000000,ChatGPT,472,18,490,Conversation log", "Timestamp"),
        ("5,ChatGPT,,18,18,Conversation log", "Request tokens is empty"),
        ("5;ChatGPT;472;18;490;Conversation log", "1 fields, expected 6"),
    ],
)
def test_burstgpt_bad_rows(tmp_path, row, words):
    path = write(tmp_path, f"Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n{row}\n")
    assert words in problem(path)
    assert ":2:" in problem(path)


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_another_delimiter_is_read(tmp_path, mark):
    for name in ("burstgpt-v1.csv", "azure-conv-2023.csv"):
        text = (SAMPLES / name).read_text().replace(",", mark)
        kept, trace = read(write(tmp_path, text))
        assert (trace.format, kept) == (name.split("-")[0], read(SAMPLES / name)[0])


# --- RAGPulse --------------------------------------------------------------------------------------------------------


def test_ragpulse_two_recordings_and_leading_components(tmp_path):
    file = SAMPLES / "ragpulse" / "0_trace.jsonl"
    assert "0_trace.jsonl:41: arrives 604453 s before" in problem(file)
    raw = [json.loads(line) for line in file.read_text().splitlines()]
    both = [read(file, part=part)[0] for part in (1, 2)]
    assert [len(part) for part in both] == [40, 20]
    assert [r.input_tokens for part in both for r in part] == [r["input_length"] for r in raw]

    lengths = {}
    for table in file.parent.glob("[1-5]_*.jsonl"):
        for line in table.read_text().splitlines():
            id_, tokens = json.loads(line).values()
            lengths[table.stem[2:].split("_")[0], id_] = tokens

    def components(row):
        return [(name.split("_")[0].removesuffix("_ids"), c) for name, ids in row["hash_ids"].items() for c in ids]

    part = both[0]
    for a in range(0, 40, 3):
        for b in range(a):
            leading = 0
            for x, y in zip(components(raw[a]), components(raw[b]), strict=False):
                if x != y:
                    break
                leading += lengths[x]
            same = 0
            for x, y in zip(part[a].prefix_ids, part[b].prefix_ids, strict=False):
                if x != y:
                    break
                same += 1
            assert same == leading // 16
    assert max(Counter(part[5].prefix_ids).values()) == 1


def test_ragpulse_without_length_tables_knows_no_prefix(tmp_path):
    text = (SAMPLES / "ragpulse" / "0_trace.jsonl").read_text()
    kept, trace = read(write(tmp_path, text), part=1)
    assert all(r.prefix_ids is None and r.block_tokens is None for r in kept)
    assert any("put the component lengths" in note for note in trace.notes)
    write(tmp_path, '{"sys_prompt_id": 1, "token_length": -1}\n', "1_sys_prompt.jsonl")
    assert "expected sys_prompt_id and token_length" in problem(tmp_path / "t", part=1)


# --- Bailian ---------------------------------------------------------------------------------------------------------


def test_bailian_sessions_are_chains_of_parents():
    raw = [json.loads(line) for line in (SAMPLES / "bailian-constructed.jsonl").read_text().splitlines()]
    kept, _ = read(SAMPLES / "bailian-constructed.jsonl")
    parents = {r["chat_id"]: r["parent_chat_id"] for r in raw}

    def root(chat):
        return chat if parents[chat] == -1 else root(parents[chat])

    assert [r.session_id for r in kept] == [str(root(r["chat_id"])) for r in raw]
    assert [r.turn for r in kept] == [r["turn"] - 1 for r in raw]
    assert {r.block_tokens for r in kept} == {16}
    assert [r.arrival_s for r in kept] == pytest.approx([r["timestamp"] - raw[0]["timestamp"] for r in raw])


def bailian(**fields: object) -> dict[str, object]:
    row: dict[str, object] = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 40}
    return row | {"output_length": 2, "type": "text", "turn": 1, "hash_ids": [1, 2, 3]} | fields


def test_bailian_block_size_is_checked_and_a_missing_partial_id_is_nobodys(tmp_path):
    kept, _ = read(write(tmp_path, lines(bailian(hash_ids=[1, 2]), bailian(chat_id=2, hash_ids=[1, 2]))))
    assert kept[0].prefix_ids[:2] == kept[1].prefix_ids[:2] == (1, 2)
    assert kept[0].prefix_ids[2] != kept[1].prefix_ids[2]
    assert "expected 3 (one per 16 tokens)" in problem(write(tmp_path, lines(bailian(hash_ids=[1]))))
    kept, trace = read(write(tmp_path, lines(bailian(), bailian(chat_id=5, parent_chat_id=4), bailian(chat_id=5))))
    assert [r.session_id for r in kept] == ["1", "4"]
    assert trace.rows_dropped == {"same chat_id as an earlier row (a copy)": 1}
    assert any(note.startswith("1 requests continue one that is not in the file") for note in trace.notes)


# --- chat and OpenAI -------------------------------------------------------------------------------------------------


def test_each_answer_of_a_conversation_is_a_request():
    raw = json.loads((SAMPLES / "sharegpt-constructed.json").read_text())
    kept, _ = read(SAMPLES / "sharegpt-constructed.json")
    third = [r for r in kept if r.session_id == raw[2]["id"]]
    turns = [(t["value"]) for t in raw[2]["conversations"]]
    assert [r.turn for r in third] == [0, 1, 2]
    assert [[m["content"] for m in r.messages] for r in third] == [turns[:1], turns[:3], turns[:5]]
    assert [r.answer for r in third] == turns[1::2]
    assert {m["role"] for r in kept for m in r.messages} == {"system", "user", "assistant"}
    unanswered = [r for r in kept if r.answer is None]
    assert [r.messages[-1]["content"] for r in unanswered] == ["Are you still there?"]


def test_chat_log_variants(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for row in (
        {"messages": said},
        {"conversation_id": "x", "model": "m", "conversation": said, "turn": 1, "language": "English"},
        {"conversation_hash": "h", "timestamp": "2023-04-09 00:02:53+00:00", "conversation": said},
        {"id": "i", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ):
        kept, trace = read(write(tmp_path, lines(row, row)))
        assert trace.format == "chat"
        assert [(r.messages, r.answer, r.arrival_s) for r in kept] == [((said[0],), "a", None)] * 2
    open_question = {"messages": said[:1]}
    assert open_trace(write(tmp_path, lines(open_question))).format == "jsonl"
    assert "unknown speaker" not in problem(write(tmp_path, lines({"conversations": [{"from": "x", "value": 1}]})))
    assert "a turn is from 'alien'" in problem(
        write(tmp_path, lines({"conversations": [{"from": "alien", "value": "v"}]}))
    )


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": [*ASKED, {"role": "assistant", "content": "wait", "tool_calls": [CALL]}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "wait", "function_call": {"name": "f"}}]},
        {"messages": ASKED, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": ASKED, "functions": [{"name": "f"}]},
    ],
)
def test_openai_prompts_with_tools_are_not_sent_as_their_text(tmp_path, request_):
    usage = {"prompt_tokens": 300, "completion_tokens": 7}
    row = {"request": {"model": "m"} | request_, "response": {"created": 1_790_000_000, "usage": usage}}
    (kept,), trace = read(write(tmp_path, lines(row)))
    assert (kept.messages, kept.input_tokens) == (None, 300)
    assert any("replayed by their lengths" in note for note in trace.notes)


def test_openai_tools_without_usage_are_said_to_be_missing(tmp_path):
    body = {"model": "m", "messages": ASKED, "tools": [{"type": "function", "function": {"name": "f"}}]}
    (kept,), trace = read(write(tmp_path, lines({"custom_id": "1", "url": "/v1/chat/completions", "body": body})))
    assert kept.messages == ({"role": "user", "content": "q"},)
    assert any("define tools, which are not sent" in note for note in trace.notes)


def test_openai_shapes(tmp_path):
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 64}}
    request = {"model": "m", "messages": [{"role": "user", "content": "q " * 90}], "max_tokens": 50}
    image = {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}, {"type": "text"}]}]}
    completion = {"id": "c", "object": "chat.completion", "created": 1_790_000_000, "usage": usage}
    rows = [
        {"request": request, "response": completion},
        {"request": image, "response": completion | {"created": 1_790_000_003}},
        {"request": request, "response": {"error": {"message": "no"}}},
    ]
    kept, trace = read(write(tmp_path, lines(*rows)))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.messages is None) for r in kept] == [
        (0.0, 100, 7, False),
        (3.0, 100, 7, True),
    ]
    assert trace.rows_dropped == {"failed call (error)": 1}
    assert any("more than text" in note for note in trace.notes)
    kept, _ = read(write(tmp_path, lines(completion, completion | {"created": 1_789_999_999})))
    assert [(r.line, r.arrival_s) for r in kept] == [(2, 0.0), (1, 1.0)]
    done = {"id": "b", "custom_id": "r1", "response": {"status_code": 200, "body": completion}, "error": None}
    bad = done | {"custom_id": "r2", "response": {"status_code": 500, "body": {}}}
    kept, trace = read(write(tmp_path, lines(done, bad, done)))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in kept] == [(None, 100, 7)]
    assert trace.rows_dropped == {
        "failed call (HTTP 500)": 1,
        "same custom_id as an earlier row (a copy)": 1,
    }
    ids = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": [1, 2, 3]}}
    assert read(write(tmp_path, lines(ids)))[0][0].input_tokens == 3
    assert read(write(tmp_path, lines(request)))[0][0].output_tokens is None
    assert "nothing to send" in problem(write(tmp_path, lines(image)))


# --- gateways and tracing --------------------------------------------------------------------------------------------


def test_litellm_json_and_csv_are_the_same_trace():
    raw = json.loads((SAMPLES / "litellm-spend-constructed.json").read_text())
    good = {
        r["request_id"]: r
        for r in raw
        if r["status"] == "success" and r["cache_hit"] == "False" and r["call_type"] == "acompletion"
    }
    want = sorted(good.values(), key=lambda r: r["startTime"])
    first = datetime.fromisoformat(want[0]["startTime"])
    for kind in ("json", "csv"):
        kept, trace = read(SAMPLES / f"litellm-spend-constructed.{kind}")
        assert [(r.input_tokens, r.output_tokens, r.session_id) for r in kept] == [
            (r["prompt_tokens"], r["completion_tokens"], r["session_id"]) for r in want
        ]
        assert [r.arrival_s for r in kept] == pytest.approx(
            [(datetime.fromisoformat(r["startTime"]) - first).total_seconds() for r in want], abs=1e-9
        )
        assert not any(r.messages for r in kept)
        assert any("1 rows have a text that cannot be the whole prompt" in note for note in trace.notes)
        assert any("sorted by arrival" in note for note in trace.notes)


def test_litellm_messages_of_a_csv_are_json_in_quotes(tmp_path):
    asked = 'Say "hello",\nplease, and nothing else at all.'
    header, row = "startTime,prompt_tokens,completion_tokens,messages", ["2026-09-21T14:13:20Z", "12", "5"]
    field = json.dumps([{"role": "user", "content": asked}]).replace('"', '""')
    ((record,), _) = read(write(tmp_path, f'{header}\n{",".join(row)},"{field}"\n'))
    assert record.messages == ({"role": "user", "content": asked},)


def spend(**fields: object) -> dict[str, object]:
    row: dict[str, object] = {"request_id": "a", "startTime": "2026-09-21T14:13:20Z", "prompt_tokens": 10}
    return row | {"completion_tokens": 5, "total_tokens": 15} | fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"total_tokens": 25}, "what was counted is not clear"),
        ({"startTime": 17.5}, "startTime is"),
        ({"startTime": "21/09/2026 14:13"}, "startTime is"),
        ({"prompt_tokens": None}, "is empty"),
        ({"prompt_tokens": -1}, "prompt_tokens is '-1'"),
        ({"prompt_tokens": 1e300}, "prompt_tokens is"),
        ({"prompt_tokens": True}, "prompt_tokens is 'True'"),
    ],
)
def test_litellm_refuses_what_is_not_clear(tmp_path, fields, words):
    assert words in problem(write(tmp_path, lines(spend(**fields))))


def test_a_quote_that_is_never_closed_is_found(tmp_path):
    text = (SAMPLES / "litellm-spend-constructed.csv").read_text()
    cut = text[: text.rindex('"') - 1]
    assert "a quote is opened here and never closed" in problem(write(tmp_path, cut))


def test_otel_counts_each_call_and_each_token_once():
    raw = [json.loads(line) for line in (SAMPLES / "otel-genai-constructed.jsonl").read_text().splitlines()]
    inner = []
    for unit in raw:
        span = unit["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
        found = {a["key"]: next(iter(a["value"].values())) for a in span["attributes"]}
        into = found.get("gen_ai.usage.input_tokens", found.get("gen_ai.usage.prompt_tokens"))
        out = found.get("gen_ai.usage.output_tokens", found.get("gen_ai.usage.completion_tokens"))
        if into is not None:
            run = span["traceId"] if "invoke_agent" in json.dumps(unit) else None
            session = found.get("gen_ai.conversation.id", run)
            inner.append((int(span["startTimeUnixNano"]), int(into), int(out), session))
    inner.sort()
    kept, _ = read(SAMPLES / "otel-genai-constructed.jsonl")
    assert [(r.input_tokens, r.output_tokens, r.session_id) for r in kept] == [row[1:] for row in inner]
    assert [round(r.arrival_s * 1e9) for r in kept] == [row[0] - inner[0][0] for row in inner]


def test_an_export_in_one_long_line_is_one_value(tmp_path, monkeypatch):
    from harness.trace import source as source_module

    spans = [json.loads(line) for line in (SAMPLES / "otel-genai-constructed.jsonl").read_text().splitlines()]
    whole = {"resourceSpans": [group for line in spans for group in line["resourceSpans"]]}
    path = write(tmp_path, json.dumps(whole))
    want = read(path)[0]
    assert len(want) == 11
    monkeypatch.setattr(source_module, "MAX_LINE_BYTES", 1000)
    assert read(path)[0] == want


def span(start: object = "2026-09-21T14:13:20.5Z", id_: str = "01", **attributes: object) -> dict[str, object]:
    usage = {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 5}
    named = {f"gen_ai.{name.replace('__', '.')}": value for name, value in attributes.items()}
    context = {"trace_id": "0x1", "span_id": id_}
    return {"name": "chat", "context": context, "start_time": start, "attributes": usage | named, "status": {}}


def test_otel_other_shapes_and_ambiguities(tmp_path):
    console = "".join(json.dumps(span(id_=str(i)), indent=4) + "\n" for i in range(3))
    assert len(read(write(tmp_path, console))[0]) == 3
    one = {"trace_id": "t", "span_count": 2, "spans": [span(1_790_000_000.25), span(1_790_000_001_500, id_="02")]}
    assert [r.arrival_s for r in read(write(tmp_path, lines(one)))[0]] == [0.0, 1.25]
    assert "not a time since 1970" in problem(write(tmp_path, lines(span(12.5))))
    more = span(usage__cache_read__input_tokens=101, usage__cache_creation__input_tokens=7)
    (beside,), trace = read(write(tmp_path, lines(more)))
    assert (beside.input_tokens, beside.cached_tokens) == (208, 101)
    assert "1 spans count cached tokens beside the input tokens: they were added" in trace.notes
    kept, trace = read(write(tmp_path, lines(span(), span(), span(id_="3", operation__name="embeddings"))))
    assert len(kept) == 1
    assert trace.rows_dropped == {"same span id as an earlier row (a copy)": 1}
    assert "the call has no input tokens and no text" in problem(
        write(tmp_path, lines(span(operation__name="chat", usage__input_tokens=None)))
    )


def generation(**usage: object) -> dict[str, object]:
    row: dict[str, object] = {"id": "o", "traceId": "t", "type": "GENERATION", "startTime": "2026-09-21T14:13:20Z"}
    return row | {"usageDetails": usage}


@pytest.mark.parametrize(
    ("usage", "want"),
    [
        ({"input": 100, "output": 10}, (100, 10)),
        ({"input": 100, "output": 10, "total": 110}, (100, 10)),
        ({"input": 100, "input_cached_tokens": 60, "output": 10, "total": 170}, (160, 10)),
        ({"input": 100, "input_cached_tokens": 60, "output": 10, "total": 110}, (100, 10)),
        (
            {"input": 9, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 1, "output": 1, "total": 71},
            (70, 1),
        ),
        ({"input": 100, "input_cached_tokens": 0, "output": 10}, (100, 10)),
        ({"input": 100, "output": 10, "output_reasoning_tokens": 30, "total": 140}, (100, 40)),
        ({"promptTokens": 3, "completionTokens": 4, "totalTokens": 7}, (3, 4)),
    ],
)
def test_langfuse_counts_cached_tokens_once(tmp_path, usage, want):
    ((record,), _) = read(write(tmp_path, lines(generation(**usage))))
    assert (record.input_tokens, record.output_tokens) == want


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        ({"input": 100, "input_cached_tokens": 60, "output": 10}, "no total says"),
        ({"input": 100, "input_cached_tokens": 60, "output": 10, "total": 150}, "the total of 150 does not say"),
        (
            {"input": 9, "input_cached_tokens": 5, "output": 9, "output_reasoning_tokens": 5, "total": 23},
            "does not say",
        ),
        ({"input": 100, "output": 10, "total": 111}, "does not say"),
        ({"total": 111}, "no input and output"),
        ({"input": 1, "output": 1, "unit": "CHARACTERS"}, "counted in CHARACTERS"),
    ],
)
def test_langfuse_refuses_what_is_ambiguous(tmp_path, usage, words):
    assert words in problem(write(tmp_path, lines(generation(**usage))))


def test_langfuse_prompts_with_tools_are_replayed_by_their_lengths(tmp_path):
    for asked, messages in (({"messages": ASKED}, tuple(ASKED)), ({"messages": ASKED, "tools": [CALL]}, None)):
        ((record,), _) = read(write(tmp_path, lines(generation(input=9, output=2) | {"input": asked})))
        assert (record.messages, record.input_tokens) == (messages, 9)


def test_langfuse_sample_and_snake_case(tmp_path):
    raw = json.loads((SAMPLES / "langfuse-constructed.json").read_text())["data"]
    kept, _ = read(SAMPLES / "langfuse-constructed.json")
    good = [o for o in raw if o["type"] == "GENERATION" and o["level"] != "ERROR"]
    totals = [(o.get("usageDetails") or o["usage"])["total"] for o in sorted(good, key=lambda o: o["startTime"])]
    assert [r.input_tokens + r.output_tokens for r in kept] == totals
    row = {"id": "1", "trace_id": "t", "type": "GENERATION", "start_time": "2026-09-21 14:13:20"}
    assert len(read(write(tmp_path, lines(row | {"usage_details": {"input": 3, "output": 2}})))[0]) == 1


# --- access logs -----------------------------------------------------------------------------------------------------


def test_nginx_arrivals_are_ends_less_the_duration():
    kept, trace = read(SAMPLES / "nginx-constructed.log", arrivals_only=True)
    starts = []
    for line in (SAMPLES / "nginx-constructed.log").read_text().splitlines():
        end = datetime.strptime(re.search(r"\[(.*?)\]", line)[1], "%d/%b/%Y:%H:%M:%S %z")
        if '"POST' in line and '" 200 ' in line:
            starts.append(end.timestamp() - float(re.search(r"rt=([\d.]+)", line)[1]))
    starts.sort()
    assert [r.arrival_s for r in kept] == pytest.approx([s - starts[0] for s in starts], abs=1e-6)
    assert all(r.input_tokens is None for r in kept)
    assert trace.notes[-1].startswith("rows sorted")


def test_envoy_says_the_start():
    kept, _ = read(SAMPLES / "envoy-constructed.log", arrivals_only=True)
    text = (SAMPLES / "envoy-constructed.log").read_text()
    starts = sorted(
        datetime.fromisoformat(line[1:25]).timestamp()
        for line in text.splitlines()
        if '"POST' in line and '" 200 ' in line
    )
    assert [r.arrival_s for r in kept] == pytest.approx([s - starts[0] for s in starts], abs=1e-6)


def test_access_log_variants(tmp_path):
    end = '[21/Sep/2026:14:13:20 +0000] "POST /v1/chat/completions HTTP/1.1" 200 45'
    plain = f'10.0.0.1 - - {end} "-" "curl"\n'
    _, trace = read(write(tmp_path, plain * 2), arrivals_only=True)
    assert any("placed at the END" in note for note in trace.notes)
    ingress = f'10.0.0.1 - - {end} "-" "curl" 512 2.500 [ns-svc-80] [] 10.1.1.1:80 45 2.499 200 abc\n'
    kept, trace = read(write(tmp_path, plain + ingress), arrivals_only=True)
    assert (trace.format, [r.arrival_s for r in kept]) == ("nginx", [0.0, 2.5])
    row = {"msec": 1790000000.5, "request_time": "1.250", "request": "POST /v1/completions HTTP/1.1", "status": 200}
    later = {"time_iso8601": "2026-09-21T16:13:21+02:00", "request_time": 0.25, "request_method": "POST"}
    later |= {"request_uri": "/v1/messages?beta=true", "status": "200"}
    kept, _ = read(write(tmp_path, lines(later, row)), arrivals_only=True)
    assert [(r.line, r.arrival_s) for r in kept] == [(2, 0.0), (1, 1.5)]
    envoy = {"start_time": "2026-09-21T14:13:20.100Z", "method": "POST", "path": "/v1/responses", "response_code": 200}
    assert read(write(tmp_path, lines(envoy)), arrivals_only=True)[1].format == "envoy"
    gateway = {"x-envoy-origin-path" if name == "path" else name: value for name, value in envoy.items()}
    assert len(read(write(tmp_path, lines(gateway)), arrivals_only=True)[0]) == 1


def test_arrivals_alone_are_refused_until_lengths_are_stated():
    from harness.trace.synth import draw_lengths, parse_lengths

    path = SAMPLES / "envoy-constructed.log"
    assert "State the lengths" in problem(path)
    assert "State the lengths" in problem(path, skip_bad=True)
    lengths = draw_lengths(parse_lengths("uniform:low=100,high=200"), parse_lengths("7"), 3)
    trace = open_trace(path, lengths=lengths)
    once = list(trace)
    assert once == list(trace)
    assert {r.output_tokens for r in once} == {7}
    assert all(100 <= r.input_tokens <= 200 for r in once)
    assert len({r.input_tokens for r in once}) > 10
    assert any("drawn from the stated distributions" in note for note in trace.notes)


# --- vLLM's log ------------------------------------------------------------------------------------------------------


def test_vllm_log_joins_request_and_answer():
    text = (SAMPLES / "vllm-requests.log").read_text()
    kept, trace = read(SAMPLES / "vllm-requests.log")
    prompts, outputs, times = {}, Counter(), {}
    for line in text.splitlines():
        if found := re.search(r"Request (\S+) details: .* prompt_token_ids: (\[[^\[]*\]), prompt_embeds", line):
            prompts[found[1]] = len(json.loads(found[2]))
        if found := re.search(r"Generated response (\S+).* details: output_token_ids: (\[.*\])", line):
            outputs[found[1]] += len(json.loads(found[2]))
        if found := re.search(r"(\d\d-\d\d \d\d:\d\d:\d\d) .* Received request (\S+?):", line):
            year = "2027" if found[1].startswith("01") else "2026"
            times[found[2]] = datetime.strptime(f"{year}-{found[1]}", "%Y-%m-%d %H:%M:%S").timestamp()
    aborted = re.search(r"response (\S+): output: '', finish_reason: abort", text)[1]
    want = [id_ for id_ in times if id_ != aborted]
    assert [(r.input_tokens, r.output_tokens) for r in kept] == [(prompts[i], outputs[i] or None) for i in want]
    assert [r.arrival_s for r in kept] == [times[i] - times[want[0]] for i in want]
    shared = [r.prefix_ids[:2] for r in kept if r.input_tokens > 32]
    assert max(Counter(shared).values()) > 1, "requests with the same 32 first tokens share two blocks"
    assert any(note.startswith("1 rows have no output length") for note in trace.notes)


def test_vllm_log_at_info_level_has_no_lengths(tmp_path):
    text = (SAMPLES / "vllm-requests.log").read_text()
    info = "INFO:     Started server process [1]\n" + "".join(
        line + "\n" for line in text.splitlines() if " DEBUG " not in line
    )
    path = write(tmp_path, info)
    assert "State the lengths" in problem(path)
    kept, trace = read(path, arrivals_only=True)
    assert (trace.format, len(kept)) == ("vllm-log", 8)


def test_vllm_log_cut_by_max_log_len_is_noticed(tmp_path):
    def cut(match):
        return f"prompt_token_ids: [{', '.join(match[1].split(', ')[:10])}], prompt_embeds"

    text = (SAMPLES / "vllm-requests.log").read_text()
    path = write(tmp_path, re.sub(r"prompt_token_ids: \[([^\[\]]*)\], prompt_embeds", cut, text))
    _, trace = read(path)
    assert any("cut by --max-log-len?" in note for note in trace.notes)


# --- columnar --------------------------------------------------------------------------------------------------------


def test_columnar_files_have_the_columns_of_our_lines(tmp_path):
    rows = [json.loads(line) for line in (SAMPLES / "example.jsonl").read_text().splitlines()]
    table = pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([{k: v for r in rows for k, v in r.items()}]).schema)
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    with pa.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    with pa.ipc.new_stream(str(tmp_path / "t.arrows"), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    want = read(SAMPLES / "example.jsonl")[0]
    for name in ("t.parquet", "t.arrow", "t.arrows"):
        kept, trace = read(tmp_path / name)
        assert trace.format == "columnar"
        assert [r.line for r in kept] == list(range(1, 21))
        assert [r._replace(line=0) for r in kept] == [r._replace(line=0) for r in want]


def test_columnar_bad_files(tmp_path):
    def parquet(**columns):
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    assert "'input_tokns' (did you mean input_tokens?)" in problem(parquet(input_tokns=[1]))
    assert ":2: Expected int >= 0 at input_tokens" in problem(parquet(input_tokens=[1, -1]))
    assert "arrival_s" in problem(parquet(input_tokens=[1], arrival_s=[float("nan")]))
    raw = parquet(input_tokens=list(range(1, 5000))).read_bytes()
    for damaged in (raw[: len(raw) // 2], raw[:200] + b"\xff" * 300 + raw[500:], b"PAR1"):
        assert "damaged columnar file" in problem(write(tmp_path, damaged))
    assert "damaged columnar file" in problem(write(tmp_path, b"ARROW1\0\0nothing"))


def test_a_plan_is_not_a_trace(tmp_path):
    from harness.plan.file import INFO_KEY

    schema = pa.schema([("request_id", pa.int64())], metadata={INFO_KEY: b"{}"})
    with pa.ipc.new_file(str(tmp_path / "plan.arrow"), schema) as writer:
        writer.write_table(pa.table({"request_id": [1]}, schema=schema))
    assert "is a plan" in problem(tmp_path / "plan.arrow")


# --- times -----------------------------------------------------------------------------------------------------------


@given(
    st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)),
    st.integers(-14 * 60, 14 * 60),
    st.sampled_from(" T"),
)
def test_iso_times_with_offsets_are_exact(moment, offset, between):
    sign = "-" if offset < 0 else "+"
    zone = f"{sign}{abs(offset) // 60:02}:{abs(offset) % 60:02}"
    text = moment.isoformat(sep=between, timespec="microseconds") + zone
    delta = datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)
    want = (delta.days * 86_400 + delta.seconds) * 10**9 + delta.microseconds * 1000
    assert iso_ns("t", text) == want


@given(st.integers(978_307_200, 4_102_444_799), st.integers(0, 999_999_999))
def test_epoch_units_are_told_apart_by_their_size(second, rest):
    ns = second * 10**9 + rest
    assert epoch_ns("t", ns) == ns
    assert epoch_ns("t", str(ns)) == ns
    for unit in (10**3, 10**6, 10**9):
        assert epoch_ns("t", ns // unit) == ns // unit * unit
    assert epoch_ns("t", second + 0.5) == second * 10**9 + 500_000_000


# --- where bytes come from -------------------------------------------------------------------------------------------


def test_standard_input_is_read_as_often_as_needed(monkeypatch):
    raw = (SAMPLES / "azure-code-2023.csv").read_bytes()

    class Stdin:
        buffer = io.BytesIO(raw)

        @staticmethod
        def isatty() -> bool:
            return False

    monkeypatch.setattr("sys.stdin", Stdin)
    trace = open_trace("-")
    assert list(trace) == list(trace) == list(open_trace(SAMPLES / "azure-code-2023.csv"))
    assert trace.source.name == "<stdin>"
    spool = trace.source.path
    assert spool.exists()
    del trace
    assert not spool.exists()


def test_damaged_zstd(tmp_path):
    raw = (SAMPLES / "azure-conv-2023.csv").read_bytes()
    whole = pa.Codec("zstd").compress(raw, asbytes=True)
    assert "ends early" in problem(write(tmp_path, whole[:-100]))
    assert "zstd" in problem(write(tmp_path, whole + b"garbage"))


@pytest.fixture
def s3(monkeypatch):
    """A server that answers signed GETs of two objects as S3 does; the second breaks off."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    body = gzip.compress((SAMPLES / "azure-conv-2023.csv").read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            known = self.path.split("?")[0] in ("/bucket/day/trace.csv.gz", "/bucket/cut")
            self.send_response(200 if known and "AWS4-HMAC-SHA256" in self.headers.get("Authorization", "") else 404)
            answer = body if known else b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>"
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer[:500] if self.path.startswith("/bucket/cut") else answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-a-real-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield
    server.shutdown()
    server.server_close()
    thread.join(120)


def test_s3_objects(s3):
    for name in ("s3://bucket/day/trace.csv.gz", Path("s3://bucket/day/trace.csv.gz")):
        trace = open_trace(name)
        assert trace.source.name == "s3://bucket/day/trace.csv.gz"
        assert list(trace) == list(open_trace(SAMPLES / "azure-conv-2023.csv"))
    with pytest.raises(TraceError, match=r"cannot read from S3.*NoSuchKey"):
        open_trace("s3://bucket/none")
    with pytest.raises(TraceError, match="broke off"):
        open_trace("s3://bucket/cut")
    with pytest.raises(TraceError, match="BUCKET/KEY"):
        open_trace("s3://bucket")


def test_the_readme_has_every_field_of_our_lines():
    fields = (SAMPLES / "README.md").read_text().split("## Our JSON Lines")[1]
    assert [name for name in FIELDS if f"`{name}`" not in fields] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.replace(b"\r\n", b"\r"), "it looks like azure with lines that end in a carriage return"),
        (lambda raw: b'\n{"arrival_s": 1\n', "t:2: .*it is no JSON object on one line"),
    ],
    ids=["carriage return", "json"],
)
def test_what_is_nearly_a_trace_is_told_what_is_wrong(tmp_path, change, said):
    path = tmp_path / "t"
    path.write_bytes(change((SAMPLES / "azure-conv-2023.csv").read_bytes()))
    with pytest.raises(TraceError, match=said):
        open_trace(path)


# --- shapes that exports have in the wild -----------------------------------------------------------------------------


def observation(**more: object) -> dict[str, object]:
    return {
        "id": "d8ab9e3ca45022e6", "traceId": "6908d6bf", "startTime": "2026-04-04T06:21:09.835Z", "type": "GENERATION",
        "level": "DEFAULT", "sessionId": None, "usage": None, "inputUsage": 24, "outputUsage": 1407,
        "usageDetails": {
            "input": 24, "output": 378, "input_cached_tokens": 0, "output_reasoning_tokens": 1029, "total": 1431
        },
    } | more  # fmt: skip


SPAN = observation(id="94c48e15", type="SPAN", usageDetails={})
SAVED = {"trace": {"id": "6908d6bf", "sessionId": "matter-1", "observations": [SPAN, observation()]}}
SPEND = {
    "request_id": "r1", "call_type": "acompletion", "startTime": "2026-07-30T13:45:02.234Z", "total_tokens": 30,
    "prompt_tokens": 10, "completion_tokens": 20, "metadata": {}, "cache_hit": "None", "status": "success",
}  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("document", "format_", "rows", "read"),
    [
        (SAVED | {"observations": [SPAN, observation()]}, "langfuse", [(24, 1407, "matter-1")], 1),
        (SAVED["trace"], "langfuse", [(24, 1407, "matter-1")], 1),
        ({"data": [observation(sessionId="s"), SPAN], "meta": {}}, "langfuse", [(24, 1407, "s")], 1),
        ({"data": [SPEND, SPEND | {"request_id": "r2", "status": "failure"}], "total": 2, "page": 1, "page_size": 50,
          "total_pages": 1}, "litellm", [(10, 20, None)], 2),
    ],
    ids=["saved from the web page", "a trace of the api", "page of observations", "page of spend logs"],
)  # fmt: skip
def test_pages_and_traces_of_an_api_are_read(tmp_path, document, format_, rows, read, indent):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(document, indent=indent))
    trace = open_trace(path)
    assert [(r.input_tokens, r.output_tokens, r.session_id) for r in trace] == rows
    assert (trace.format, trace.rows_read) == (format_, read)


def test_a_document_may_begin_in_the_middle_of_its_first_line(tmp_path):
    whole = json.dumps({"data": [SPEND]})
    path = tmp_path / "export.json"
    path.write_text(whole.replace("[{", "[\n{").replace(', "total', ',\n"total'))
    assert [r.input_tokens for r in open_trace(path)] == [10]


@pytest.mark.parametrize(
    ("before", "ids", "tokens", "text"),
    [
        ("INFO 12-06 14:09:27 logger.py:37] ", "[128000, 12805]", 2, None),
        ("INFO 02-20 21:36:30 async_llm_engine.py:433] ", "[1, 2, 3]", 3, None),
        ("INFO 04-10 18:13:14 logger.py:39] ", "None", None, '<|user|>it\'s "one"\n, params: \\ two'),
        ("INFO 09-03 03:00:37 [logger.py:43] ", "[785]", 1, None),
        ("vllm-1  | (APIServer pid=1) INFO 11-05 12:39:35 [logger.py:40] ", "[4, 5]", 2, None),
        (
            "2026-09-27T17:41:52.911167085Z stdout F (APIServer pid=1) INFO 09-27 15:41:52 [logger.py:40] ",
            "[4]",
            1,
            None,
        ),
        ("(task, pid=33413) INFO 06-21 09:15:27 async_llm_engine.py:582] ", "[4]", 1, None),
    ],
    ids=["0.6", "0.3", "0.8, chat", "0.10", "compose", "kubernetes", "ray"],
)
def test_vllm_logs_of_all_ages(tmp_path, before, ids, tokens, text):
    path = tmp_path / "server.log"
    path.write_text(
        "INFO:     Started server process [1]\n"
        f"{before}Received request cmpl-24f0-0: prompt: {text!r}, params: SamplingParams(n=1, stop=[], "
        f"max_tokens=512), prompt_token_ids: {ids}, lora_request: None.\n"
    )
    (record,) = open_trace(path)
    assert (record.input_tokens, record.text) == (tokens, text)


AUDITED = {
    "arrival_s": 0.0, "prompt": "Capital of Italy?", "max_tokens": 20, "expected": "Rome", "weight": 2.5,
    "check": {"type": "exact", "fold": True}, "gate": {"schema": {"type": "string"}, "type": "json_schema"},
    "tags": {"task": "extract", "team": "billing"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_what_answers_are_judged_by_is_carried_and_written(tmp_path, name):
    (record,), _ = read(write(tmp_path, json.dumps(AUDITED)))
    assert (record.max_tokens, record.expected, record.weight) == (20, ("Rome",), 2.5)
    assert json.loads(record.check) == AUDITED["check"] and json.loads(record.gate) == AUDITED["gate"]
    assert record.tags == (("task", "extract"), ("team", "billing"))
    write_trace([record], tmp_path / name)
    assert read(tmp_path / name)[0] == [record]
    (anonymous,) = anonymize([record._replace(text=None, input_tokens=5)], salt=bytes(16), tokenizer=None)
    assert (anonymous.expected, anonymous.check, anonymous.gate, anonymous.tags) == (None,) * 4, "words of users"
    assert (anonymous.max_tokens, anonymous.weight) == (20, 2.5)


@pytest.mark.parametrize(
    "bad", [{"check": "[1]"}, {"check": "no JSON"}, {"gate": [1]}, {"tags": {"a": 1}}, {"expected": []},
            {"expected": ""}, {"max_tokens": 0}, {"weight": 0}],
)  # fmt: skip
def test_what_answers_are_judged_by_is_refused_where_it_is_none(tmp_path, bad):
    assert f"{next(iter(bad))}" in problem(write(tmp_path, json.dumps({"prompt": "a", **bad})))
