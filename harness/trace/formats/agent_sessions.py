"""Session logs of coding agents: Claude Code (``~/.claude/projects/*/*.jsonl``) and Codex (``~/.codex/sessions``).

**Claude Code** writes the parts of one answer on lines of their own, with the same ``message.id`` and growing
``usage``: the last counts. A line's time is its end, so a call's arrival is the time of the line before it in the
session (what the user or a tool said), where there is one. ``isSidechain`` marks a sub-agent, a session of its own. A
resumed session copies old lines into a new file: each message is read once.

**Codex** states the tokens of a call in an event ``token_count``, ``last_token_usage`` (cached and reasoning tokens
inside); equal running totals mean the same event again. Its arrival is the time of the last input before it.

Source: fields as read by ryoppippi/ccusage; openai/codex, ``protocol.rs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from harness.trace.formats.record import (
    FailedCallError,
    Item,
    LeftOutError,
    Place,
    Reader,
    RowError,
    TraceRecord,
    whole,
)
from harness.trace.formats.values import Copies, IsoClock, called, decode_object, fields_of, usage_of

_WAITING = 1000
"""Calls of which further lines may come; of older ones the last line is taken to have been read."""
_CODEX = frozenset({b'"session_meta"', b'"event_msg"', b'"response_item"', b'"turn_context"', b'"compacted"'})
_CODEX_INPUT = frozenset({"user_message", "function_call_output", "custom_tool_call_output", "local_shell_call_output"})


class _AgentCall(NamedTuple):
    place: Place
    row: TraceRecord


class ClaudeCode(Reader):
    """Reader of Claude Code session logs."""

    summary = "Claude Code session log (JSON Lines: sessionId, message with usage)"
    clock = "timestamp of the line before an answer: what was said to the model"
    in_order = False
    log = True

    def __init__(self) -> None:
        self._clock = IsoClock("timestamp")
        self._copies = Copies("message.id")
        self._waiting: dict[str, _AgentCall] = {}
        self._before: dict[str, int] = {}
        """Session -> time of its last line that is no answer, ns."""

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A line with ``sessionId`` and a message, or one of the kinds around them."""
        fields = fields_of(record)
        return "sessionId" in fields and ("message" in fields or {"type", "uuid"} <= fields.keys())

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        """Each call when no further line of it is to be expected."""
        for place, record in records:
            try:
                yield from self._line(place, decode_object(whole(record)))
            except (RowError, LeftOutError) as e:
                yield place, e

    def end(self) -> Iterator[tuple[Place, Item]]:
        """The calls that were still waiting."""
        yield from ((call.place, _checked(call.row)) for call in self._waiting.values())
        self._waiting = {}

    def _line(self, place: Place, line: dict[str, Any]) -> Iterator[tuple[Place, Item]]:
        message, time = line.get("message"), line.get("timestamp")
        if not isinstance(time, str):
            return
        session = _session(line)
        if not isinstance(message, dict) or line.get("type", message.get("role")) != "assistant":
            if line.get("type") == "user":
                self._before[session] = self._clock.ns(time)
            return
        if line.get("isApiErrorMessage"):
            raise FailedCallError("failed call (API error)")
        if message.get("model") == "<synthetic>" or not isinstance(message.get("usage"), dict):
            return
        name = f"{message.get('id')} {line.get('requestId')}"
        usage = usage_of(message["usage"])
        if usage.input_tokens is None:
            raise RowError("no token counts", "the message has usage without input_tokens")
        if (waiting := self._waiting.get(name)) is not None:
            output = max(waiting.row.output_tokens or 0, usage.output_tokens or 0)
            self._waiting[name] = waiting._replace(row=waiting.row._replace(output_tokens=output))
            return
        self._copies.check(name)
        model = message.get("model")
        row = TraceRecord(
            self._before.pop(session, None) or self._clock.ns(time), usage.input_tokens, usage.output_tokens, session,
            model=model if isinstance(model, str) else None, cached_tokens=usage.cached_tokens,
        )  # fmt: skip
        self._waiting[name] = _AgentCall(place, row)
        if len(self._waiting) > _WAITING:
            call = self._waiting.pop(next(iter(self._waiting)))
            yield call.place, _checked(call.row)


class Codex(Reader):
    """Reader of Codex session logs."""

    summary = "Codex session log (JSON Lines: event_msg with token_count)"
    clock = "timestamp of the last input before an answer"
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("timestamp")
        self._session: str | None = None
        self._model: str | None = None
        self._before: int | None = None
        self._total: Any = None

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A line of one of its kinds."""
        fields = fields_of(record)
        return {"timestamp", "type", "payload"} <= fields.keys() and fields["type"] in _CODEX

    def parse(self, record: bytes) -> TraceRecord | tuple[()]:
        """Read one line."""
        line = decode_object(record)
        payload = line.get("payload")
        if not isinstance(payload, dict) or not isinstance(line.get("timestamp"), str):
            return ()
        kind = payload.get("type")
        if line.get("type") == "session_meta":
            self._session, self._total = _text(payload.get("id")), None
        elif line.get("type") == "turn_context":
            self._model = _text(payload.get("model")) or self._model
        elif kind in _CODEX_INPUT or payload.get("role") == "user":
            self._before = self._clock.ns(line["timestamp"])
        elif kind == "token_count" and isinstance(info := payload.get("info"), dict):
            return self._call(info, line["timestamp"])
        return ()

    def _call(self, info: dict[str, Any], time: str) -> TraceRecord:
        total, self._total = self._total, info.get("total_token_usage")
        if total is not None and total == self._total:
            raise LeftOutError("same running total as the event before (a copy)")
        usage = info.get("last_token_usage")
        found = usage_of(usage)
        called(found.input_tokens, found.output_tokens)
        if found.input_tokens is None or not isinstance(usage, dict):
            raise RowError("no token counts", "token_count without last_token_usage.input_tokens")
        arrival_ns = self._clock.ns(time) if self._before is None else self._before
        self._before = None
        cached = usage_of({"input_tokens": usage.get("cached_input_tokens")}).input_tokens
        return TraceRecord(
            arrival_ns, found.input_tokens, found.output_tokens, self._session, model=self._model, cached_tokens=cached
        )


def _session(line: dict[str, Any]) -> str:
    """The session; that of a sub-agent is its own."""
    name = _text(line.get("sessionId")) or ""
    if line.get("isSidechain") is True:
        name += f"/{_text(line.get('agentId')) or 'sub-agent'}"
    return name


def _checked(row: TraceRecord) -> Item:
    try:
        called(row.input_tokens, row.output_tokens)
    except LeftOutError as e:
        return e
    return row


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
