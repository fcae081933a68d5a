"""Spans of tracing: Langfuse observations, OpenTelemetry and OpenInference. One call may be several of them:
`harness.trace.formats.calls` says which are one.

**Langfuse** (JSON, pages of the API, traces that hold theirs, exports of observations as CSV or Parquet with strings of
JSON): rows are the observations of type ``GENERATION``. ``usageDetails`` may hold more than input and output, counted
inside by some sources and beside by others; the ``total`` decides, and a row whose total fits neither reading, or both,
is refused. Gemini's total has thoughts that nothing else names: they are output. An input that is neither messages nor
a plain text, or has tools, is replayed by its lengths. The session is that of the observation or its trace, which an
export of traces beside the observations names.

**OpenTelemetry** (OTLP/JSON, Tempo, the SDK's console exporter, Phoenix, Jaeger): input tokens include cached ones;
where more tokens are cached than were input, the source counts them (and ``cache_creation``) beside the input, and they
are added. Without a session of their own, the calls of an agent's run are one.

Source: Langfuse API reference and documentation; Gemini API reference, ``UsageMetadata``; OpenTelemetry semantic
conventions for generative AI (Development), OTLP specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.trace.formats.calls import Span, SpanReader
from harness.trace.formats.columnar import chosen_rows, is_columnar, schema_of
from harness.trace.formats.record import (
    FailedCallError,
    Item,
    LeftOutError,
    Object,
    Place,
    RowError,
    TraceRecord,
    V,
    as_object,
    attempt,
    decode_object,
    decoded,
    fields_of,
    find,
    object_of,
    text_of,
)
from harness.trace.formats.values import (
    Columns,
    count_of,
    header_of,
    plain_messages,
    token_count,
    wall_clock_ns,
)
from harness.trace.source import TraceFile

_INPUT = ("input", "inputtokens", "prompttokens", "inputusage")
_OUTPUT = ("output", "outputtokens", "completiontokens", "outputusage")
_TOTAL = ("total", "totaltokens", "totalusage")
_COUNTS = frozenset({*_INPUT, *_OUTPUT, *_TOTAL})
_FLAT = _COUNTS - {"input", "output", "total"}
"""Columns of exports that count tokens beside an observation, or instead of its details."""
_OF_TRACES = frozenset({"id", "timestamp", "bookmarked"})
_READ = _OF_TRACES | _FLAT | {
    "traceid", "type", "parentobservationid", "starttime", "endtime", "level", "input", "output", "metadata", "model",
    "providedmodelname", "usage", "usagedetails", "sessionid",
}  # fmt: skip
_EMPTY = ("", "null", "NULL", "\\N")
_BY_LENGTH = "observations have an input that is not the prompt as text or messages: replayed by their lengths"
_THOUGHTS = "observations of Gemini have a total above input and output: the rest is its thoughts, which are output"
_ADDED = "spans count cached tokens beside the input tokens: they were added"
_SPEAKERS = ("user:", "system:", "developer:", "assistant:", "human:", "ai:", "tool:")


def _same(name: str) -> str:
    return name.replace("_", "").lower()


def _named(value: Mapping[str, V]) -> dict[str, V]:
    return {_same(name): inner for name, inner in value.items()}


class Langfuse(SpanReader):
    summary = "Langfuse observations (JSON, JSON Lines, CSV or Parquet: type GENERATION, startTime, usageDetails)"
    clock = "startTime, a date and time, UTC where no zone is given"
    quoted = True
    columnar = True

    def __init__(self) -> None:
        super().__init__()
        self._traces = self._observations = 0
        self._columns = Columns()

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields: Mapping[str, bytes] = fields_of(record)
        if record[:1].isalnum() or record[:1] == b'"':
            fields = dict.fromkeys(header_of(record)[1], b"")
        if _is_trace(fields):
            return True
        for name in ("observations", "data") if len(fields) <= 3 else ("observations",):
            if (page := fields.get(name, b"")).startswith(b"["):
                return b'"traceId"' in page or b'"trace_id"' in page
        return {"type", "traceid", "starttime"} <= set(map(_same, fields))

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        if not is_columnar(file):
            return super().records(file)
        return chosen_rows(file, [name for name in schema_of(file).names if _same(name) in _READ])

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        self._columns = Columns()
        return super().rows(records)

    def end(self) -> Iterator[tuple[Place | None, Item]]:
        if self._traces and not self._observations:
            why = "this is an export of traces: each row adds up calls. Also export the observations"
            yield None, RowError("an export of traces", why)
        yield from super().end()

    def spans(self, record: Any) -> Iterator[Span | RowError | LeftOutError]:
        row: Object | None = record if isinstance(record, dict) else None
        if isinstance(record, bytes):
            row = decode_object(record) if record.lstrip()[:1] == b"{" else self._columns.read(record)
        if row is None:
            return
        value = _named({name: inner for name, inner in row.items() if inner not in _EMPTY})
        page = find(value, "data", "observations")
        if _is_trace(value) and not isinstance(page, list):
            self._traces += 1
            if (session := text_of(value, "sessionid")) is not None:
                yield Span(text_of(value, "id") or "", "", "", session_id=session)
            return
        page, trace = (page, _named(object_of(value, "trace")) or value) if isinstance(page, list) else ([value], {})
        for observation in page:
            yield attempt(lambda each: self._span(_named(as_object(each)), trace), observation)

    def _span(self, observation: Object, trace: Object) -> Span:
        self._observations += 1
        span = Span(
            text_of(observation, "traceid") or text_of(trace, "id") or "", text_of(observation, "id") or "",
            text_of(observation, "parentobservationid") or "",
        )  # fmt: skip
        if observation.get("type") != "GENERATION":
            return span
        end, metadata = find(observation, "endtime"), object_of(observation, "metadata")
        attributes = object_of(metadata, "attributes") if "attributes" in metadata else metadata
        start_ns = wall_clock_ns("startTime", str(find(observation, "starttime")))
        return span._replace(
            start_ns=start_ns,
            end_ns=None if end is None else wall_clock_ns("endTime", str(end)),
            response_id=text_of({"id": decoded(attributes.get("gen_ai.response.id"))}, "id"),
            item=self._item(observation, trace, start_ns),
        )

    def _item(self, observation: Object, trace: Object, arrival_ns: int) -> Item:
        if observation.get("level") == "ERROR":
            return FailedCallError("failed call (level ERROR)")
        details = object_of(observation, "usagedetails") or object_of(observation, "usage")
        if not details:
            details = {name: observation[name] for name in sorted(_FLAT) if observation.get(name) is not None}
        model = text_of(observation, "model", "providedmodelname")
        into, out = self._counts(details, model)
        asked = decoded(observation.get("input"))
        given = observation.get("input") not in (None, "", [], {})
        # A transcript ("user: ...") is not what was sent: the template's own marks are gone.
        text = asked if given and isinstance(asked, str) and not asked.lower().lstrip().startswith(_SPEAKERS) else None
        messages = plain_messages(_messages(asked))
        if into is None and out is None and not given:
            if observation.get("output") is None:
                return LeftOutError("generation without tokens, input or output (an event of another)")
            return RowError("no token counts", "the observation has neither usageDetails nor usage, and no input")
        if text is None and messages is None:
            if into is None:
                return RowError("no token counts", "neither input tokens nor a prompt of text: nothing to send")
            self.noted[_BY_LENGTH] += given
        return TraceRecord(
            arrival_ns, into, out, text_of(observation, "sessionid") or text_of(trace, "sessionid"),
            text=text, messages=messages, model=model, cached_tokens=_cached(details, into),
        )  # fmt: skip

    def _counts(self, details: Object, model: str | None) -> tuple[int | None, int | None]:
        """Input and output tokens, everything counted once; None: not recorded."""
        if str(details.get("unit") or "TOKENS").upper() != "TOKENS":
            raise RowError("not tokens", f"usage is counted in {details['unit']}, not in tokens")
        counts = {
            name: token_count(name, value) or 0
            for name, value in details.items()
            if name != "unit" and "cost" not in name.lower() and value is not None
        }
        if not counts:
            return None, None
        same = _named(counts)
        into, out, total = (
            next((same[name] for name in names if name in same), None) for names in (_INPUT, _OUTPUT, _TOTAL)
        )
        if into is None or (out is None and total not in (None, into)):
            named = ", ".join(sorted(details))
            raise RowError("no token counts", f"no input and output among the usage details {named}")
        if out is None:
            return into, None
        rest = {name: count for name, count in counts.items() if count and _same(name) not in _COUNTS}
        if not rest and total is not None and total > into + out and "gemini" in (model or "").lower():
            self.noted[_THOUGHTS] += 1
            return into, total - into
        return _reading(into, out, total, rest)


def _cached(details: Object, input_tokens: int | None) -> int | None:
    """Of the input, what was read from a prompt cache; None where the details do not name it."""
    read = [
        token_count(name, value) or 0
        for name, value in details.items()
        if "cach" in name.lower() and not any(word in name.lower() for word in ("creat", "writ", "cost", "output"))
    ]
    found = sum(read)
    return found if read and found <= (input_tokens or 0) else None


def _reading(into: int, out: int, total: int | None, rest: dict[str, int]) -> tuple[int, int]:
    """Input and output tokens, where only one reading of the others gives the total."""
    beside_out = sum(c for n, c in rest.items() if "output" in n.lower() or "completion" in n.lower())
    beside_in = sum(rest.values()) - beside_out
    # Each kind of extra is either inside its own count or beside it.
    readings = {(into + more_in, out + more_out) for more_in in {0, beside_in} for more_out in {0, beside_out}}
    if total is not None:
        readings = {reading for reading in readings if sum(reading) == total}
    if len(readings) != 1:
        extras = ", ".join(f"{n} {c}" for n, c in sorted(rest.items())) or "no others"
        why = "no total says" if total is None else f"the total of {total} does not say"
        raise RowError(
            "ambiguous usage",
            f"input {into}, output {out}, {extras}: {why} whether these are counted inside or beside",
        )
    return readings.pop()


def _messages(asked: object) -> object:
    """What may be the messages of an input. Tools become part of the prompt: then they are not all of it."""
    if not isinstance(asked, dict):
        return asked
    if asked.get("tools") or asked.get("functions"):
        return None
    contents = asked.get("contents")
    if asked.get("messages") or not isinstance(contents, list):
        return asked.get("messages")
    system = asked.get("systemInstruction") or asked.get("system_instruction")  # a request to Gemini
    said = [*([{**system, "role": "system"}] if isinstance(system, dict) else []), *contents]
    roles = {"model": "assistant", None: "user"}
    return [
        {"role": roles.get(role := text_of(each, "role"), role), "content": _parts(find(each, "parts"))}
        for each in said
    ]


def _parts(parts: object) -> str | None:
    is_text = isinstance(parts, list) and all(isinstance(part, dict) and set(part) == {"text"} for part in parts)
    return "".join(str(find(part, "text")) for part in parts) if is_text and isinstance(parts, list) else None


def _is_trace(fields: Object) -> bool:
    return fields.keys() >= _OF_TRACES and "type" not in fields


# --- OpenTelemetry ---------------------------------------------------------------------------------------------------

_STARTS = ("startTimeUnixNano", "start_time_unix_nano", "start_time", "startTime")
_ENDS = ("endTimeUnixNano", "end_time_unix_nano", "end_time", "endTime")
_INPUTS = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt")
_OUTPUTS = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion")
_CACHED = (
    "gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens",
    "llm.token_count.prompt_details.cache_read",
)  # fmt: skip
_SESSION = ("gen_ai.conversation.id", "session.id", "langfuse.session.id")
_MODEL = ("gen_ai.response.model", "gen_ai.request.model", "llm.model_name")
_OPENINFERENCE = (
    "LLM", "AGENT", "CHAIN", "TOOL", "RETRIEVER", "EMBEDDING", "RERANKER", "GUARDRAIL", "EVALUATOR", "PROMPT",
)  # fmt: skip
_CALLS = ("chat", "text_completion", "generate_content", "completion")
_NO_CALLS = ("embeddings", "invoke_agent", "create_agent", "execute_tool", "invoke_workflow")


class OTel(SpanReader):
    summary = "OpenTelemetry gen_ai or OpenInference spans (JSON: OTLP, Tempo, Jaeger, Phoenix, console exporter)"
    clock = "start of the span: a date, or a time since 1970 whose size shows the unit"
    telling = (
        frozenset({"resourceSpans"}), frozenset({"batches"}), frozenset({"spans", "trace_id"}),
        frozenset({"context", "attributes", "start_time"}),
    )  # fmt: skip

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        pages = fields_of(record).get("data", b"")
        return super().sniff(record) or (b'"traceID"' in pages and b'"spans"' in pages)

    def spans(self, record: bytes) -> Iterator[Span | RowError | LeftOutError]:
        yield from (attempt(self._span, span) for span in _spans(decode_object(record)))

    def _span(self, found: object) -> Span:
        span = as_object(found)
        span = _from_jaeger(span) if "traceID" in span else span
        attributes = _attributes(span.get("attributes"))
        kind = find(attributes, "openinference.span.kind") or span.get("span_kind")
        item = self._item(span, attributes, kind)
        return Span(
            text_of(span, "traceId", "trace_id", "context.trace_id", "context.traceId") or "",
            text_of(span, "spanId", "span_id", "context.span_id", "context.spanId") or "",
            text_of(span, "parentSpanId", "parent_span_id", "parent_id") or "",
            start_ns=0 if item is None else _time(span, _STARTS) or 0,
            end_ns=None if item is None else _time(span, _ENDS),
            response_id=None if item is None else text_of(attributes, "gen_ai.response.id"),
            item=item,
            agent=find(attributes, "gen_ai.operation.name") == "invoke_agent" or kind == "AGENT",
        )

    def _item(self, span: Object, attributes: Object, kind: object) -> Item | None:
        """What the span says of a model call; None when it is about something else."""
        operation = find(attributes, "gen_ai.operation.name")
        about = any(name.partition(".")[0] in ("gen_ai", "llm", "openinference") for name in attributes)
        if not about or operation in _NO_CALLS or (kind in _OPENINFERENCE and kind != "LLM"):
            return None
        input_tokens, output_tokens = count_of(attributes, *_INPUTS), count_of(attributes, *_OUTPUTS)
        status = find(span, "status_code", "status.code", "status.status_code", "status")
        failed = status in (2, "2", "STATUS_CODE_ERROR", "ERROR")
        known = operation in _CALLS or kind == "LLM" or (operation is None and failed)
        if input_tokens is None and output_tokens is None and not known:
            return None
        arrival_ns = _time(span, _STARTS)
        if arrival_ns is None:
            raise RowError("no start time", "the span has no start time")
        if failed:
            return FailedCallError("failed call (status error)")
        cached = count_of(attributes, *_CACHED)
        if input_tokens is not None and (cached or 0) > input_tokens:
            self.noted[_ADDED] += 1
            written = ("gen_ai.usage.cache_creation.input_tokens", "gen_ai.usage.cache_creation_input_tokens")
            input_tokens += (cached or 0) + (count_of(attributes, *written) or 0)
        session, model = text_of(attributes, *_SESSION), text_of(attributes, *_MODEL)
        return TraceRecord(arrival_ns, input_tokens, output_tokens, session, model=model, cached_tokens=cached)


def _time(span: Object, names: tuple[str, ...]) -> int | None:
    """Nanoseconds since 1970 of the first of these; None without one."""
    return next((wall_clock_ns(name, value) for name in names if (value := span.get(name)) is not None), None)


def _spans(value: Object) -> Iterator[object]:
    if isinstance(traces := value.get("data"), list):
        for trace in traces:
            yield from _list(find(trace, "spans"))
        return
    groups = find(value, "resourceSpans", "batches")
    if groups is None:
        yield from value["spans"] if isinstance(value.get("spans"), list) else [value]  # type: ignore[misc]
        return
    for group in _list(groups):
        for scope in _list(find(group, "scopeSpans", "instrumentationLibrarySpans")):
            yield from _list(find(scope, "spans"))


def _from_jaeger(span: Object) -> Object:
    """A span of Jaeger's JSON with OpenTelemetry's names. Its times are whole microseconds."""
    tags = {str(find(tag, "key")): find(tag, "value") for tag in _list(span.get("tags"))}
    parents = [find(ref, "spanID") for ref in _list(span.get("references")) if find(ref, "refType") == "CHILD_OF"]
    start, took = span.get("startTime"), span.get("duration")
    failed = tags.get("error") in (True, "true") or tags.get("otel.status_code") == "ERROR"
    return {
        "trace_id": span.get("traceID"), "span_id": span.get("spanID"), "parent_id": parents[0] if parents else None,
        "start_time": start, "end_time": start + took if isinstance(start, int) and isinstance(took, int) else None,
        "status": "ERROR" if failed else None, "attributes": tags,
    }  # fmt: skip


def _list(value: object) -> list[object]:
    if value is not None and not isinstance(value, list):
        raise RowError("bad spans", "expected a list of spans")
    return value or []


def _attributes(value: object) -> Object:
    """Name -> value, from a plain object (perhaps of objects) or OTLP's list of key and typed value."""
    if not isinstance(value, list):
        return object_of(value)
    typed = {text_of(item, "key"): object_of(item, "value") for item in value}
    return {name: next(iter(inner.values()), None) for name, inner in typed.items() if name}
