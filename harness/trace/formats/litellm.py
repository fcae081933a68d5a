"""LiteLLM proxy spend logs (table ``LiteLLM_SpendLogs``): JSON, JSON Lines, pages of the API (``{"data": [...]}``), or
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
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, Rows, TraceRecord
from harness.trace.formats.usage import usage_of
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Columns,
    Copies,
    IsoClock,
    called,
    decode_object,
    epoch_ns,
    fields_of,
    header_names,
    plain_messages,
    rows_of,
    show,
    token_count,
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
        self._columns: Columns | None = None
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
            self._columns = Columns(record, tuple(_TELLING))
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
