"""Logs of calls through what stands before models: AWS Bedrock, the LiteLLM proxy and NVIDIA Dynamo's router.

AWS Bedrock model invocation logs: files on S3 (JSON, one object a line) or an export of CloudWatch.

Read are ``timestamp`` (the arrival, in whole seconds), ``requestId``, ``operation``, ``modelId``,
``input.inputTokenCount``, ``output.outputTokenCount`` and ``errorCode`` (a failed call). Tokens read from a prompt
cache and written to it (``cacheReadInputTokenCount``, ``cacheWriteInputTokenCount``) stand **beside** the input and are
added. Calls without an output count (embeddings, images) are counted and left out. Prompts are not sent: bodies are of
each model's own form and often lie elsewhere. Logs come in any order, so rows are sorted.

Source: AWS documentation, "Monitor model invocation using CloudWatch Logs and Amazon S3".

LiteLLM proxy spend logs (table ``LiteLLM_SpendLogs``): JSON, JSON Lines, pages of the API (``{"data": [...]}``), or
CSV as a database writes it; also what its callbacks are given (``StandardLoggingPayload``: ``id``, times in seconds
since 1970, cached tokens in ``metadata.usage_object``).

Read are ``startTime`` (the arrival; UTC when it has no zone), ``prompt_tokens``, ``completion_tokens``,
``total_tokens`` (must be their sum), ``call_type``, ``status``, ``cache_hit``, ``request_id``, ``session_id`` and,
where the proxy stores prompts, ``messages``. LiteLLM's ``prompt_tokens`` contain what was read from a prompt cache, so
cached tokens are never added.

Not replayed, but counted: failed calls; calls that are no text completions (embeddings, images); calls answered from
LiteLLM's own response cache, which no model server ever saw; copies of a request_id. Retries and fallbacks are rows of
their own, as they were load of their own. Exports come in any order, so rows are sorted by arrival.

Source: BerriAI/litellm 1.109, ``schema.prisma``, model ``LiteLLM_SpendLogs``.

NVIDIA Dynamo request traces (``DYN_REQUEST_TRACE=1``): lengths, times, prefix identity and cache hits of a router.

Of each ``request_end``: ``request_received_ms`` (the arrival), ``input_tokens`` or ``replay.input_length``,
``output_tokens`` (missing: the request failed), ``cached_tokens`` (inside the input), ``agent_context.session_id``, and
``replay.input_sequence_hashes``, one for each ``trace_block_size`` tokens. A hash stands for its block and everything
before it; it has 64 bits without a sign, of which 63 are kept. Other events are no requests. Lines may be wrapped as
``{"timestamp": ..., "event": {...}}``. A trace rotates over many files, written as requests end: rows are sorted.

Source: ai-dynamo/dynamo, request trace documentation (``dynamo.request.trace.v1``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from harness.trace.formats.record import (
    MAX_ARRIVAL_S,
    FailedCallError,
    LeftOutError,
    Reader,
    RowError,
    Rows,
    TraceRecord,
)
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Copies,
    CsvColumns,
    IsoClock,
    called,
    decode_object,
    epoch_ns,
    fields_of,
    header_names,
    plain_messages,
    rows_of,
    show,
    shown_blocks,
    token_count,
    usage_of,
)

_TYPE = b'"ModelInvocationLog"'


class Bedrock(Reader):
    """Reader of Bedrock invocation logs."""

    summary = "AWS Bedrock model invocation log (JSON of S3 or CloudWatch: ModelInvocationLog)"
    clock = "timestamp, a date and time in whole seconds, UTC"
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("timestamp")
        self._copies = Copies("requestId")

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The log's type, also within a CloudWatch event or a page of them."""
        fields = fields_of(record)
        inner = fields.get("message", fields.get("events", b"") or fields.get("logEvents", b""))
        return fields.get("schemaType") == _TYPE or b"ModelInvocationLog" in inner

    def parse(self, record: bytes) -> TraceRecord | Rows:
        """Read one object."""
        value = decode_object(record)
        events = value.get("events", value.get("logEvents"))
        return rows_of(events, self._row) if isinstance(events, list) else self._row(value)

    def _row(self, value: dict[str, Any]) -> TraceRecord:
        if isinstance(message := value.get("message"), str):
            try:
                value = msgspec.json.decode(message)
            except DECODE_ERRORS:
                raise RowError("not JSON", "message is not a JSON object") from None
        if not isinstance(value, dict) or not isinstance(value.get("timestamp"), str):
            raise RowError("no timestamp", "not a ModelInvocationLog with a timestamp")
        self._copies.check(str(value.get("requestId") or ""))
        arrival_ns = self._clock.ns(value["timestamp"])
        if value.get("errorCode"):
            raise FailedCallError("failed call (errorCode)")
        into, out = (value[name] if isinstance(value.get(name), dict) else {} for name in ("input", "output"))
        input_tokens = token_count("inputTokenCount", into.get("inputTokenCount"))
        output_tokens = token_count("outputTokenCount", out.get("outputTokenCount"))
        if output_tokens is None:
            raise LeftOutError("no text completion (no outputTokenCount)")
        if input_tokens is None:
            raise RowError("no token counts", "no input.inputTokenCount")
        read = token_count("cacheReadInputTokenCount", into.get("cacheReadInputTokenCount"))
        written = token_count("cacheWriteInputTokenCount", into.get("cacheWriteInputTokenCount"))
        input_tokens += (read or 0) + (written or 0)
        called(input_tokens, output_tokens)
        model = value.get("modelId")
        return TraceRecord(
            arrival_ns, input_tokens, output_tokens, model=model if isinstance(model, str) else None, cached_tokens=read
        )


_TELLING = {"startTime", "prompt_tokens", "completion_tokens"}
_TEXT_CALLS = ("completion", "text_completion", "responses", "anthropic_messages", "generate_content")


class LiteLLM(Reader):
    """Reader of LiteLLM spend logs."""

    summary = "LiteLLM spend logs (JSON, JSON Lines or CSV: startTime, prompt_tokens, completion_tokens, call_type)"
    clock = "startTime, a date and time, UTC where no zone is given"
    quoted = True
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("startTime")
        self._copies = Copies("request_id")
        self._columns: CsvColumns | None = None
        self._first = True

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The three telling fields or columns."""
        fields = fields_of(record)
        if (page := fields.get("data", b"")).startswith(b"["):
            return all(f'"{name}"'.encode() in page for name in _TELLING)
        return _telling(fields) or _telling(header_names(record[:100_000]))

    def parse(self, record: bytes) -> TraceRecord | Rows:
        """Read one object or CSV record (the first one may be the header)."""
        first, self._first = self._first, False
        if first and not record.lstrip().startswith(b"{"):
            self._columns = CsvColumns(record, tuple(_TELLING))
            return ()
        row: dict[str, Any] = self._columns.split_quoted(record) if self._columns else decode_object(record)
        return rows_of(row["data"], self._row) if isinstance(row.get("data"), list) else self._row(row)

    def _row(self, row: dict[str, Any]) -> TraceRecord:
        if missing := _TELLING - row.keys():
            raise RowError("missing fields", f"no {', '.join(sorted(missing))} in {show(str(row))}")
        self._copies.check(_text(row.get("request_id")) or _text(row.get("id")))
        input_tokens = token_count("prompt_tokens", row["prompt_tokens"])
        output_tokens = token_count("completion_tokens", row["completion_tokens"])
        arrival_ns = self._time_ns(row["startTime"])
        _left_out(row)
        if input_tokens is None or output_tokens is None:
            raise RowError("no token counts", "prompt_tokens or completion_tokens is empty")
        total = token_count("total_tokens", row.get("total_tokens"))
        if total is not None and total != input_tokens + output_tokens:
            raise RowError(
                "bad total_tokens",
                f"total_tokens is {total}, but prompt and completion have {input_tokens} + {output_tokens}: "
                "what was counted is not clear",
            )
        called(input_tokens, output_tokens)
        asked = _json(row.get("proxy_server_request"))
        tools = isinstance(asked, dict) and (asked.get("tools") or asked.get("functions"))
        messages = None if tools else plain_messages(_json(row.get("messages")))
        return TraceRecord(
            arrival_ns, input_tokens, output_tokens, _text(row.get("session_id")), messages=messages,
            model=_text(row.get("model")), cached_tokens=_cached(_json(row.get("metadata"))),
        )  # fmt: skip

    def _time_ns(self, value: Any) -> int:
        """Of a date in a table, or of seconds since 1970 in what callbacks are given."""
        return epoch_ns("startTime", value) if isinstance(value, int | float) else self._clock.ns(str(value))


def _cached(metadata: Any) -> int | None:
    usage = metadata.get("usage_object") if isinstance(metadata, dict) else None
    return usage_of(usage).cached_tokens


def _telling(names: Iterable[str]) -> bool:
    return set(names) >= _TELLING


def _left_out(row: dict[str, Any]) -> None:
    """Raises `LeftOutError` for a row that no model server has to answer."""
    call_type = _text(row.get("call_type"))
    if call_type and not call_type.removeprefix("a").startswith(_TEXT_CALLS) and not call_type.startswith(_TEXT_CALLS):
        raise LeftOutError(f"not a text completion ({call_type[:30]})")
    if str(row.get("status") or "").lower() in ("failure", "failed", "error"):
        raise FailedCallError("failed call (status failure)")
    if str(row.get("cache_hit") or "").lower() == "true":
        raise LeftOutError("answered from LiteLLM's response cache")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _json(value: Any) -> Any:
    """A JSON column of a CSV export comes as text."""
    if isinstance(value, str):
        try:
            return msgspec.json.decode(value)
        except DECODE_ERRORS:
            return None
    return value


_SCHEMA = "dynamo.request.trace."


class Dynamo(Reader):
    """Reader of Dynamo request traces."""

    summary = "NVIDIA Dynamo request trace (JSON Lines: dynamo.request.trace.v1, request_end)"
    clock = "request.request_received_ms, milliseconds"
    in_order = False

    def __init__(self) -> None:
        self._copies = Copies("request_id")
        self._size = self._rows = self._long = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The schema's name."""
        fields = fields_of(record)
        fields = fields_of(fields["event"]) if "event" in fields else fields
        return fields.get("schema", b"").startswith(b'"' + _SCHEMA.encode())

    def parse(self, record: bytes) -> TraceRecord | tuple[()]:
        """Read one event."""
        event = decode_object(record)
        event = event["event"] if isinstance(event.get("event"), dict) else event
        request = event.get("request")
        if event.get("event_type") != "request_end" or not isinstance(request, dict):
            return ()
        self._copies.check(str(request.get("request_id") or ""))
        replay = request["replay"] if isinstance(request.get("replay"), dict) else {}
        stated = request.get("input_tokens")
        input_tokens = token_count("input_tokens", replay.get("input_length") if stated is None else stated)
        output_tokens = token_count("output_tokens", request.get("output_tokens"))
        if output_tokens is None:
            raise FailedCallError("failed call (no output tokens)")
        if input_tokens is None:
            raise RowError("no token counts", "neither input_tokens nor replay.input_length")
        called(input_tokens, output_tokens)
        context = event["agent_context"] if isinstance(event.get("agent_context"), dict) else {}
        ids, size = self._blocks(replay)
        session = context.get("session_id")
        return TraceRecord(
            _milliseconds_ns(request.get("request_received_ms")), input_tokens, output_tokens,
            session if isinstance(session, str) else None, prefix_ids=ids, block_tokens=size,
            cached_tokens=token_count("cached_tokens", request.get("cached_tokens")),
        )  # fmt: skip

    def blocks(self) -> str | None:
        """The size that the trace states, and how many rows show it."""
        return shown_blocks(self._size, self._rows, self._long)

    def _blocks(self, replay: dict[str, Any]) -> tuple[tuple[int, ...] | None, int | None]:
        """(prefix ids, block size). Raises `RowError` where their number does not fit the length."""
        hashes = replay.get("input_sequence_hashes")
        size = token_count("trace_block_size", replay.get("trace_block_size"))
        length = token_count("input_length", replay.get("input_length"))
        if not hashes or not size or not length:
            return None, None
        if not isinstance(hashes, list) or not all(type(h) is int and 0 <= h < 2**64 for h in hashes):
            raise RowError("bad input_sequence_hashes", "input_sequence_hashes: expected unsigned 64-bit numbers")
        if len(hashes) != -(-length // size):
            problem = f"{len(hashes)} input_sequence_hashes for input_length {length}, expected {-(-length // size)}"
            raise RowError("block mismatch", f"{problem} (one per {size} tokens)")
        if self._size not in (0, size):
            raise RowError("block sizes differ", f"trace_block_size is {size}, and {self._size} in an earlier row")
        self._size = size
        self._rows += 1
        self._long += len(hashes) > 1
        return tuple(h & (2**63 - 1) for h in hashes), size


def _milliseconds_ns(value: Any) -> int:
    try:
        ms = float(value)
    except (TypeError, ValueError):
        ms = -1.0
    if not 0 <= ms <= MAX_ARRIVAL_S * 1000:
        raise RowError("bad request_received_ms", f"request_received_ms is {show(str(value))}, expected milliseconds")
    return round(ms * 1000) * 1000
