"""Langfuse observations: a JSON array, JSON Lines, pages of the API (``{"data": [...]}``), or traces that hold theirs
(``{"sessionId": ..., "observations": [...]}``, or ``{"trace": ..., "observations": [...]}`` as the web page saves it).

Rows are the observations of type ``GENERATION`` (others, like ``SPAN``, are no model calls). ``startTime`` is the
arrival; ``usageDetails`` has the tokens, in older exports ``usage``. Names come in camel or snake case.

**Cached tokens.** ``usageDetails`` may hold more than ``input`` and ``output``, such as ``input_cached_tokens`` or
``output_reasoning_tokens``. Some sources count these inside ``input``, others beside it. The ``total`` decides: tokens
are added only when the total says that they were counted beside, and a row whose total fits neither reading, or both,
is refused.

Exports come newest first, so rows are sorted by arrival. The session is ``sessionId`` of the observation or its trace.

Source: Langfuse API reference (observations), documentation page "Model usage and cost".
"""

from __future__ import annotations

from typing import Any

from harness.formats.row import FailedCallError, Reader, Row, RowError, Rows
from harness.formats.values import (
    Copies,
    IsoClock,
    called,
    decode_object,
    fields_of,
    plain_messages,
    rows_of,
    token_count,
)

_INPUT = ("input", "input_tokens", "inputTokens", "prompt_tokens", "promptTokens")
_OUTPUT = ("output", "output_tokens", "outputTokens", "completion_tokens", "completionTokens")
_TOTAL = ("total", "total_tokens", "totalTokens")


class Langfuse(Reader):
    """Reader of Langfuse observations."""

    summary = "Langfuse observations (JSON or JSON Lines: type GENERATION, startTime, usageDetails)"
    clock = "startTime, a date and time, UTC where no zone is given"
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("startTime")
        self._copies = Copies("observation id")

    @staticmethod
    def sniff(record: bytes) -> bool:
        """An observation, or a page of them."""
        fields = fields_of(record)
        for name, few in (("observations", 10**9), ("data", 3)):
            if len(fields) <= few and (page := fields.get(name, b"")).startswith(b"["):
                return b'"traceId"' in page or b'"trace_id"' in page
        return "type" in fields and (
            {"traceId", "startTime"} <= fields.keys() or {"trace_id", "start_time"} <= fields.keys()
        )

    def parse(self, record: bytes) -> Row | Rows:
        """Read one observation, page or trace."""
        value = decode_object(record)
        if isinstance(value.get("data"), list):
            return rows_of(value["data"], self._row)
        if isinstance(value.get("observations"), list):
            trace = value["trace"] if isinstance(value.get("trace"), dict) else value
            session = _text(_get(trace, "sessionId", "session_id"))
            return rows_of(value["observations"], lambda observation: self._row(observation, session))
        return self._row(value) or ()

    def _row(self, observation: dict[str, Any], session: str | None = None) -> Row | None:
        if observation.get("type") != "GENERATION":
            return None
        self._copies.check(_text(observation.get("id")))
        arrival_ns = self._clock.ns(str(_get(observation, "startTime", "start_time")))
        if observation.get("level") == "ERROR":
            raise FailedCallError("failed call (level ERROR)")
        details = _get(observation, "usageDetails", "usage_details") or observation.get("usage")
        if not isinstance(details, dict) or not details:
            raise RowError("no token counts", "the observation has neither usageDetails nor usage")
        if str(details.get("unit") or "TOKENS").upper() != "TOKENS":
            raise RowError("not tokens", f"usage is counted in {details['unit']}, not in tokens")
        input_tokens, output_tokens = _tokens(details)
        called(input_tokens, output_tokens)
        asked = observation.get("input")
        if isinstance(asked, dict):  # tools become part of the prompt, so the text would not be all of it
            asked = None if asked.get("tools") or asked.get("functions") else asked.get("messages")
        return Row(
            arrival_ns,
            input_tokens,
            output_tokens,
            _text(_get(observation, "sessionId", "session_id")) or session,
            text=asked if isinstance(asked, str) and asked else None,
            messages=plain_messages(asked),
        )


def _tokens(details: dict[str, Any]) -> tuple[int, int]:
    """Input and output tokens, everything counted once."""
    counts = {
        name: token_count(name, value) or 0
        for name, value in details.items()
        if name != "unit" and "cost" not in name.lower() and value is not None
    }
    input_name = next((name for name in _INPUT if name in counts), None)
    output_name = next((name for name in _OUTPUT if name in counts), None)
    if input_name is None or output_name is None:
        raise RowError("no token counts", f"no input and output among the usage details {', '.join(sorted(details))}")
    total = next((counts[name] for name in _TOTAL if name in counts), None)
    input_tokens, output_tokens = counts[input_name], counts[output_name]
    rest = {n: c for n, c in counts.items() if c and n not in (*_INPUT, *_OUTPUT, *_TOTAL)}
    beside_out = sum(c for n, c in rest.items() if "output" in n.lower() or "completion" in n.lower())
    beside_in = sum(rest.values()) - beside_out
    # Each kind of extra is either inside its own count or beside it; only one reading may give the stated total.
    readings = {
        (input_tokens + more_in, output_tokens + more_out) for more_in in {0, beside_in} for more_out in {0, beside_out}
    }
    if total is not None:
        readings = {reading for reading in readings if sum(reading) == total}
    if len(readings) != 1:
        extras = ", ".join(f"{n} {c}" for n, c in sorted(rest.items())) or "no others"
        why = "no total says" if total is None else f"the total of {total} does not say"
        raise RowError(
            "ambiguous usage",
            f"input {input_tokens}, output {output_tokens}, {extras}: {why} whether these are counted inside or beside",
        )
    return readings.pop()


def _get(observation: dict[str, Any], *names: str) -> Any:
    return next((observation[name] for name in names if observation.get(name) is not None), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
