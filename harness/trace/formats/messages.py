"""Conversations and API calls as messages: chat logs, and logs of OpenAI's and Anthropic's APIs.

Chat logs: whole conversations, one JSON object each (ShareGPT, LMSYS, WildChat, fine-tuning files).

``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``, ``{"conversation": [{"role",
"content"}]}`` or ``{"messages": [{"role", "content"}]}`` that ends with an answer. Each answer was a request of its
own: its messages are all that went before it, its session the conversation, its turn the count of answers before. A
question at the end that nobody answered is a request too. A function call is an answer (``from: function_call``,
``tool_calls``), what the function gave back (``observation``, ``tool``) a message: both are sent as their text.
Definitions of tools, images, sound and video are not sent, and a note says of how many requests that is true.

There are no times per request (where the log has one for the conversation, it says nothing about the turns) and no
token counts: ``--tokenizer`` on the trace verbs counts prompts and answers.

Source: the ShareGPT, LMSYS-Chat-1M and WildChat data cards; OpenAI's fine-tuning format.

Logs of OpenAI's and Anthropic's APIs: batch files, request bodies, and responses, one JSON object each.

==========================================  ==========================================================================
``{"custom_id", "url", "body": {...}}``     batch input: what was asked; no times, no output length
``{"custom_id", "response": {...}}``        batch output: ``usage``; no prompt, no times (an offline workload has none)
``{"custom_id", "params": {...}}``          Anthropic batch input, and output: ``{"custom_id", "result": {...}}``
``{"request": {...}, "response": {...}}``   a logged call: the prompt, ``usage``, and a time
``{"object": "chat.completion", ...}``      a response: ``usage`` and ``created``; also ``{"type": "message", ...}``
``{"model", "messages"}`` or ``"prompt"``   a request body
==========================================  ==========================================================================

What ``usage`` counts: `harness.trace.formats.values`. The arrival is the log's own time (``timestamp``, ``time``,
``start_time`` ...), or else ``created`` of the answer, in whole seconds since 1970. ``max_tokens`` is a limit, not a
length, and is not taken for one. Prompts that are more than text (images, tool calls, definitions of tools) are not
sent; a call that has ``usage`` is then replayed by its lengths. Without it, the text beside definitions of tools is
sent alone, and a note says so; others are refused.

A system prompt beside the messages (Anthropic's ``system``, ``instructions`` of Responses) goes before them.

Source: OpenAI API reference (Batch, Chat, Completions, Responses); Anthropic API reference (Messages).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from harness.trace.formats.jsonl import Jsonl, answered
from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, Rows, TraceRecord, safe
from harness.trace.formats.values import (
    Copies,
    called,
    decode_object,
    fields_of,
    plain_messages,
    plain_text,
    show,
    usage_of,
    wall_clock_ns,
)

_TURNS = ("conversations", "conversation", "messages")
_IDS = ("id", "conversation_id", "conversation_hash", "session_id")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "system", "tool": "tool",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool", "tool_call": "assistant",
}  # fmt: skip
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_MARKS = ("<image>", "<video>", "<audio>", "<image_placeholder>")


class ChatLog(Reader):
    """Reader of chat logs."""

    summary = "chat log (JSON or JSON Lines: ShareGPT conversations, LMSYS, WildChat, messages ending with an answer)"
    clock = "none: a conversation has no time for each request"
    sends_text = True

    def __init__(self) -> None:
        self._conversations = self._media = self._tools = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A list of turns, and nothing that another format has."""
        fields = fields_of(record)
        if any(fields.get(name, b"").startswith(b"[") for name in _TURNS[:2]):
            return True
        others = {"input_tokens", "output_tokens", "arrival_s", "custom_id", "usage", "startTime", "answer"}
        return "messages" in fields and not fields.keys() & others and answered(fields["messages"])

    def parse(self, record: bytes) -> Rows:
        """Read one conversation."""
        value = decode_object(record)
        turns = next((value[name] for name in _TURNS if isinstance(value.get(name), list)), None)
        if turns is None:
            raise RowError("no conversation", f"no list {' or '.join(_TURNS)} in {show(record)}")
        self._conversations += 1
        named = next((str(value[name]) for name in _IDS if isinstance(value.get(name), str | int)), "")
        session = named or f"conversation-{self._conversations}"
        said = [_message(turn) for turn in turns]
        files = any(value.get(name) for name in _MEDIA)
        defined = any(value.get(name) not in (None, "", "[]", []) for name in ("tools", "functions"))
        rows: list[TraceRecord | LeftOutError] = []
        for at, turn in enumerate([*said, None]):
            if at and (turn is None or turn.message["role"] == "assistant"):
                before = said[:at]
                if turn is None and before[-1].message["role"] == "assistant":
                    break
                row = TraceRecord(
                    None, None, None, session, len(rows), messages=tuple(each.message for each in before),
                    answer=None if turn is None else turn.message["content"],
                )  # fmt: skip
                if turn is not None and not turn.message["content"]:
                    rows.append(FailedCallError("empty answer (failed call)"))
                    continue
                rows.append(row)
                self._media += any(each.media for each in before) or files
                self._tools += defined or any(each.calls for each in before)
        return rows

    def notes(self) -> list[str]:
        """What of the prompts is not sent, or not as it was."""
        said = []
        if self._media:
            said.append(
                f"{self._media} requests had images, sound or video, which are not sent: their prompts are shorter "
                "than they were in production"
            )
        if self._tools:
            said.append(
                f"{self._tools} requests had tools: calls and results are sent as their text, definitions are not sent"
            )
        return said


class _Said(NamedTuple):
    """One turn."""

    message: dict[str, str]
    media: bool
    """It had an image, sound or video."""
    calls: bool
    """It is a function call, or what came of one."""


def _message(turn: Any) -> _Said:
    if not isinstance(turn, dict):
        raise RowError("bad turn", "a turn of the conversation is not an object")
    speaker = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    made = turn.get("tool_calls") or turn.get("function_call")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    text, media = _text(content)
    if text is None and not made:
        raise RowError("not text", "a turn of the conversation is neither text nor a call of a tool")
    if role is None:
        raise RowError("unknown speaker", f"a turn is from {show(str(speaker))}, expected {', '.join(sorted(_ROLES))}")
    if made:
        text = (text or "") + msgspec.json.encode(made).decode()
    calls = bool(made) or role == "tool" or speaker in ("function_call", "tool_call")
    return _Said({"role": role, "content": text or ""}, media, calls)


def _text(content: Any) -> tuple[str | None, bool]:
    """The text of a turn, and whether it had something that is none."""
    if isinstance(content, str):
        return content, any(mark in content for mark in _MARKS)
    if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
        return None, False
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known), len(known) < len(texts)


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
