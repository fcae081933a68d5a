"""Langfuse observations: a JSON array, JSON Lines, pages of the API (``{"data": [...]}``), traces that hold theirs
(``{"sessionId": ..., "observations": [...]}``, or ``{"trace": ..., "observations": [...]}`` as the web page saves it),
and exports of the table of observations as CSV or Parquet, where objects are strings of JSON.

Rows are the observations of type ``GENERATION`` (others, like ``SPAN``, are no model calls) that state tokens or have
an input. ``startTime`` is the arrival; ``usageDetails`` has the tokens, in older exports ``usage``. Names come in camel
or snake case. One call may be several observations: `harness.trace.formats.calls` says which are one.

**Tokens.** ``usageDetails`` may hold more than ``input`` and ``output``, such as ``input_cached_tokens`` or
``output_reasoning_tokens``. Some sources count these inside ``input``, others beside it. The ``total`` decides: tokens
are added only when the total says that they were counted beside, and a row whose total fits neither reading, or both,
is refused. Gemini's total has thoughts that nothing else names: they are output.

**Input.** Instrumentations write it as an object, or as a string of JSON: both are decoded. Messages, alone or as
``{"messages": ...}``, are sent. What is neither messages nor a plain text, or has tools, is not the prompt: the row is
replayed by its lengths.

Exports come newest first, so rows are sorted by arrival. The session is ``sessionId`` of the observation or its trace.
Exported observations do not have it: an export of traces beside theirs names it. By itself that has no calls.

Source: Langfuse API reference (observations), documentation pages "Model usage and cost", "Export to blob storage" and
its source (columns of the exports); Gemini API reference, ``UsageMetadata``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from harness.trace.formats.calls import Span, SpanReader
from harness.trace.formats.columnar import chosen_rows, column_names, is_columnar
from harness.trace.formats.record import FailedCallError, Item, LeftOutError, Place, RowError, TraceRecord
from harness.trace.formats.table import header_of, split
from harness.trace.formats.values import (
    DECODE_ERRORS,
    IsoClock,
    decode_object,
    fields_of,
    plain_messages,
    show,
    token_count,
)
from harness.trace.source import TraceFile

_INPUT = ("input", "input_tokens", "inputTokens", "prompt_tokens", "promptTokens")
_OUTPUT = ("output", "output_tokens", "outputTokens", "completion_tokens", "completionTokens")
_TOTAL = ("total", "total_tokens", "totalTokens")
_FLAT = {
    "input": ("inputUsage", "input_usage", *_INPUT[1:]),
    "output": ("outputUsage", "output_usage", *_OUTPUT[1:]),
    "total": ("totalUsage", "total_usage", *_TOTAL[1:]),
}
"""Kind of tokens -> columns of exports that count it beside an observation, or instead of its details."""
_OF_TRACES = {"id", "timestamp", "bookmarked"}
"""Columns of an export of traces."""
_EMPTY = ("", "null", "NULL", "\\N")
_RESPONSE_ID = "gen_ai.response.id"

_READ = frozenset({
    "id", "traceid", "type", "parentobservationid", "starttime", "endtime", "level", "input", "output", "metadata",
    "model", "providedmodelname", "usage", "usagedetails", "sessionid", "timestamp", "bookmarked",
    *(name.replace("_", "").lower() for names in _FLAT.values() for name in names),
})  # fmt: skip
"""Columns that are read of Parquet, in small letters and without marks."""


class Langfuse(SpanReader):
    """Reader of Langfuse observations."""

    summary = "Langfuse observations (JSON, JSON Lines, CSV or Parquet: type GENERATION, startTime, usageDetails)"
    clock = "startTime, a date and time, UTC where no zone is given"
    quoted = True
    columnar = True

    def __init__(self) -> None:
        super().__init__()
        self._clock = IsoClock("startTime")
        self._by_length = self._thoughts = 0
        self._header: list[str] = []
        self._mark = ","
        self._traces = self._observations = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """An observation, a page of them, or the header of an export."""
        fields: Mapping[str, bytes] = fields_of(record)
        if record[:1].isalnum() or record[:1] == b'"':
            fields = dict.fromkeys(header_of(record)[1], b"")
        if _is_trace(fields):
            return True
        for name, few in (("observations", 10**9), ("data", 3)):
            if len(fields) <= few and (page := fields.get(name, b"")).startswith(b"["):
                return b'"traceId"' in page or b'"trace_id"' in page
        return "type" in fields and (
            {"traceId", "startTime"} <= fields.keys() or {"trace_id", "start_time"} <= fields.keys()
        )

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        """Lines, values, CSV records, or rows of a columnar file."""
        if not is_columnar(file):
            return super().records(file)
        return chosen_rows(file, [name for name in column_names(file) if name.replace("_", "").lower() in _READ])

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        """Each file has a header of its own."""
        self._header = []
        return super().rows(records)

    def end(self) -> Iterator[tuple[Place | None, Item]]:
        """The calls."""
        if self._traces and not self._observations:
            yield (
                None,
                RowError(
                    "an export of traces",
                    "this is an export of traces: each row adds up calls. Also export the observations",
                ),
            )
        yield from super().end()

    def _exported(self, record: Any) -> dict[str, Any]:
        """One row of an export; empty for a header."""
        if isinstance(record, RowError):
            raise record
        if isinstance(record, dict):
            return {name: value for name, value in record.items() if value not in _EMPTY}
        if not self._header:
            self._mark, self._header = header_of(record)
            return {}
        fields = split(record, self._mark)
        if fields == self._header:
            return {}
        if len(fields) != len(self._header):
            raise RowError(
                "bad row", f"{len(fields)} fields, expected {len(self._header)} as in the header: {show(record)}"
            )
        return {name: value for name, value in zip(self._header, fields, strict=True) if value not in _EMPTY}

    def spans(self, record: Any) -> Iterator[Span | RowError | LeftOutError]:
        """Read one observation, page or trace."""
        if isinstance(record, bytes) and record.lstrip()[:1] == b"{":
            value = decode_object(record)
        elif not (value := self._exported(record)):
            return
        if _is_trace(value) and not isinstance(value.get("observations"), list):
            self._traces += 1
            if (session := _session(value)) is not None:
                yield Span(_text(value.get("id")) or "", "", "", session_id=session)
            return
        trace: dict[str, Any] = {}
        observations = value.get("data")
        if not isinstance(observations, list):
            observations = value.get("observations")
            trace = value["trace"] if isinstance(value.get("trace"), dict) else value
        if not isinstance(observations, list):
            observations, trace = [value], {}
        for observation in observations:
            try:
                if not isinstance(observation, dict):
                    raise RowError("not an object", "an entry of the page is not a JSON object")
                yield self._span(observation, trace)
            except (RowError, LeftOutError) as e:
                yield e

    def notes(self) -> list[str]:
        """Prompts that cannot be sent as they are, and counts that were added up."""
        said = []
        if self._by_length:
            said.append(
                f"{self._by_length} observations have an input that is not the prompt as text or messages (an object, "
                "tools, a transcript): replayed by their lengths"
            )
        if self._thoughts:
            said.append(
                f"{self._thoughts} observations of Gemini have a total above input and output: the rest is taken for "
                "its thoughts, which are output"
            )
        return said

    def _span(self, observation: dict[str, Any], trace: dict[str, Any]) -> Span:
        self._observations += 1
        span = Span(
            trace_id=_text(_get(observation, "traceId", "trace_id") or trace.get("id")) or "",
            id=_text(observation.get("id")) or "",
            parent=_text(_get(observation, "parentObservationId", "parent_observation_id")) or "",
        )
        if observation.get("type") != "GENERATION":
            return span
        start_ns = self._clock.ns(str(_get(observation, "startTime", "start_time")))
        end = _get(observation, "endTime", "end_time")
        attributes = _object(observation.get("metadata"))
        attributes = _object(attributes.get("attributes", attributes))
        return span._replace(
            start_ns=start_ns,
            end_ns=None if end is None else self._clock.ns(str(end)),
            response_id=_text(_decoded(attributes.get(_RESPONSE_ID))),
            item=self._item(observation, trace, start_ns),
        )

    def _item(self, observation: dict[str, Any], trace: dict[str, Any], arrival_ns: int) -> Item:
        if observation.get("level") == "ERROR":
            return FailedCallError("failed call (level ERROR)")
        details = _object(_get(observation, "usageDetails", "usage_details")) or _object(observation.get("usage"))
        if not details:
            details = {kind: count for kind, names in _FLAT.items() if (count := _get(observation, *names)) is not None}
        model = _text(_get(observation, "model", "providedModelName", "provided_model_name"))
        counts = self._counts(details, model)
        prompt = _prompt(observation.get("input"))
        if counts == (None, None) and not prompt.given:
            if observation.get("output") is None:
                return LeftOutError("generation without tokens, input or output (an event of another)")
            return RowError("no token counts", "the observation has neither usageDetails nor usage, and no input")
        if prompt.text is None and prompt.messages is None:
            if counts[0] is None:
                return RowError("no token counts", "neither input tokens nor a prompt of text: nothing to send")
            self._by_length += prompt.given
        return TraceRecord(
            arrival_ns, *counts, _text(_get(observation, "sessionId", "session_id") or _session(trace)),
            text=prompt.text, messages=prompt.messages, model=model, cached_tokens=_cached(details, counts[0]),
        )  # fmt: skip

    def _counts(self, details: Mapping[str, Any], model: str | None) -> tuple[int | None, int | None]:
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
        into = next((counts[name] for name in _INPUT if name in counts), None)
        out = next((counts[name] for name in _OUTPUT if name in counts), None)
        total = next((counts[name] for name in _TOTAL if name in counts), None)
        if into is None or (out is None and total not in (None, into)):
            named = ", ".join(sorted(details))
            raise RowError("no token counts", f"no input and output among the usage details {named}")
        if out is None:
            return into, None
        rest = {n: c for n, c in counts.items() if c and n not in (*_INPUT, *_OUTPUT, *_TOTAL)}
        if not rest and total is not None and total > into + out and "gemini" in (model or "").lower():
            self._thoughts += 1
            return into, total - into
        return _reading(into, out, total, rest)


def _cached(details: Mapping[str, Any], input_tokens: int | None) -> int | None:
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


class _Input(NamedTuple):
    """What an observation's input is."""

    given: bool = False
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


def _prompt(asked: Any) -> _Input:
    if asked is None or asked in ("", [], {}):
        return _Input()
    decoded = _decoded(asked)
    if isinstance(decoded, str):
        # A transcript ("user: ...") is not what was sent: the template's own marks are gone.
        return _Input(given=True) if _is_transcript(decoded) else _Input(given=True, text=decoded)
    if isinstance(decoded, dict):  # tools become part of the prompt, so the text would not be all of it
        has_tools = decoded.get("tools") or decoded.get("functions")
        decoded = None if has_tools else decoded.get("messages") or _of_gemini(decoded)
    return _Input(given=True, messages=plain_messages(decoded))


def _of_gemini(asked: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Messages of a request to Gemini: contents with parts of text."""
    contents = asked.get("contents")
    if not isinstance(contents, list) or not all(isinstance(content, dict) for content in contents):
        return None
    system = asked.get("systemInstruction") or asked.get("system_instruction")
    roles = {"model": "assistant", None: "user"}
    return [
        {"role": roles.get(content.get("role"), content.get("role")), "content": _parts(content.get("parts"))}
        for content in ([{**system, "role": "system"}] if isinstance(system, dict) else []) + contents
    ]


def _parts(parts: Any) -> str | None:
    """The text of parts that are nothing but text."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) and set(part) == {"text"} for part in parts):
        return None
    return "".join(str(part["text"]) for part in parts)


_SPEAKERS = ("user:", "system:", "developer:", "assistant:", "human:", "ai:", "tool:")


def _is_transcript(text: str) -> bool:
    lines = text.lower().splitlines()
    return bool(lines) and lines[0].lstrip().startswith(_SPEAKERS)


def _decoded(value: Any) -> Any:
    """The value in a string of JSON; other values as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "[", '"'):
        return value
    try:
        return msgspec.json.decode(value)
    except DECODE_ERRORS:
        # Cut by whoever wrote it, or a text that begins with a bracket.
        return {} if value.lstrip()[:2] in ('{"', "[{") else value


def _object(value: Any) -> dict[str, Any]:
    """An object, also from a string of JSON or a map of Arrow; empty for anything else."""
    if isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return {str(name): inner for name, inner in value}
    value = _decoded(value)
    return value if isinstance(value, dict) else {}


def _is_trace(fields: Mapping[str, Any]) -> bool:
    return fields.keys() >= _OF_TRACES and "type" not in fields


def _session(trace: dict[str, Any]) -> str | None:
    return _text(_get(trace, "sessionId", "session_id"))


def _get(observation: dict[str, Any], *names: str) -> Any:
    return next((observation[name] for name in names if observation.get(name) is not None), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
