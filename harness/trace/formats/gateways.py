"""JSON logs of gateways in front of models: Kong, Cloudflare AI Gateway, Azure API Management, Caddy, Traefik.

========================  ============================================================================================
Kong                      ``started_at`` (ms), ``request``, ``response.status``; with the AI proxy
                          ``ai.<plugin>.usage.prompt_tokens`` and ``completion_tokens``
Cloudflare AI Gateway     ``created_at``, ``tokens_in``, ``tokens_out``, ``success``; ``cached`` ones reached no model
Azure API Management      ``ApiManagementGatewayLlmLog``: ``PromptTokens``, ``CompletionTokens`` on the row of a call
                          whose ``SequenceNumber`` is 0; its other rows are the prompt and the answer
Azure OpenAI diagnostics  ``RequestResponse``: ``time`` (the end) less ``durationMs``; no token counts
Caddy                     ``ts`` (the end, s) less ``duration`` (s); no token counts
Traefik                   ``StartUTC``; no token counts
========================  ============================================================================================

Where a log has no lengths, they must be stated. Successful calls of text completion APIs are kept, others counted.
All are sorted by arrival.

Source: documentation of Kong (AI Proxy, log serializer), Cloudflare (AI Gateway logs), Azure Monitor (tables
ApiManagementGatewayLlmLog, AzureDiagnostics), Caddy (log), Traefik (access logs).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from harness.trace.formats.access_log import check_call
from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, Rows, TraceRecord
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Copies,
    called,
    decode_object,
    epoch_ns,
    fields_of,
    rows_of,
    show,
    token_count,
    wall_clock_ns,
)

_Object = Mapping[str, Any]


class Kong(Reader):
    """Reader of Kong's logs."""

    summary = "Kong log (JSON Lines: started_at, latencies; ai usage where its AI proxy counts)"
    clock = "started_at, milliseconds since 1970"
    in_order = False

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Its times and its request."""
        return {"started_at", "latencies", "request", "response"} <= fields_of(record).keys()

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        value = decode_object(record)
        request, response = _object(value, "request"), _object(value, "response")
        path = request.get("uri") or request.get("url")
        check_call(f"{request.get('method')} {path}", str(response.get("status")))
        arrival_ns = epoch_ns("started_at", value.get("started_at"))
        for plugin in _object(value, "ai").values():
            usage = _object(plugin, "usage") if isinstance(plugin, dict) else {}
            if "prompt_tokens" in usage:
                model = _object(plugin, "meta").get("response_model") or _object(plugin, "meta").get("request_model")
                return _counted(arrival_ns, usage, "prompt_tokens", "completion_tokens", model)
        return TraceRecord(arrival_ns, None, None)


class Cloudflare(Reader):
    """Reader of Cloudflare AI Gateway logs."""

    summary = "Cloudflare AI Gateway log (JSON page or lines: created_at, tokens_in, tokens_out)"
    clock = "created_at, a date and time"
    in_order = False

    def __init__(self) -> None:
        self._copies = Copies("id")

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Its names, in a line or a page."""
        fields = fields_of(record)
        page = fields.get("result", b"")
        return {"created_at", "tokens_in", "tokens_out"} <= fields.keys() or (
            page.startswith(b"[") and b'"tokens_in"' in page and b'"created_at"' in page
        )

    def parse(self, record: bytes) -> TraceRecord | Rows:
        """Read a line or a page."""
        value = decode_object(record)
        return rows_of(value["result"], self._row) if isinstance(value.get("result"), list) else self._row(value)

    def _row(self, value: dict[str, Any]) -> TraceRecord:
        self._copies.check(str(value.get("id") or ""))
        if value.get("cached") in (True, 1):
            raise LeftOutError("answered from the gateway's cache")
        if value.get("success") in (False, 0):
            raise FailedCallError("failed call (success false)")
        arrival_ns = wall_clock_ns("created_at", value.get("created_at"))
        return _counted(arrival_ns, value, "tokens_in", "tokens_out", value.get("model"))


class AzureGateway(Reader):
    """Reader of Azure's gateway and diagnostic logs."""

    summary = "Azure API Management or Azure OpenAI diagnostic log (JSON: GatewayLlmLog, RequestResponse)"
    clock = "time or TimeGenerated; of RequestResponse less durationMs"
    in_order = False

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Names of one of the tables, in a line or a page."""
        fields = fields_of(record)
        page = fields.get("records", b"")
        if page.startswith(b"["):
            return b"PromptTokens" in page or b'"RequestResponse"' in page
        return (
            {"CorrelationId", "SequenceNumber"} <= fields.keys()
            or b"PromptTokens" in fields.get("properties", b"")
            or fields.get("category") == b'"RequestResponse"'
        )

    def parse(self, record: bytes) -> TraceRecord | Rows:
        """Read a line or a page."""
        value = decode_object(record)
        records = value.get("records")
        return rows_of(records, self._row) if isinstance(records, list) else self._one(self._row(value))

    @staticmethod
    def _one(row: TraceRecord | None) -> TraceRecord | Rows:
        return () if row is None else row

    def _row(self, value: dict[str, Any]) -> TraceRecord | None:
        facts = _object(value, "properties")
        if isinstance(text := value.get("properties"), str):
            try:
                facts = msgspec.json.decode(text, type=dict[str, Any])
            except DECODE_ERRORS:
                raise RowError("not JSON", "properties is not a JSON object") from None
        facts = {**value, **facts}
        time_ns = wall_clock_ns("time", value.get("TimeGenerated") or value.get("time"))
        if value.get("category") == "RequestResponse":
            if "Completions" not in str(value.get("operationName")):
                raise LeftOutError("not a call of a text completion API")
            check_call("POST /completions", str(value.get("resultSignature")))
            return TraceRecord(time_ns - round(_number("durationMs", value.get("durationMs")) * 1e6), None, None)
        if _number("SequenceNumber", facts.get("SequenceNumber", 0)) != 0:
            return None
        return _counted(time_ns, facts, "PromptTokens", "CompletionTokens", facts.get("ModelName"))


class Caddy(Reader):
    """Reader of Caddy's access log."""

    summary = "Caddy access log (JSON Lines: ts, duration, request): arrivals only"
    clock = "ts, the end of the request in seconds since 1970, less duration in seconds"
    in_order = False

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Its names."""
        return {"ts", "duration", "request", "status"} <= fields_of(record).keys()

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        value = decode_object(record)
        request = _object(value, "request")
        check_call(f"{request.get('method')} {request.get('uri')}", str(value.get("status")))
        duration_ns = round(_number("duration", value.get("duration")) * 1e9)
        return TraceRecord(wall_clock_ns("ts", value.get("ts")) - duration_ns, None, None)


class Traefik(Reader):
    """Reader of Traefik's access log."""

    summary = "Traefik access log (JSON Lines: StartUTC, RequestPath, DownstreamStatus): arrivals only"
    clock = "StartUTC, the start of the request"
    in_order = False

    @staticmethod
    def sniff(record: bytes) -> bool:
        """Its names."""
        return {"StartUTC", "RequestPath", "DownstreamStatus"} <= fields_of(record).keys()

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        value = decode_object(record)
        check_call(f"{value.get('RequestMethod')} {value.get('RequestPath')}", str(value.get("DownstreamStatus")))
        return TraceRecord(wall_clock_ns("StartUTC", value.get("StartUTC")), None, None)


def _counted(arrival_ns: int, fields: _Object, into: str, out: str, model: object) -> TraceRecord:
    input_tokens, output_tokens = token_count(into, fields.get(into)), token_count(out, fields.get(out))
    called(input_tokens, output_tokens)
    return TraceRecord(arrival_ns, input_tokens, output_tokens, model=model if isinstance(model, str) else None)


def _object(value: _Object, name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1e9:
        raise RowError(f"bad {name}", f"{name} is {show(str(value))}, expected a number")
    return number
