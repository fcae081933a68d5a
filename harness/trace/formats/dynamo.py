"""NVIDIA Dynamo request traces (``DYN_REQUEST_TRACE=1``): lengths, times, prefix identity and cache hits of a router.

Of each ``request_end``: ``request_received_ms`` (the arrival), ``input_tokens`` or ``replay.input_length``,
``output_tokens`` (missing: the request failed), ``cached_tokens`` (inside the input), ``agent_context.session_id``, and
``replay.input_sequence_hashes``, one for each ``trace_block_size`` tokens. A hash stands for its block and everything
before it; it has 64 bits without a sign, of which 63 are kept. Other events are no requests. Lines may be wrapped as
``{"timestamp": ..., "event": {...}}``. A trace rotates over many files, written as requests end: rows are sorted.

Source: ai-dynamo/dynamo, request trace documentation (``dynamo.request.trace.v1``).
"""

from __future__ import annotations

from typing import Any

from harness.trace.formats.record import MAX_ARRIVAL_S, FailedCallError, Reader, RowError, TraceRecord
from harness.trace.formats.values import Copies, called, decode_object, fields_of, show, shown_blocks, token_count

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
