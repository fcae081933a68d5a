"""Conversations: chat logs, calls of OpenAI's and Anthropic's APIs, and the session logs of coding agents.

**Chat logs** are whole conversations. Each answer was a request of its own: its messages are all that went before it,
its turn the count of answers before. A question at the end that nobody answered is a request too. Function calls and
what they gave back are sent as their text; definitions of tools and media are not, and a note says so. There are no
times per request and no token counts.

**Calls of an API**: batch input (OpenAI's ``body``, Anthropic's ``params``) and output, logged pairs of ``request`` and
``response``, responses or request bodies alone. The arrival is the log's own time, or else ``created`` of the answer.
``max_tokens`` is a limit, not a length. Prompts that are more than text are replayed by the lengths that ``usage``
states; without it the text beside definitions of tools is sent alone, and others are refused.

**Claude Code** writes the parts of one answer on lines of their own, with the same ``message.id`` and growing
``usage``: the last counts. A call arrives when the line before it in the session was written. ``isSidechain`` marks a
sub-agent, a session of its own. A resumed session copies old lines: each message is read once. **Codex** states the
tokens of a call in ``last_token_usage``; equal running totals mean the same event again.

Source: the ShareGPT, LMSYS-Chat-1M and WildChat data cards; OpenAI and Anthropic API references; ryoppippi/ccusage;
openai/codex, ``protocol.rs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from harness.trace.formats.jsonl import Jsonl, answered
from harness.trace.formats.record import (
    FailedCallError,
    Item,
    LeftOutError,
    Object,
    Place,
    Reader,
    RowError,
    Rows,
    TraceRecord,
    decode_object,
    fields_of,
    find,
    object_of,
    safe,
    show,
    text_of,
)
from harness.trace.formats.values import (
    Copies,
    count_of,
    iso_ns,
    plain_messages,
    plain_text,
    usage_of,
    wall_clock_ns,
)

_TURNS = ("conversations", "conversation", "messages")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "system", "tool": "tool",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool", "tool_call": "assistant",
}  # fmt: skip
_MEDIA_NOTE = (
    "requests had images, sound or video, which are not sent: their prompts are shorter than they were in production"
)
_TOOLS_NOTE = "requests had tools: calls and results are sent as their text, definitions are not sent"
_NOT_TEXT = "prompts are more than text (images, tools): replayed by their lengths"
_WITHOUT_TOOLS = "requests define tools, which are not sent: their prompts are shorter than they were in production"
_MARKS = ("<image>", "<video>", "<audio>", "<image_placeholder>")


class ChatLog(Reader):
    summary = "chat log (JSON or JSON Lines: ShareGPT conversations, LMSYS, WildChat, messages ending with an answer)"
    clock = "none: a conversation has no time for each request"
    sends_text = True

    def __init__(self) -> None:
        self._conversations = 0

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        if any(fields.get(name, b"").startswith(b"[") for name in _TURNS[:2]):
            return True
        others = {"input_tokens", "output_tokens", "arrival_s", "custom_id", "usage", "startTime", "answer"}
        return "messages" in fields and not fields.keys() & others and answered(fields["messages"])

    def parse(self, record: bytes) -> Rows:
        value = decode_object(record)
        turns = next((found for name in _TURNS if isinstance(found := value.get(name), list)), None)
        if turns is None:
            raise RowError("no conversation", f"no list {' or '.join(_TURNS)} in {show(record)}")
        self._conversations += 1
        named = find(value, "id", "conversation_id", "conversation_hash", "session_id")
        session = str(named) if isinstance(named, str | int) else f"conversation-{self._conversations}"
        said = [_message(turn) for turn in turns]
        files = any(value.get(name) for name in ("images", "image", "videos", "video", "audios", "audio"))
        defined = any(value.get(name) not in (None, "", "[]", []) for name in ("tools", "functions"))
        rows: list[Item] = []
        ends = [at for at, turn in enumerate(said) if at and turn[0]["role"] == "assistant"]
        if said and said[-1][0]["role"] != "assistant":
            ends.append(len(said))  # a question that nobody answered
        for at in ends:
            answer = said[at][0]["content"] if at < len(said) else None
            if answer == "":
                rows.append(FailedCallError("empty answer (failed call)"))
                continue
            messages = tuple(message for message, _, _ in said[:at])
            rows.append(TraceRecord(None, None, None, session, len(rows), messages=messages, answer=answer))
            self.noted[_MEDIA_NOTE] += any(media for _, media, _ in said[:at]) or files
            self.noted[_TOOLS_NOTE] += defined or any(calls for _, _, calls in said[:at])
        return rows


def _message(turn: Any) -> tuple[dict[str, str], bool, bool]:
    """(one turn as a message, whether it had media, whether it is a function call or what came of one)."""
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
    return {"role": role, "content": text or ""}, media, calls


def _text(content: Any) -> tuple[str | None, bool]:
    if isinstance(content, str):
        return content, any(mark in content for mark in _MARKS)
    if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
        return None, False
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known), len(known) < len(texts)


_OTHERS = {"usage", "startTime", "traceId", "trace_id", "prompt_tokens", "conversation"}
_OBJECTS = ("chat.completion", "text_completion", "response")
_TIMES = (
    "timestamp", "time", "start_time", "startTime", "started_at", "request_time", "created_at", "ts", "@timestamp",
)  # fmt: skip


class OpenAI(Reader):
    summary = "OpenAI batch input or output, or logged requests and responses of OpenAI or Anthropic (JSON Lines)"
    telling = (
        frozenset({"custom_id", "body"}), frozenset({"custom_id", "response"}),
        frozenset({"type", "role", "content", "usage"}),
    )  # fmt: skip
    clock = "the log's own time, a date or a time since 1970 whose size shows the unit; else created of the answer"
    in_order = False

    def __init__(self) -> None:
        self._copies = Copies("custom_id")

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        names = fields.keys()
        return (
            super().sniff(record)
            or ("custom_id" in names and any(fields.get(name, b"").startswith(b"{") for name in ("params", "result")))
            or ({"request", "response"} <= names and "latencies" not in names and fields["request"].startswith(b"{"))
            or fields.get("object", b"").strip(b'"').decode("utf-8", "replace") in _OBJECTS
            or (
                "model" in names
                and bool(names & {"messages", "prompt"})
                and not (names & _OTHERS or Jsonl.sniff(record))
            )
        )

    def parse(self, record: bytes) -> TraceRecord:
        value = decode_object(record)
        self._copies.check(value.get("custom_id"))
        url = value.get("url")
        if isinstance(url, str) and not url.endswith(("/completions", "/responses")):
            raise LeftOutError(f"not a text completion ({url[:40]})")
        request, response = _shape(value)
        usage = usage_of(response.get("usage"))
        text, messages, prompt_ids = _prompt(request)
        input_tokens = prompt_ids if usage.input_tokens is None else usage.input_tokens
        if request.get("tools") or request.get("functions"):
            if input_tokens is None:
                self.noted[_WITHOUT_TOOLS] += 1
            else:
                text = messages = None
        if text is None and messages is None:
            if input_tokens is None:
                raise RowError("no text", "neither a prompt of text only nor usage: nothing to send")
            self.noted[_NOT_TEXT] += bool(request) and prompt_ids is None
        return TraceRecord(
            None if "custom_id" in value else _arrival_ns(value, response), input_tokens, usage.output_tokens,
            text=text, messages=messages, answer=_answer(response),
            model=text_of(response, "model") or text_of(request, "model"), cached_tokens=usage.cached_tokens,
        )  # fmt: skip


def _shape(value: Object) -> tuple[Object, Object]:
    """(request body, response body) of any of the shapes; empty where there is none. Raises `FailedCallError`."""
    response = object_of(value, "response")
    if value.get("error") or response.get("error") or find(response, "body.error"):
        raise FailedCallError("failed call (error)")
    status = response.get("status_code")
    if isinstance(status, int) and status >= 400:
        raise FailedCallError(f"failed call (HTTP {status})")
    if isinstance(value.get("params"), dict):
        return object_of(value, "params"), {}
    if isinstance(value.get("result"), dict):
        if not isinstance(find(value, "result.message"), dict):
            raise FailedCallError(f"failed call (batch: {safe(str(find(value, 'result.type')), 20)})")
        return {}, object_of(value, "result.message")
    if isinstance(value.get("response"), dict) or isinstance(value.get("body"), dict):
        return object_of(value, "body", "request"), object_of(response, "body") or response
    return ({}, value) if value.get("object") in _OBJECTS or value.get("type") == "message" else (value, {})


def _arrival_ns(value: Object, response: Object) -> int | None:
    for name in _TIMES if response is not value else ():
        if isinstance(time := find(value, name), str | int | float):
            return wall_clock_ns(name, time)
    created = find(response, "created", "created_at")
    return None if created is None else wall_clock_ns("created", created)


def _prompt(request: Object) -> tuple[str | None, tuple[dict[str, str], ...] | None, int | None]:
    asked = next((request[name] for name in ("messages", "prompt", "input") if request.get(name) is not None), None)
    if isinstance(asked, list) and asked and all(type(i) is int for i in asked):
        return None, None, len(asked)
    before = find(request, "system", "instructions") or None
    if isinstance(asked, str) and asked:
        if not isinstance(before, str):
            return asked, None, None
        asked = [{"role": "user", "content": asked}]
    messages = plain_messages(asked)
    if messages is None or before is None:
        return None, messages, None
    system = plain_text(before)
    return None, None if system is None else ({"role": "system", "content": system}, *messages), None


def _answer(response: Object) -> str | None:
    if response.get("type") == "message":
        return plain_text(response.get("content"))
    choices = response.get("choices")
    return text_of(choices[0], "message.content", "text") if isinstance(choices, list) and len(choices) == 1 else None


# --- coding agents ---------------------------------------------------------------------------------------------------

_WAITING = 1000
"""Calls of which further lines may come; of older ones the last line is taken to have been read."""
_CODEX = frozenset({b'"session_meta"', b'"event_msg"', b'"response_item"', b'"turn_context"', b'"compacted"'})
_CODEX_INPUT = frozenset({"user_message", "function_call_output", "custom_tool_call_output", "local_shell_call_output"})


class ClaudeCode(Reader):
    summary = "Claude Code session log (JSON Lines: sessionId, message with usage)"
    clock = "timestamp of the line before an answer: what was said to the model"
    in_order = False
    log = True

    def __init__(self) -> None:
        self._copies = Copies("message.id")
        self._waiting: dict[str, tuple[Place, TraceRecord]] = {}
        self._before: dict[str, int] = {}
        """Session -> time of its last line that is no answer, ns."""

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        return "sessionId" in fields and ("message" in fields or {"type", "uuid"} <= fields.keys())

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        for place, record in records:
            try:
                yield from self._line(place, decode_object(record))
            except (RowError, LeftOutError) as e:
                yield place, e

    def end(self) -> Iterator[tuple[Place, Item]]:
        yield from self._waiting.values()

    def _line(self, place: Place, line: Object) -> Iterator[tuple[Place, Item]]:
        message, time = object_of(line, "message"), line.get("timestamp")
        if not isinstance(time, str):
            return
        session = text_of(line, "sessionId") or ""
        if line.get("isSidechain") is True:
            session += f"/{text_of(line, 'agentId') or 'sub-agent'}"
        if not message or line.get("type", message.get("role")) != "assistant":
            if line.get("type") == "user":
                self._before[session] = iso_ns("timestamp", time)
            return
        if line.get("isApiErrorMessage"):
            raise FailedCallError("failed call (API error)")
        if message.get("model") == "<synthetic>" or not isinstance(message.get("usage"), dict):
            return
        name = f"{message.get('id')} {line.get('requestId')}"
        usage = usage_of(message["usage"])
        if usage.input_tokens is None:
            raise RowError("no token counts", "the message has usage without input_tokens")
        if name in self._waiting:
            first, row = self._waiting[name]
            output = max(row.output_tokens or 0, usage.output_tokens or 0)
            self._waiting[name] = first, row._replace(output_tokens=output)
            return
        self._copies.check(name)
        self._waiting[name] = place, TraceRecord(
            self._before.pop(session, None) or iso_ns("timestamp", time), usage.input_tokens, usage.output_tokens,
            session, model=text_of(message, "model"), cached_tokens=usage.cached_tokens,
        )  # fmt: skip
        if len(self._waiting) > _WAITING:
            yield self._waiting.pop(next(iter(self._waiting)))


class Codex(Reader):
    summary = "Codex session log (JSON Lines: event_msg with token_count)"
    clock = "timestamp of the last input before an answer"
    in_order = False

    def __init__(self) -> None:
        self._session: str | None = None
        self._model: str | None = None
        self._before: int | None = None
        self._total: object = None

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        return {"timestamp", "type", "payload"} <= fields.keys() and fields["type"] in _CODEX

    def parse(self, record: bytes) -> TraceRecord | Rows:
        line = decode_object(record)
        payload, time = object_of(line, "payload"), line.get("timestamp")
        if not isinstance(time, str):
            return ()
        kind = payload.get("type")
        if line.get("type") == "session_meta":
            self._session, self._total = text_of(payload, "id"), None
        elif line.get("type") == "turn_context":
            self._model = text_of(payload, "model") or self._model
        elif kind in _CODEX_INPUT or payload.get("role") == "user":
            self._before = iso_ns("timestamp", time)
        elif kind == "token_count" and isinstance(info := payload.get("info"), dict):
            total, self._total = self._total, info.get("total_token_usage")
            if total is not None and total == self._total:
                raise LeftOutError("same running total as the event before (a copy)")
            usage = usage_of(info.get("last_token_usage"))
            if usage.input_tokens is None:
                raise RowError("no token counts", "token_count without last_token_usage.input_tokens")
            arrival_ns = iso_ns("timestamp", time) if self._before is None else self._before
            self._before = None
            return TraceRecord(
                arrival_ns, usage.input_tokens, usage.output_tokens, self._session, model=self._model,
                cached_tokens=count_of(info, "last_token_usage.cached_input_tokens"),
            )  # fmt: skip
        return ()
