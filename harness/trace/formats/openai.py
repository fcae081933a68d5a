"""Logs of OpenAI's and Anthropic's APIs: batch files, request bodies, and responses, one JSON object each.

==========================================  ==========================================================================
``{"custom_id", "url", "body": {...}}``     batch input: what was asked; no times, no output length
``{"custom_id", "response": {...}}``        batch output: ``usage``; no prompt, no times (an offline workload has none)
``{"custom_id", "params": {...}}``          Anthropic batch input, and output: ``{"custom_id", "result": {...}}``
``{"request": {...}, "response": {...}}``   a logged call: the prompt, ``usage``, and a time
``{"object": "chat.completion", ...}``      a response: ``usage`` and ``created``; also ``{"type": "message", ...}``
``{"model", "messages"}`` or ``"prompt"``   a request body
==========================================  ==========================================================================

What ``usage`` counts: `harness.trace.formats.usage`. The arrival is the log's own time (``timestamp``, ``time``,
``start_time`` ...), or else ``created`` of the answer, in whole seconds since 1970. ``max_tokens`` is a limit, not a
length, and is not taken for one. Prompts that are more than text (images, tool calls, definitions of tools) are not
sent; a call that has ``usage`` is then replayed by its lengths. Without it, the text beside definitions of tools is
sent alone, and a note says so; others are refused.

A system prompt beside the messages (Anthropic's ``system``, ``instructions`` of Responses) goes before them.

Source: OpenAI API reference (Batch, Chat, Completions, Responses); Anthropic API reference (Messages).
"""

from __future__ import annotations

from typing import Any

from harness.trace.formats.jsonl import Jsonl
from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, TraceRecord, safe
from harness.trace.formats.usage import usage_of
from harness.trace.formats.values import (
    Copies,
    called,
    decode_object,
    fields_of,
    plain_messages,
    plain_text,
    wall_clock_ns,
)

_TEXT_URLS = ("/completions", "/responses")
_OTHERS = {"usage", "startTime", "traceId", "trace_id", "prompt_tokens", "conversation"}
_OBJECTS = ("chat.completion", "text_completion", "response")
_TIMES = (
    "timestamp", "time", "start_time", "startTime", "started_at", "request_time", "created_at", "ts", "@timestamp",
)  # fmt: skip


class OpenAI(Reader):
    """Reader of OpenAI batch files and API logs."""

    summary = "OpenAI batch input or output, or logged requests and responses of OpenAI or Anthropic (JSON Lines)"
    clock = "the log's own time, a date or a time since 1970 whose size shows the unit; else created of the answer"
    in_order = False

    def __init__(self) -> None:
        self._copies = Copies("custom_id")
        self._not_text = self._without_tools = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """One of the shapes."""
        fields = fields_of(record)
        names = fields.keys()
        return (
            {"custom_id", "body"} <= names
            or {"custom_id", "response"} <= names
            or ("custom_id" in names and any(fields.get(name, b"").startswith(b"{") for name in ("params", "result")))
            or ({"request", "response"} <= names and "latencies" not in names and fields["request"].startswith(b"{"))
            or fields.get("object", b"").strip(b'"').decode("utf-8", "replace") in _OBJECTS
            or (fields.get("type") == b'"message"' and {"role", "content", "usage"} <= names)
            or (
                "model" in names
                and bool(names & {"messages", "prompt"})
                and not (names & _OTHERS or Jsonl.sniff(record))
            )
        )

    def parse(self, record: bytes) -> TraceRecord:
        """Read one object."""
        value = decode_object(record)
        if "custom_id" in value:
            self._copies.check(str(value["custom_id"]))
        url = value.get("url")
        if isinstance(url, str) and not url.endswith(_TEXT_URLS):
            raise LeftOutError(f"not a text completion ({url[:40]})")
        request, response = _shape(value)
        usage = usage_of(response.get("usage"))
        text, messages, prompt_ids = _prompt(request)
        input_tokens = prompt_ids if usage.input_tokens is None else usage.input_tokens
        if request.get("tools") or request.get("functions"):
            if input_tokens is None:
                self._without_tools += 1
            else:
                text = messages = None
        if text is None and messages is None:
            if input_tokens is None:
                raise RowError("no text", "neither a prompt of text only nor usage: nothing to send")
            self._not_text += bool(request) and prompt_ids is None
        called(input_tokens, usage.output_tokens)
        model = response.get("model") or request.get("model")
        return TraceRecord(
            None if "custom_id" in value else _arrival_ns(value, response),
            input_tokens,
            usage.output_tokens,
            text=text,
            messages=messages,
            answer=_answer(response),
            model=model if isinstance(model, str) else None,
            cached_tokens=usage.cached_tokens,
        )

    def notes(self) -> list[str]:
        """Prompts that cannot be sent as they are."""
        said = []
        if self._not_text:
            said.append(f"{self._not_text} prompts are more than text (images, tools): replayed by their lengths")
        if self._without_tools:
            said.append(
                f"{self._without_tools} requests define tools, which are not sent: their prompts are shorter than they "
                "were in production"
            )
        return said


def _shape(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(request body, response body) of any of the shapes; empty where there is none. Raises `FailedCallError`."""
    if value.get("error"):
        raise FailedCallError("failed call (error)")
    if isinstance(value.get("params"), dict):
        return value["params"], {}
    if isinstance(result := value.get("result"), dict):
        if not isinstance(result.get("message"), dict):
            raise FailedCallError(f"failed call (batch: {safe(str(result.get('type')), 20)})")
        return {}, result["message"]
    response = value.get("response")
    if isinstance(response, dict):
        if isinstance(response.get("status_code"), int) and response["status_code"] >= 400:
            raise FailedCallError(f"failed call (HTTP {response['status_code']})")
        response = response["body"] if isinstance(response.get("body"), dict) else response
        if response.get("error"):
            raise FailedCallError("failed call (error)")
    if isinstance(value.get("body"), dict):
        return value["body"], response if isinstance(response, dict) else {}
    if isinstance(response, dict):
        return value["request"] if isinstance(value.get("request"), dict) else {}, response
    return ({}, value) if value.get("object") in _OBJECTS or value.get("type") == "message" else (value, {})


def _arrival_ns(value: dict[str, Any], response: dict[str, Any]) -> int | None:
    """Of a log's entry: its own time, which is finer than the answer's."""
    for name in _TIMES if response is not value else ():
        if isinstance(value.get(name), str | int | float) and value[name] != "":
            return wall_clock_ns(name, value[name])
    created = response.get("created") or response.get("created_at")
    return None if created is None else wall_clock_ns("created", created)


def _prompt(request: dict[str, Any]) -> tuple[str | None, tuple[dict[str, str], ...] | None, int | None]:
    """(text, messages, number of token ids): at most one is set."""
    asked = next((request[name] for name in ("messages", "prompt", "input") if request.get(name) is not None), None)
    if isinstance(asked, str) and asked:
        instructions = request.get("instructions")
        if isinstance(instructions, str) and instructions:
            return None, ({"role": "system", "content": instructions}, {"role": "user", "content": asked}), None
        return asked, None, None
    if isinstance(asked, list) and asked and all(type(i) is int for i in asked):
        return None, None, len(asked)
    messages = plain_messages(asked)
    before = next((request[name] for name in ("system", "instructions") if request.get(name)), None)
    if messages is None or before is None:
        return None, messages, None
    system = plain_text(before)
    return None, None if system is None else ({"role": "system", "content": system}, *messages), None


def _answer(response: dict[str, Any]) -> str | None:
    if response.get("type") == "message":
        return plain_text(response.get("content"))
    choices = response.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    answer = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    return answer if isinstance(answer, str) else None
