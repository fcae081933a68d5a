"""AWS Bedrock model invocation logs: files on S3 (JSON, one object a line) or an export of CloudWatch.

Read are ``timestamp`` (the arrival, in whole seconds), ``requestId``, ``operation``, ``modelId``,
``input.inputTokenCount``, ``output.outputTokenCount`` and ``errorCode`` (a failed call). Tokens read from a prompt
cache and written to it (``cacheReadInputTokenCount``, ``cacheWriteInputTokenCount``) stand **beside** the input and are
added. Calls without an output count (embeddings, images) are counted and left out. Prompts are not sent: bodies are of
each model's own form and often lie elsewhere. Logs come in any order, so rows are sorted.

Source: AWS documentation, "Monitor model invocation using CloudWatch Logs and Amazon S3".
"""

from __future__ import annotations

from typing import Any

import msgspec

from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, Rows, TraceRecord
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Copies,
    IsoClock,
    called,
    decode_object,
    fields_of,
    rows_of,
    token_count,
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
