"""OpenTelemetry spans of generative-AI calls, as JSON.

Read are OTLP/JSON (``resourceSpans``, one object a line or one document), Tempo's export (``batches``), the SDK's
console exporter (one object a span) and ``{"trace_id": ..., "spans": [...]}``. Of each span:

=============================================  =======================================================================
start time                                     the arrival
``gen_ai.usage.input_tokens``                  input tokens, cached ones **included** (old: ``...prompt_tokens``)
``gen_ai.usage.output_tokens``                 output tokens, reasoning included (old: ``...completion_tokens``)
``gen_ai.conversation.id``                     session
``gen_ai.usage.cache_read.input_tokens``       only checked: more than the input means that this source does not include
                                               them, and then its counts are refused as ambiguous
=============================================  =======================================================================

Spans without ``gen_ai`` usage are no rows (HTTP, tools), nor are spans of an agent, which sum up their calls. One call
is often seen twice, by a framework and by the SDK under it: of a span and its parent, both model calls, one is kept.
Spans are exported when they end, so rows are sorted by arrival.

Source: OpenTelemetry semantic conventions for generative AI (status Development), OTLP specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.formats.row import FailedCallError, LeftOutError, Reader, Row, RowError, Rows
from harness.formats.values import Copies, IsoClock, called, decode_object, epoch_ns, fields_of, token_count

_GROUPS = ("resourceSpans", "batches")
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_CACHED = ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens")
_NO_CALLS = ("embeddings", "invoke_agent", "create_agent", "execute_tool", "invoke_workflow")
_CALLS_HELD = 200_000


class OTel(Reader):
    """Reader of OpenTelemetry spans."""

    summary = "OpenTelemetry gen_ai spans (JSON: OTLP, Tempo, console exporter)"
    clock = "start of the span: a date, or a time since 1970 whose size shows the unit"
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("start time")
        self._copies = Copies("span id")
        self._calls: dict[str, str] = {}
        """Span id -> parent id of the latest calls."""
        self._parents: dict[str, None] = {}

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The outer fields of one of the shapes."""
        fields = fields_of(record).keys()
        shapes = ({"resourceSpans"}, {"batches"}, {"spans", "trace_id"}, {"context", "attributes", "start_time"})
        return any(shape <= fields for shape in shapes)

    def parse(self, record: bytes) -> Rows:
        """Read one object."""
        items: list[Row | RowError | LeftOutError] = []
        for span in _spans(decode_object(record)):
            try:
                row = self._row(span)
            except (RowError, LeftOutError) as e:
                items.append(e)
            else:
                if row is not None:
                    items.append(row)
        return items

    def _row(self, span: Any) -> Row | None:
        """The span's row; None when it is no model call."""
        if not isinstance(span, dict):
            raise RowError("bad span", "a span is not a JSON object")
        attributes = _attributes(span.get("attributes"))
        if not any(name.startswith("gen_ai.") for name in attributes):
            return None
        operation = attributes.get("gen_ai.operation.name")
        if operation in _NO_CALLS:
            return None
        failed = _failed(span)
        input_tokens, output_tokens = _count(attributes, _INPUT), _count(attributes, _OUTPUT)
        if input_tokens is None and output_tokens is None and operation is None and not failed:
            return None
        self._once(span)
        arrival_ns = self._start(span)
        if failed:
            raise FailedCallError("failed call (status error)")
        if input_tokens is None or output_tokens is None:
            raise RowError("no token counts", f"the span has no {_INPUT[0]} or no {_OUTPUT[0]}")
        if (_count(attributes, _CACHED) or 0) > input_tokens:
            raise RowError(
                "ambiguous cached tokens",
                f"more cached tokens than input tokens ({input_tokens}): this source does not count them as input, "
                "against the convention, so the input length is not known",
            )
        called(input_tokens, output_tokens)
        session = attributes.get("gen_ai.conversation.id")
        return Row(arrival_ns, input_tokens, output_tokens, session if isinstance(session, str) and session else None)

    def _once(self, span: dict[str, Any]) -> None:
        """Raises `LeftOutError` for a copy, and for the parent or child of a call that was counted."""
        context = span.get("context") if isinstance(span.get("context"), dict) else {}
        id_ = _id(span, "spanId", "span_id") or _id(context or {}, "span_id", "spanId")
        parent = _id(span, "parentSpanId", "parent_span_id", "parent_id")
        self._copies.check(id_)
        if parent in self._calls or (id_ and id_ in self._parents):
            raise LeftOutError("another span of the same call")
        if id_:
            self._calls[id_] = parent
            if parent:
                self._parents[parent] = None
            if len(self._calls) > _CALLS_HELD:
                gone = self._calls.pop(next(iter(self._calls)))
                self._parents.pop(gone, None)

    def _start(self, span: dict[str, Any]) -> int:
        for name in ("startTimeUnixNano", "start_time_unix_nano", "start_time", "startTime"):
            value = span.get(name)
            if isinstance(value, str) and not value.isdigit():
                return self._clock.ns(value)
            if value is not None:
                return epoch_ns(name, value)
        raise RowError("no start time", "the span has no start time")


def _spans(value: dict[str, Any]) -> Iterator[Any]:
    groups = next((value[name] for name in _GROUPS if name in value), None)
    if groups is None:
        yield from value["spans"] if isinstance(value.get("spans"), list) else [value]
        return
    for group in _list(groups):
        for scope in _list(
            group.get("scopeSpans") or group.get("instrumentationLibrarySpans") if isinstance(group, dict) else None
        ):
            yield from _list(scope.get("spans") if isinstance(scope, dict) else None)


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("bad spans", "expected a list of spans")
    return value


def _attributes(value: Any) -> dict[str, Any]:
    """Name -> value, from a plain object or OTLP's list of key and typed value."""
    if isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict) and isinstance(item.get("key"), str) and isinstance(item.get("value"), dict):
            found[item["key"]] = next(iter(item["value"].values()), None)
    return found


def _count(attributes: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((token_count(name, attributes[name]) for name in names if attributes.get(name) is not None), None)


def _failed(span: dict[str, Any]) -> bool:
    status = span.get("status")
    code = (status.get("code") or status.get("status_code")) if isinstance(status, dict) else status
    return code in (2, "2", "STATUS_CODE_ERROR", "ERROR")


def _id(span: dict[str, Any], *names: str) -> str:
    return next((value for name in names if isinstance(value := span.get(name), str) and value), "")
