r"""Access logs of proxies and gateways in front of models: when requests arrived, and where they say so how long.

Kept are successful POSTs to a text completion API (``/v1/chat/completions``, ``/v1/messages``, ...); other requests and
failures are counted. Where the log has no lengths, they must be stated (``harness trace convert --input-tokens ...
--output-tokens ...``).

**nginx** writes a line when a request *ends*, so the arrival is the end less ``$request_time``. Read are JSON logs with
``request_time`` and ``msec``, ``time_iso8601`` or ``time_local``; ingress-nginx's own format; and the combined format,
with ``rt=`` or ``request_time=`` after it. Plain combined has no duration: then the ends stand for the arrivals, on a
clock of whole seconds, and a note says so.

**Envoy**'s default format (and JSON with ``start_time`` and ``response_code``) begins with the request's start, in
milliseconds. The AI Gateway's JSON also has ``gen_ai.usage.input_tokens`` and ``output_tokens`` (cached tokens inside),
``gen_ai.response.model`` and ``session.id``; what is not known is ``-`` or left out.

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

Rows are sorted by arrival.

Source: documentation of nginx (ngx_http_log_module), ingress-nginx (log format), Envoy (access logging), Envoy AI
Gateway (access logs), Kong (AI Proxy, log serializer), Cloudflare (AI Gateway logs), Azure Monitor (tables
ApiManagementGatewayLlmLog, AzureDiagnostics), Caddy (log), Traefik (access logs).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, Rows, TraceRecord
from harness.trace.formats.values import (
    DECODE_ERRORS,
    Copies,
    IsoClock,
    called,
    decode_object,
    epoch_ns,
    fields_of,
    rows_of,
    show,
    token_count,
    wall_clock_ns,
)

_MODEL_PATH = re.compile(r"/(completions|messages|responses|generate|generate_stream|chat)$")
_COMBINED = re.compile(
    rb"\S+ \S+ .{0,200}?\[(\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "
    rb'"([^"]*)" (\d{3}) \S+(?: "(?:[^"\\]|\\.)*")*(.*)',
    re.DOTALL,
)
_NAMED_TIME = re.compile(rb'(?:^|[\s"])(?:rt|request_time)[=:]"?(\d+\.\d+)')
_INGRESS = re.compile(rb" \d+ (\d+\.\d{3}) \[")
_ENVOY = re.compile(rb'\[([\dTZ:.+-]+)\] "([^"]*)" (\d{1,3}) \S+ .*', re.DOTALL)
# Envoy Gateway's default calls it x-envoy-origin-path.
_ENVOY_PATHS = ("path", "x-envoy-original-path", "x_envoy_original_path", "x-envoy-origin-path", ":path")
_INPUT, _OUTPUT = "gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"
_CACHED = "gen_ai.usage.cached_input_tokens"
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Nginx(Reader):
    """Reader of nginx access logs."""

    summary = "nginx access log (combined, ingress-nginx or JSON): arrivals only"
    clock = "end of the request (msec, time_iso8601 or time_local) less $request_time in seconds"
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("time_iso8601")
        self._ends = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A line of the combined format, or an object with nginx's names."""
        if record.startswith(b"{"):
            names = fields_of(record).keys()
            return "request_time" in names and bool(names & {"status", "request", "request_uri", "uri"})
        return _COMBINED.match(record[:20_000]) is not None

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        if record.startswith(b"{"):
            end_ns, duration, request, status = self._json(decode_object(record))
        else:
            match = _COMBINED.match(record)
            if match is None:
                raise RowError("bad line", f"not a line of the combined format: {show(record)}")
            end_ns, rest = _local_ns(match[1].decode()), match[4]
            found = _INGRESS.match(rest) or _NAMED_TIME.search(rest)
            duration = found[1].decode() if found else None
            request, status = match[2].decode("utf-8", "replace"), match[3].decode()
        check_call(request, status)
        if duration is None:
            self._ends += 1
        return TraceRecord(end_ns - _duration_ns(duration), None, None)

    def notes(self) -> list[str]:
        """When ends stand for arrivals."""
        if not self._ends:
            return []
        return [
            f"{self._ends} rows are placed at the END of their request: the log has no $request_time. Log it "
            "(log_format ... rt=$request_time) to get arrivals; long answers blur these"
        ]

    def _json(self, value: dict[str, Any]) -> tuple[int, str | None, str, str]:
        request = value.get("request")
        if not isinstance(request, str):
            method = value.get("request_method") or value.get("method")
            path = value.get("request_uri") or value.get("uri") or value.get("path")
            request = f"{method} {path}"
        duration = value.get("request_time")
        return self._json_end(value), None if duration is None else str(duration), request, str(value.get("status"))

    def _json_end(self, value: dict[str, Any]) -> int:
        if (msec := value.get("msec")) is not None:
            return epoch_ns("msec", _number(msec))
        for name in ("time_iso8601", "@timestamp", "timestamp", "time"):
            if isinstance(text := value.get(name), str):
                return self._clock.ns(text)
        if isinstance(text := value.get("time_local"), str):
            return _local_ns(text)
        raise RowError("no time", "no msec, time_iso8601 or time_local")


class Envoy(Reader):
    """Reader of Envoy access logs."""

    summary = "Envoy access log (default format or JSON): arrivals; of the AI Gateway also token counts"
    clock = "START_TIME, the start of the request: a date and time with its zone"
    in_order = False

    def __init__(self) -> None:
        self._clock = IsoClock("START_TIME")

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A line of the default format, or an object with Envoy's names."""
        if record.startswith(b"{"):
            return {"start_time", "response_code"} <= fields_of(record).keys()
        return _ENVOY.match(record[:20_000]) is not None

    def parse(self, record: bytes) -> TraceRecord:
        """Read one line."""
        value: dict[str, Any] = {}
        if record.startswith(b"{"):
            value = decode_object(record)
            path = next((value[name] for name in _ENVOY_PATHS if value.get(name)), None)
            start, request = str(value.get("start_time")), f"{value.get('method')} {path}"
            status = str(value.get("response_code"))
        else:
            match = _ENVOY.match(record)
            if match is None:
                raise RowError("bad line", f"not a line of Envoy's default format: {show(record)}")
            start, request, status = (match[i].decode("utf-8", "replace") for i in (1, 2, 3))
        arrival_ns = self._clock.ns(start)
        check_call(request, status)
        known = {name: field for name, field in value.items() if field not in (None, "", "-")}
        input_tokens = token_count(_INPUT, known.get(_INPUT))
        output_tokens = token_count(_OUTPUT, known.get(_OUTPUT))
        called(input_tokens, output_tokens)
        return TraceRecord(
            arrival_ns, input_tokens, output_tokens, _text(known, "session.id"),
            model=_text(known, "gen_ai.response.model") or _text(known, "gen_ai.request.model"),
            cached_tokens=token_count(_CACHED, known.get(_CACHED)),
        )  # fmt: skip


def _text(value: dict[str, Any], name: str) -> str | None:
    return value[name] if isinstance(value.get(name), str) else None


def check_call(request: str, status: str) -> None:
    """Raises `LeftOutError` unless this was a successful call of a model API."""
    method, _, rest = request.partition(" ")
    path = rest.split(" ")[0].split("?")[0].rstrip("/")
    if method != "POST" or not _MODEL_PATH.search(path):
        raise LeftOutError("not a call of a text completion API")
    if not re.fullmatch(r"\d{3}", status, re.ASCII):
        raise RowError("bad status", f"status is {show(status)}")
    if int(status) == 499:
        raise LeftOutError("cancelled by the client (HTTP 499)")
    if int(status) >= 400 or int(status) < 200:
        raise FailedCallError(f"failed call (HTTP {int(status)})")


def _local_ns(text: str) -> int:
    """Nanoseconds since 1970 of ``10/Oct/2000:13:55:36 -0700``, whatever the locale."""
    match = re.fullmatch(r"(\d\d)/(\w{3})/(\d{4}):(\d\d:\d\d:\d\d) ([+-]\d{4})", text, re.ASCII)
    if match is not None and match[2] in _MONTHS:
        try:
            stamp = f"{match[3]}-{_MONTHS.index(match[2]) + 1:02}-{match[1]} {match[4]} {match[5]}"
            return int(datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S %z").timestamp()) * 1_000_000_000
        except ValueError:
            pass
    raise RowError("bad time_local", f"time_local is {show(text)}, expected 10/Oct/2000:13:55:36 -0700")


def _duration_ns(text: str | None) -> int:
    if text is None:
        return 0
    value = _number(text)
    if not 0 <= value < 1e6:
        raise RowError("bad request_time", f"request_time is {show(text)}, expected seconds")
    return round(value * 1e9)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RowError("bad number", f"{show(str(value))} is no number") from None


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
            return TraceRecord(time_ns - round(_named_number("durationMs", value.get("durationMs")) * 1e6), None, None)
        if _named_number("SequenceNumber", facts.get("SequenceNumber", 0)) != 0:
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
        duration_ns = round(_named_number("duration", value.get("duration")) * 1e9)
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


def _named_number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1e9:
        raise RowError(f"bad {name}", f"{name} is {show(str(value))}, expected a number")
    return number
