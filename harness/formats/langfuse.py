"""Langfuse observations: a JSON array, JSON Lines, pages of the API (``{"data": [...]}``), or traces that hold theirs
(``{"sessionId": ..., "observations": [...]}``, or ``{"trace": ..., "observations": [...]}`` as the web page saves it).

Rows are the observations of type ``GENERATION`` (others, like ``SPAN``, are no model calls) that state tokens or have
an input. ``startTime`` is the arrival; ``usageDetails`` has the tokens, in older exports ``usage``. Names come in camel
or snake case. One call may be several observations: `harness.formats.calls` says which are one.

**Tokens.** ``usageDetails`` may hold more than ``input`` and ``output``, such as ``input_cached_tokens`` or
``output_reasoning_tokens``. Some sources count these inside ``input``, others beside it. The ``total`` decides: tokens
are added only when the total says that they were counted beside, and a row whose total fits neither reading, or both,
is refused. Gemini's total has thoughts that nothing else names: they are output.

**Input.** Instrumentations write it as an object, or as a string of JSON: both are decoded. Messages, alone or as
``{"messages": ...}``, are sent. What is neither messages nor a plain text, or has tools, is not the prompt: the row is
replayed by its lengths.

Exports come newest first, so rows are sorted by arrival. The session is ``sessionId`` of the observation or its trace.

Source: Langfuse API reference (observations), documentation page "Model usage and cost"; Gemini API reference,
``UsageMetadata``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from harness.formats.calls import Span, SpanReader
from harness.formats.row import FailedCallError, Item, LeftOutError, Row, RowError
from harness.formats.values import DECODE_ERRORS, IsoClock, decode_object, fields_of, plain_messages, token_count

_INPUT = ("input", "input_tokens", "inputTokens", "prompt_tokens", "promptTokens")
_OUTPUT = ("output", "output_tokens", "outputTokens", "completion_tokens", "completionTokens")
_TOTAL = ("total", "total_tokens", "totalTokens")
_RESPONSE_ID = "gen_ai.response.id"


class Langfuse(SpanReader):
    """Reader of Langfuse observations."""

    summary = "Langfuse observations (JSON or JSON Lines: type GENERATION, startTime, usageDetails)"
    clock = "startTime, a date and time, UTC where no zone is given"

    def __init__(self) -> None:
        super().__init__()
        self._clock = IsoClock("startTime")
        self._by_length = self._thoughts = 0

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

    def spans(self, record: bytes) -> Iterator[Span | RowError | LeftOutError]:
        """Read one observation, page or trace."""
        value = decode_object(record)
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
        span = Span(
            trace_id=_text(_get(observation, "traceId", "trace_id") or trace.get("id")) or "",
            id=_text(observation.get("id")) or "",
            parent=_text(_get(observation, "parentObservationId", "parent_observation_id")) or "",
        )
        if observation.get("type") != "GENERATION":
            return span
        start_ns = self._clock.ns(str(_get(observation, "startTime", "start_time")))
        end = _get(observation, "endTime", "end_time")
        attributes = _decoded(observation.get("metadata"))
        attributes = attributes.get("attributes", attributes) if isinstance(attributes, dict) else {}
        return span._replace(
            start_ns=start_ns,
            end_ns=None if end is None else self._clock.ns(str(end)),
            response_id=_text(attributes.get(_RESPONSE_ID)) if isinstance(attributes, dict) else None,
            item=self._item(observation, trace, start_ns),
        )

    def _item(self, observation: dict[str, Any], trace: dict[str, Any], arrival_ns: int) -> Item:
        if observation.get("level") == "ERROR":
            return FailedCallError("failed call (level ERROR)")
        details = _get(observation, "usageDetails", "usage_details") or observation.get("usage")
        model = _text(_get(observation, "model", "providedModelName", "provided_model_name"))
        counts = self._counts(_decoded(details), model)
        prompt = _prompt(observation.get("input"))
        if counts == (None, None) and not prompt.given:
            if observation.get("output") is None:
                return LeftOutError("generation without tokens, input or output (an event of another)")
            return RowError("no token counts", "the observation has neither usageDetails nor usage, and no input")
        if prompt.text is None and prompt.messages is None:
            if counts[0] is None:
                return RowError("no token counts", "neither input tokens nor a prompt of text: nothing to send")
            self._by_length += prompt.given
        return Row(
            arrival_ns, *counts, _text(_get(observation, "sessionId", "session_id") or _session(trace)),
            text=prompt.text, messages=prompt.messages, model=model,
        )  # fmt: skip

    def _counts(self, details: Any, model: str | None) -> tuple[int | None, int | None]:
        """Input and output tokens, everything counted once; None: not recorded."""
        if not isinstance(details, dict):
            return None, None
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


class _Prompt(NamedTuple):
    """What an observation's input is."""

    given: bool = False
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


def _prompt(asked: Any) -> _Prompt:
    if asked is None or asked in ("", [], {}):
        return _Prompt()
    decoded = _decoded(asked)
    if isinstance(decoded, str):
        # A transcript ("user: ...") is not what was sent: the template's own marks are gone.
        return _Prompt(given=True) if _is_transcript(decoded) else _Prompt(given=True, text=decoded)
    if isinstance(decoded, dict):  # tools become part of the prompt, so the text would not be all of it
        has_tools = decoded.get("tools") or decoded.get("functions")
        decoded = None if has_tools else decoded.get("messages") or _of_gemini(decoded)
    return _Prompt(given=True, messages=plain_messages(decoded))


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


def _session(trace: dict[str, Any]) -> str | None:
    return _text(_get(trace, "sessionId", "session_id"))


def _get(observation: dict[str, Any], *names: str) -> Any:
    return next((observation[name] for name in names if observation.get(name) is not None), None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
