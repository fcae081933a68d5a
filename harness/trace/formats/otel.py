"""OpenTelemetry and OpenInference spans of generative-AI calls, as JSON.

Read are OTLP/JSON (``resourceSpans``, one object a line or one document), Tempo's export (``batches``), the SDK's
console exporter (one object a span; Phoenix's is the same), ``{"trace_id": ..., "spans": [...]}``, and what Jaeger's
page downloads. Of each span:

=============================================  =======================================================================
start time                                     the arrival
``gen_ai.usage.input_tokens``                  input tokens, cached ones **included** (old: ``...prompt_tokens``)
``gen_ai.usage.output_tokens``                 output tokens, reasoning included (old: ``...completion_tokens``)
``gen_ai.usage.cache_read.input_tokens``       cached tokens. More of them than input tokens: this source counts them
                                               (and ``cache_creation``) beside the input, and they are added
``gen_ai.conversation.id``, ``session.id``     session; without one, the calls of an agent's run are a session
``gen_ai.response.model``, ``..request.model`` model
=============================================  =======================================================================

OpenInference (Phoenix, Arize) has ``llm.token_count.prompt`` (cached tokens, ``...prompt_details.cache_read``,
**included**), ``llm.token_count.completion`` and ``llm.model_name`` on spans of kind ``LLM``.

Spans without usage are no rows (HTTP, tools), nor are spans of an agent, which sum up their calls. One call
is often seen twice, by a framework and by the SDK under it: `harness.trace.formats.calls` says which spans are one.
Spans are exported when they end, so rows are sorted by arrival.

Source: OpenTelemetry semantic conventions for generative AI (status Development), OTLP specification.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.trace.formats.calls import Span, SpanReader
from harness.trace.formats.record import FailedCallError, Item, LeftOutError, RowError, TraceRecord
from harness.trace.formats.values import IsoClock, decode_object, epoch_ns, fields_of, token_count

_GROUPS = ("resourceSpans", "batches")
_STARTS = ("startTimeUnixNano", "start_time_unix_nano", "start_time", "startTime")
_ENDS = ("endTimeUnixNano", "end_time_unix_nano", "end_time", "endTime")
_INPUT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion")
_CACHED = (
    "gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens",
    "llm.token_count.prompt_details.cache_read",
)  # fmt: skip
_WRITTEN = ("gen_ai.usage.cache_creation.input_tokens", "gen_ai.usage.cache_creation_input_tokens")
_SESSION = ("gen_ai.conversation.id", "session.id", "langfuse.session.id")
_MODEL = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name")
_MARKS = ("gen_ai.", "llm.", "openinference.")
_OPENINFERENCE = frozenset(
    {"LLM", "AGENT", "CHAIN", "TOOL", "RETRIEVER", "EMBEDDING", "RERANKER", "GUARDRAIL", "EVALUATOR", "PROMPT"}
)
_CALLS = ("chat", "text_completion", "generate_content", "completion")
_NO_CALLS = ("embeddings", "invoke_agent", "create_agent", "execute_tool", "invoke_workflow")


class OTel(SpanReader):
    """Reader of OpenTelemetry spans."""

    summary = "OpenTelemetry gen_ai or OpenInference spans (JSON: OTLP, Tempo, Jaeger, Phoenix, console exporter)"
    clock = "start of the span: a date, or a time since 1970 whose size shows the unit"

    def __init__(self) -> None:
        super().__init__()
        self._clock = IsoClock("span time")
        self._beside = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """The outer fields of one of the shapes."""
        fields = fields_of(record).keys()
        shapes = ({"resourceSpans"}, {"batches"}, {"spans", "trace_id"}, {"context", "attributes", "start_time"})
        return any(shape <= fields for shape in shapes) or (
            b'"traceID"' in (pages := fields_of(record).get("data", b"")) and b'"spans"' in pages
        )

    def spans(self, record: bytes) -> Iterator[Span | RowError | LeftOutError]:
        """Read one object."""
        for span in _spans(decode_object(record)):
            try:
                yield self._span(span)
            except RowError as e:
                yield e

    def notes(self) -> list[str]:
        """Counts that were added up."""
        if not self._beside:
            return []
        return [f"{self._beside} spans count cached tokens beside the input tokens: they were added"]

    def _span(self, span: Any) -> Span:
        if not isinstance(span, dict):
            raise RowError("bad span", "a span is not a JSON object")
        span = _from_jaeger(span) if "traceID" in span else span
        context = span["context"] if isinstance(span.get("context"), dict) else {}
        attributes = _attributes(span.get("attributes"))
        item = self._item(span, attributes)
        return Span(
            trace_id=_id(span, "traceId", "trace_id") or _id(context, "trace_id", "traceId"),
            id=_id(span, "spanId", "span_id") or _id(context, "span_id", "spanId"),
            parent=_id(span, "parentSpanId", "parent_span_id", "parent_id"),
            start_ns=0 if item is None else self._time(span, _STARTS),
            end_ns=None if item is None else self._end(span),
            response_id=None if item is None else _text(attributes, ("gen_ai.response.id",)),
            item=item,
            agent=attributes.get("gen_ai.operation.name") == "invoke_agent" or _kind(span, attributes) == "AGENT",
        )

    def _item(self, span: dict[str, Any], attributes: dict[str, Any]) -> Item | None:
        """What the span says of a model call; None when it is about something else."""
        operation = attributes.get("gen_ai.operation.name")
        kind = _kind(span, attributes)
        if operation in _NO_CALLS or not any(name.startswith(_MARKS) for name in attributes):
            return None
        if kind in _OPENINFERENCE and kind != "LLM":
            return None
        input_tokens, output_tokens = _count(attributes, _INPUT), _count(attributes, _OUTPUT)
        failed = _failed(span)
        known = operation in _CALLS or kind == "LLM" or (operation is None and failed)
        if input_tokens is None and output_tokens is None and not known:
            return None
        arrival_ns = self._time(span, _STARTS)
        if failed:
            return FailedCallError("failed call (status error)")
        cached = _count(attributes, _CACHED)
        if input_tokens is not None and (cached or 0) > input_tokens:
            self._beside += 1
            input_tokens += (cached or 0) + (_count(attributes, _WRITTEN) or 0)
        return TraceRecord(
            arrival_ns, input_tokens, output_tokens, _text(attributes, _SESSION), model=_text(attributes, _MODEL),
            cached_tokens=cached,
        )  # fmt: skip

    def _end(self, span: dict[str, Any]) -> int | None:
        return self._time(span, _ENDS) if any(span.get(name) is not None for name in _ENDS) else None

    def _time(self, span: dict[str, Any], names: tuple[str, ...]) -> int:
        for name in names:
            value = span.get(name)
            if isinstance(value, str) and not value.isdigit():
                return self._clock.ns(value)
            if value is not None:
                return epoch_ns(name, value)
        raise RowError("no start time", "the span has no start time")


def _spans(value: dict[str, Any]) -> Iterator[Any]:
    groups = next((value[name] for name in _GROUPS if name in value), None)
    if isinstance(traces := value.get("data"), list):
        for trace in traces:
            yield from _list(trace.get("spans") if isinstance(trace, dict) else None)
        return
    if groups is None:
        yield from value["spans"] if isinstance(value.get("spans"), list) else [value]
        return
    for group in _list(groups):
        for scope in _list(
            group.get("scopeSpans") or group.get("instrumentationLibrarySpans") if isinstance(group, dict) else None
        ):
            yield from _list(scope.get("spans") if isinstance(scope, dict) else None)


def _from_jaeger(span: dict[str, Any]) -> dict[str, Any]:
    """A span of Jaeger's JSON with OpenTelemetry's names. Its times are whole microseconds."""
    tags = {tag["key"]: tag.get("value") for tag in _list(span.get("tags")) if isinstance(tag, dict) and "key" in tag}
    above = [ref for ref in _list(span.get("references")) if isinstance(ref, dict) and ref.get("refType") == "CHILD_OF"]
    start, took = span.get("startTime"), span.get("duration")
    failed = tags.get("error") in (True, "true") or tags.get("otel.status_code") == "ERROR"
    return {
        "trace_id": span.get("traceID"), "span_id": span.get("spanID"),
        "parent_span_id": above[0].get("spanID") if above else None, "start_time": start,
        "end_time": start + took if isinstance(start, int) and isinstance(took, int) else None,
        "status": "ERROR" if failed else None, "attributes": {str(key): value for key, value in tags.items()},
    }  # fmt: skip


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError("bad spans", "expected a list of spans")
    return value


def _attributes(value: Any) -> dict[str, Any]:
    """Name -> value, from a plain object or OTLP's list of key and typed value."""
    if isinstance(value, dict):
        return dict(_flat(value, ""))
    found: dict[str, Any] = {}
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict) and isinstance(item.get("key"), str) and isinstance(item.get("value"), dict):
            found[item["key"]] = next(iter(item["value"].values()), None)
    return found


def _flat(value: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    """Names with dots from objects within objects, which some exports make of them."""
    for name, field in value.items():
        if isinstance(field, dict) and before.count(".") < 8:
            yield from _flat(field, f"{before}{name}.")
        else:
            yield f"{before}{name}", field


def _count(attributes: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((token_count(name, attributes[name]) for name in names if attributes.get(name) is not None), None)


def _text(attributes: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((value for name in names if isinstance(value := attributes.get(name), str) and value), None)


def _kind(span: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """OpenInference's kind of a span."""
    return attributes.get("openinference.span.kind") or span.get("span_kind")


def _failed(span: dict[str, Any]) -> bool:
    status = span.get("status_code") or span.get("status")
    code = (status.get("code") or status.get("status_code")) if isinstance(status, dict) else status
    return code in (2, "2", "STATUS_CODE_ERROR", "ERROR")


def _id(span: dict[str, Any], *names: str) -> str:
    return next((value for name in names if isinstance(value := span.get(name), str) and value), "")
