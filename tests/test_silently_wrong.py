"""What readers once read wrongly without a word: prompts, counts and times that exports state in another way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.trace.formats.record import TraceRecord, is_whole_prompt
from harness.trace.formats.values import TokenCounts, usage_of
from harness.trace.io import Trace, open_trace

USER = {"role": "user", "content": "Name three rivers of France, please."}
SYSTEM = {"role": "system", "content": "You are brief."}


def read(tmp_path: Path, *rows: object, **options: object) -> tuple[list[TraceRecord], Trace]:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = open_trace(path, **options)  # type: ignore[arg-type]
    return list(trace), trace


# --- Langfuse inputs -------------------------------------------------------------------------------------------------


def observation(asked: object, **more: object) -> dict[str, object]:
    row = {"id": "o", "traceId": "t", "type": "GENERATION", "startTime": "2026-09-21T14:13:20Z", "input": asked}
    return row | {"usageDetails": {"input": 20, "output": 5, "total": 25}} | more


@pytest.mark.parametrize(
    ("asked", "messages", "text"),
    [
        ([SYSTEM, USER], (SYSTEM, USER), None),
        ({"messages": [USER]}, (USER,), None),
        (json.dumps([SYSTEM, USER]), (SYSTEM, USER), None),
        (json.dumps({"messages": [SYSTEM, USER], "temperature": 0}), (SYSTEM, USER), None),
        (json.dumps({"messages": [USER], "tools": [{"type": "function"}]}), None, None),
        (json.dumps({"messages": [USER], "tools": []}), (USER,), None),
        (json.dumps({"contents": [{"role": "user", "parts": [{"text": "Why is it so?"}]}]}),
         ({"role": "user", "content": "Why is it so?"},), None),
        (json.dumps({"contents": [{"parts": [{"inlineData": {}}]}]}), None, None),
        (json.dumps({"question": "Why?"}), None, None),
        (json.dumps({"messages": ["role='user' content='Why?'"]}), None, None),
        (json.dumps("Why is the sky blue at noon?"), None, "Why is the sky blue at noon?"),
        (json.dumps({"messages": [USER]})[:-9], None, None),
        ("Name three rivers of France.", None, "Name three rivers of France."),
        ("[INST] Name three rivers of France. [/INST]", None, "[INST] Name three rivers of France. [/INST]"),
        ("system: be brief\nuser: three rivers?", None, None),
    ],
)  # fmt: skip
def test_an_input_is_decoded_or_replayed_by_its_length(tmp_path, asked, messages, text):
    ((record,), trace) = read(tmp_path, observation(asked))
    assert (record.messages, record.text, record.input_tokens) == (messages, text, 20)
    assert any("replayed by their lengths" in note for note in trace.notes) is (messages is None and text is None)


def test_an_input_alone_is_a_call_and_an_empty_generation_is_none(tmp_path):
    alone = observation([USER], usageDetails={"input": 20, "total": 20})
    event = observation(None, id="p", usageDetails={})
    kept, trace = read(tmp_path, alone, event)
    assert [(r.input_tokens, r.output_tokens) for r in kept] == [(20, None)]
    assert trace.rows_dropped == {"generation without tokens, input or output (an event of another)": 1}
    (only_text,), _ = read(tmp_path, observation([USER], usageDetails=None))
    assert (only_text.messages, only_text.input_tokens) == ((USER,), None)


def test_thoughts_of_gemini_are_output(tmp_path):
    usage = {"usageDetails": {"input": 20, "output": 5, "total": 65}}
    ((record,), trace) = read(tmp_path, observation([USER], model="google/gemini-2.5-pro", **usage))
    assert (record.input_tokens, record.output_tokens, record.model) == (20, 45, "google/gemini-2.5-pro")
    assert any("thoughts" in note for note in trace.notes)


# --- text and count --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "text", "messages", "whole"),
    [
        (None, "a", None, True),
        (300, None, None, True),
        (5, "Name three rivers.", None, True),
        (7, "a", None, True),  # its beginning and end marks
        (300, "Name three rivers.", None, False),
        (80, None, ({"role": "user", "content": "hi"},), True),  # a template with a system prompt of its own
        (300, None, ({"role": "user", "content": "hi"},), False),
        (3, "x" * 2000, None, False),
        (300, "東京" * 200, None, True),
    ],
)
def test_a_text_that_cannot_be_the_whole_prompt(tokens, text, messages, whole):
    assert is_whole_prompt(TraceRecord(0, tokens, 1, text=text, messages=messages)) is whole


def test_what_is_not_the_whole_prompt_is_replayed_by_its_length(tmp_path):
    ((record,), trace) = read(tmp_path, observation([USER], usageDetails={"input": 3000, "output": 5}))
    assert (record.messages, record.input_tokens) == (None, 3000)
    assert any(note.startswith("1 rows have a text that cannot be the whole prompt") for note in trace.notes)
    ((own,), _) = read(tmp_path, {"prompt": "a", "input_tokens": 3000})
    assert own.text == "a"  # our own rows are written to be sent


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usage", "want"),
    [
        ({"input_tokens": 5, "output_tokens": 9, "cache_creation_input_tokens": 100, "cache_read_input_tokens": 3000},
         TokenCounts(3105, 9, 3000)),
        ({"input_tokens": 5, "output_tokens": 9, "cache_creation_input_tokens": None, "cache_read_input_tokens": 0},
         TokenCounts(5, 9, 0)),
        ({"prompt_tokens": 30_005, "completion_tokens": 50, "cache_read_input_tokens": 30_000},
         TokenCounts(30_005, 50, 30_000)),
        ({"prompt_tokens": 90, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 64}},
         TokenCounts(90, 5, 64)),
        ({"input_tokens": 90, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 64}},
         TokenCounts(90, 5, 64)),
        ({"input_tokens": "90", "output_tokens": 5.0}, TokenCounts(90, 5, None)),
        ({}, TokenCounts(None, None, None)),
        (None, TokenCounts(None, None, None)),
    ],
)  # fmt: skip
def test_cached_tokens_are_counted_once(usage, want):
    assert usage_of(usage) == want


ANTHROPIC = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "stop_reason": "end_turn",
    "content": [{"type": "text", "text": "The Loire"}, {"type": "text", "text": " and others."}],
    "usage": {"input_tokens": 7, "cache_creation_input_tokens": 10, "cache_read_input_tokens": 20, "output_tokens": 6},
}  # fmt: skip


def test_anthropic_prompts_have_their_system_prompt_and_their_cache(tmp_path):
    request = {"model": "claude", "max_tokens": 99, "messages": [USER]}
    for system in ("You are brief.", [{"type": "text", "text": "You are brief.", "cache_control": {}}]):
        ((record,), trace) = read(tmp_path, {"request": request | {"system": system}, "response": ANTHROPIC})
        assert trace.format == "openai"
        assert (record.messages, record.answer) == ((SYSTEM, USER), "The Loire and others.")
        assert (record.input_tokens, record.cached_tokens, record.output_tokens) == (37, 20, 6)
        assert record.model == "claude"
    kept, _ = read(tmp_path, ANTHROPIC, ANTHROPIC)
    assert [(r.input_tokens, r.output_tokens) for r in kept] == [(37, 6)] * 2
    responses = {"model": "m", "instructions": "You are brief.", "input": USER["content"]}
    ((record,), _) = read(tmp_path, {"request": responses, "response": {"usage": None}})
    assert record.messages == (SYSTEM, USER)


@pytest.mark.parametrize(
    ("times", "want"),
    [
        (("2026-03-15T12:00:00Z", "2026-03-15T12:05:00.5Z"), 300.5),
        ((1_790_000_000, 1_790_000_003), 3.0),
        ((1_790_000_000_250, 1_790_000_003_500), 3.25),
        (("1790000000.25", "1790000003.5"), 3.25),
    ],
)
@pytest.mark.parametrize("name", ["timestamp", "time", "start_time", "created_at"])
def test_a_logged_call_arrives_when_its_log_says(tmp_path, name, times, want):
    usage = {"prompt_tokens": 20, "completion_tokens": 5}
    rows = [{name: t, "request": {"model": "m", "messages": [USER]}, "response": {"usage": usage}} for t in times]
    kept, _ = read(tmp_path, *rows)
    assert [r.arrival_s for r in kept] == [0.0, want]


def test_envoy_ai_gateway_counts_are_kept(tmp_path):
    def line(at: int, **more: object) -> dict[str, object]:
        row = {"start_time": f"2025-10-06T10:00:0{at}.123Z", "method": "POST", "response_code": 200}
        return row | {"x-envoy-origin-path": "/v1/chat/completions"} | more

    counts = {"gen_ai.usage.input_tokens": "20", "gen_ai.usage.output_tokens": 100, "session.id": "s1"}
    model = {"gen_ai.request.model": "big", "gen_ai.response.model": "big-2024"}
    kept, _ = read(tmp_path, line(1, **counts, **model), line(0, **counts, **model))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.session_id, r.model) for r in kept] == [
        (at, 20, 100, "s1", "big-2024") for at in (0.0, 1.0)
    ]
    (bare,), _ = read(tmp_path, line(0, **{"gen_ai.usage.input_tokens": "-"}), arrivals_only=True)
    assert bare.input_tokens is None


# --- chat logs -------------------------------------------------------------------------------------------------------

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def said(tmp_path: Path, conversation: dict[str, object]) -> tuple[list[int], str]:
    """Messages before each answer, and the notes."""
    kept, trace = read(tmp_path, conversation)
    assert trace.format == "chat"
    return [len(r.messages or ()) for r in kept], " ".join(trace.notes)


def test_function_calls_of_a_chat_log_are_answers(tmp_path):
    turns = [("human", "q"), ("function_call", '{"name": "f"}'), ("observation", "42"), ("gpt", "It is 42.")]
    log = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": '[{"name": "f"}]'}
    counts, notes = said(tmp_path, log)
    assert counts == [1, 3]
    assert "2 requests had tools" in notes
    kept, _ = read(tmp_path, log)
    assert [r.answer for r in kept] == ['{"name": "f"}', "It is 42."]
    assert [m["role"] for m in kept[1].messages or ()] == ["user", "assistant", "tool"]
    called = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "42"}]
    counts, notes = said(tmp_path, {"messages": [*called, {"role": "assistant", "content": "It is 42."}]})
    assert counts == [1, 3]
    assert "1 requests had tools" in notes
    plain = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"}
    assert said(tmp_path, plain) == ([1], "")


@pytest.mark.parametrize(
    "log",
    [
        {"messages": [USER, {"role": "assistant", "content": "a"}], "images": ["1.jpg"]},
        {"conversations": [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "a"}]},
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": {}}]},
            {"role": "assistant", "content": "a"},
        ]},
        {"messages": [USER, {"role": "assistant", "content": "a"}], "videos": ["1.mp4"]},
    ],
)  # fmt: skip
def test_images_of_a_chat_log_are_missed_aloud(tmp_path, log):
    counts, notes = said(tmp_path, log)
    assert counts == [1]
    assert "1 requests had images, sound or video, which are not sent" in notes
