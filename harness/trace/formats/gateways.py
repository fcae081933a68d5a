r"""Logs of what stands before models: when requests arrived, and where they say so how long they were.

Most are JSON objects, described by the fields in which each role is found (`ObjectReader`). Successful POSTs to a text
completion API (``/v1/chat/completions``, ``/v1/messages``, ...) are kept; other requests and failures are counted.
Where the log has no lengths, they must be stated (``harness trace convert --input-tokens ... --output-tokens ...``).

**nginx** writes a line when a request *ends*, so the arrival is the end less ``$request_time``. Read are JSON logs,
ingress-nginx's own format, and the combined format, with ``rt=`` or ``request_time=`` after it. Plain combined has no
duration: then the ends stand for the arrivals, on a clock of whole seconds, and a note says so.

**Azure API Management** has the counts on the row of a call whose ``SequenceNumber`` is 0; its other rows are the
prompt and the answer. Of Azure OpenAI's diagnostics ``RequestResponse`` has no counts.

**LiteLLM** (spend logs as JSON, pages of the API, CSV of a database; ``StandardLoggingPayload`` of callbacks):
``prompt_tokens`` contain what was read from a prompt cache. What its own response cache answered is left out.

Source: documentation of nginx (ngx_http_log_module), ingress-nginx (log format), Envoy (access logging), Envoy AI
Gateway, Kong (AI Proxy, log serializer), Cloudflare (AI Gateway logs), Azure Monitor (ApiManagementGatewayLlmLog,
AzureDiagnostics), Caddy (log), Traefik (access logs); BerriAI/litellm 1.109 (``schema.prisma``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

from harness.trace.formats.record import (
    FailedCallError,
    LeftOutError,
    Object,
    Reader,
    RowError,
    Rows,
    TimeUnit,
    TraceRecord,
    as_object,
    attempt,
    decode_object,
    decoded,
    fields_of,
    find,
    object_of,
    show,
    text_of,
)  # fmt: skip
from harness.trace.formats.values import (
    Blocks,
    Columns,
    Copies,
    count_of,
    header_of,
    ns_of,
    plain_messages,
    usage_of,
    wall_clock_ns,
)  # fmt: skip

Names = tuple[str, ...]
"""Fields of which the first that is given counts; see `harness.trace.formats.record.find`."""

_MODEL_PATH = re.compile(r"/(completions|messages|responses|generate|generate_stream|chat)$")


class ObjectReader(Reader):
    """A format of objects, one a call, described by the fields in which each role is found."""

    in_order = False
    page: ClassVar[Names] = ()
    id: ClassVar[Names] = ()
    arrival: ClassVar[Names]
    """A date and time, or a number since 1970."""
    took: ClassVar[tuple[str, TimeUnit] | None] = None
    """The arrival is the end of the call, and this long after its start."""
    method: ClassVar[Names] = ()
    path: ClassVar[Names] = ()
    status: ClassVar[Names] = ()
    """Of HTTP: only successful calls of a model API count. Empty: the log has no others."""
    input: ClassVar[Names] = ()
    output: ClassVar[Names] = ()
    cached: ClassVar[Names] = ()
    added: ClassVar[Names] = ()
    """Tokens that the input does not hold, but the prompt did."""
    counted: ClassVar[bool] = False
    session: ClassVar[Names] = ()
    model: ClassVar[Names] = ()

    def __init__(self) -> None:
        self._copies = Copies(self.id[0] if self.id else "")
        self._blocks = Blocks()

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        pages = [page for name in cls.page if (page := fields.get(name, b"")).startswith(b"[")]
        return super().sniff(record) or any(
            all(f'"{name}"'.encode() in page for name in names) for page in pages for names in cls.telling
        )

    def parse(self, record: bytes) -> Rows:
        found = (attempt(lambda each: self.row(as_object(each)), each) for each in self.objects(record))
        return [item for item in found if item is not None]

    def objects(self, record: bytes) -> Iterable[object]:
        """The calls in a record. Raises `RowError`."""
        value = decode_object(record)
        page = find(value, *self.page)
        return page if isinstance(page, list) else [value]

    def row(self, value: Object) -> TraceRecord | None:
        """What an object says; None when it is about something else. Raises `RowError` and `LeftOutError`."""
        self._copies.check(find(value, *self.id))
        arrival_ns = self.arrival_ns(value)
        self.leave_out(value)
        into, out, cached = (count_of(value, *names) for names in (self.input, self.output, self.cached))
        if into is not None:
            into += sum(count_of(value, name) or 0 for name in self.added)
        if self.counted and (into is None or out is None):
            raise RowError("no token counts", f"{' or '.join((*self.input, *self.output))} is empty")
        session, model = text_of(value, *self.session), text_of(value, *self.model)
        return TraceRecord(arrival_ns, into, out, session, model=model, cached_tokens=cached)

    def leave_out(self, value: Object) -> None:
        """Raises `LeftOutError` for what is not to be replayed."""
        if self.status:
            request = find(value, "request")
            if not isinstance(request, str):
                request = f"{find(value, *self.method)} {find(value, *self.path)}"
            check_call(request, str(find(value, *self.status)))

    def arrival_ns(self, value: Object) -> int:
        """When the call arrived. Raises `RowError`."""
        name = next((name for name in self.arrival if find(value, name) is not None), None)
        if name is None:
            raise RowError("no time", f"no {' or '.join(self.arrival)}")
        took = None if self.took is None else find(value, self.took[0])
        took_ns = 0 if self.took is None or took is None else ns_of(self.took[0], took, self.took[1])
        return wall_clock_ns(name, find(value, name)) - took_ns

    def blocks(self) -> str | None:
        return self._blocks.said()


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


# --- access logs -----------------------------------------------------------------------------------------------------

_COMBINED = re.compile(
    rb"\S+ \S+ .{0,200}?\[(?P<time_local>\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4})\] "
    rb'"(?P<request>[^"]*)" (?P<status>\d{3}) \S+(?: "(?:[^"\\]|\\.)*")*(?P<rest>.*)',
    re.DOTALL,
)
_DURATION = re.compile(rb'^ \d+ (\d+\.\d{3}) \[|(?:^|[\s"])(?:rt|request_time)[=:]"?(\d+\.\d+)')
_ENVOY = re.compile(
    rb'\[(?P<start_time>[\dTZ:.+-]+)\] "(?P<request>[^"]*)" (?P<response_code>\d{1,3}) \S+ .*', re.DOTALL
)


class _LineReader(ObjectReader):
    """An access log of lines, or of JSON objects with the same names."""

    line: ClassVar[re.Pattern[bytes]]

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        return super().sniff(record) if record.startswith(b"{") else cls.line.match(record[:20_000]) is not None

    def objects(self, record: bytes) -> Iterable[object]:
        if record.startswith(b"{"):
            return super().objects(record)
        match = self.line.match(record)
        if match is None:
            raise RowError("bad line", f"not a line of this access log: {show(record)}")
        fields = {name: text.decode("utf-8", "replace") for name, text in match.groupdict().items()}
        if "rest" in fields and (found := _DURATION.search(match["rest"])):
            fields["request_time"] = (found[1] or found[2]).decode()
        return [fields]


_ENDS = (
    "rows are placed at the END of their request: to get arrivals log $request_time (log_format ... rt=$request_time)"
)


class Nginx(_LineReader):
    summary = "nginx access log (combined, ingress-nginx or JSON): arrivals only"
    clock = "end of the request (msec, time_iso8601 or time_local) less $request_time in seconds"
    telling = tuple(frozenset({"request_time", name}) for name in ("status", "request", "request_uri", "uri"))
    line = _COMBINED
    arrival = ("msec", "time_iso8601", "@timestamp", "timestamp", "time", "time_local")
    took = ("request_time", "s")
    method, path, status = ("request_method", "method"), ("request_uri", "uri", "path"), ("status",)

    def row(self, value: Object) -> TraceRecord | None:
        found = super().row(value)
        self.noted[_ENDS] += find(value, "request_time") is None
        return found


class Envoy(_LineReader):
    summary = "Envoy access log (default format or JSON): arrivals; of the AI Gateway also token counts"
    clock = "START_TIME, the start of the request: a date and time with its zone"
    telling = (frozenset({"start_time", "response_code"}),)
    line = _ENVOY
    arrival = ("start_time",)
    method, status = ("method",), ("response_code",)
    # Envoy Gateway's default calls it x-envoy-origin-path.
    path = ("path", "x-envoy-original-path", "x_envoy_original_path", "x-envoy-origin-path", ":path")
    input, output = ("gen_ai.usage.input_tokens",), ("gen_ai.usage.output_tokens",)
    cached = ("gen_ai.usage.cached_input_tokens",)  # inside the input
    session, model = ("session.id",), ("gen_ai.response.model", "gen_ai.request.model")


class Kong(ObjectReader):
    summary = "Kong log (JSON Lines: started_at, latencies; ai usage where its AI proxy counts)"
    clock = "started_at, milliseconds since 1970"
    telling = (frozenset({"started_at", "latencies", "request", "response"}),)
    arrival = ("started_at",)
    method, path, status = ("request.method",), ("request.uri", "request.url"), ("response.status",)
    input, output = ("ai.*.usage.prompt_tokens",), ("ai.*.usage.completion_tokens",)
    model = ("ai.*.meta.response_model", "ai.*.meta.request_model")


class Caddy(ObjectReader):
    summary = "Caddy access log (JSON Lines: ts, duration, request): arrivals only"
    clock = "ts, the end of the request in seconds since 1970, less duration in seconds"
    telling = (frozenset({"ts", "duration", "request", "status"}),)
    arrival, took = ("ts",), ("duration", "s")
    method, path, status = ("request.method",), ("request.uri",), ("status",)


class Traefik(ObjectReader):
    summary = "Traefik access log (JSON Lines: StartUTC, RequestPath, DownstreamStatus): arrivals only"
    clock = "StartUTC, the start of the request"
    telling = (frozenset({"StartUTC", "RequestPath", "DownstreamStatus"}),)
    arrival = ("StartUTC",)
    method, path, status = ("RequestMethod",), ("RequestPath",), ("DownstreamStatus",)


class Cloudflare(ObjectReader):
    summary = "Cloudflare AI Gateway log (JSON page or lines: created_at, tokens_in, tokens_out)"
    clock = "created_at, a date and time"
    telling = (frozenset({"created_at", "tokens_in", "tokens_out"}),)
    page, id, arrival = ("result",), ("id",), ("created_at",)
    input, output, model = ("tokens_in",), ("tokens_out",), ("model",)

    def leave_out(self, value: Object) -> None:
        if value.get("cached") in (True, 1):
            raise LeftOutError("answered from the gateway's cache")
        if value.get("success") in (False, 0):
            raise FailedCallError("failed call (success false)")


class AzureGateway(ObjectReader):
    summary = "Azure API Management or Azure OpenAI diagnostic log (JSON: GatewayLlmLog, RequestResponse)"
    clock = "time or TimeGenerated; of RequestResponse less durationMs"
    page, arrival = ("records",), ("TimeGenerated", "time")
    input, output, model = ("PromptTokens",), ("CompletionTokens",), ("ModelName",)

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        page = fields.get("records", b"")
        if page.startswith(b"["):
            return b"PromptTokens" in page or b'"RequestResponse"' in page
        return (
            {"CorrelationId", "SequenceNumber"} <= fields.keys()
            or b"PromptTokens" in fields.get("properties", b"")
            or fields.get("category") == b'"RequestResponse"'
        )

    def row(self, value: Object) -> TraceRecord | None:
        value = {**value, **object_of(value, "properties")}
        if value.get("category") == "RequestResponse":
            if "Completions" not in str(value.get("operationName")):
                raise LeftOutError("not a call of a text completion API")
            check_call("POST /completions", str(value.get("resultSignature")))
            took_ns = ns_of("durationMs", value.get("durationMs"), "ms")
            return TraceRecord(self.arrival_ns(value) - took_ns, None, None)
        return None if count_of(value, "SequenceNumber") else super().row(value)


_TEXT_CALLS = ("completion", "text_completion", "responses", "anthropic_messages", "generate_content")


class LiteLLM(ObjectReader):
    summary = "LiteLLM spend logs (JSON, JSON Lines or CSV: startTime, prompt_tokens, completion_tokens, call_type)"
    clock = "startTime, a date and time, UTC where no zone is given"
    telling = (frozenset({"startTime", "prompt_tokens", "completion_tokens"}),)
    quoted = True
    counted = True
    page, id, arrival = ("data",), ("request_id", "id"), ("startTime",)
    input, output, session, model = ("prompt_tokens",), ("completion_tokens",), ("session_id",), ("model",)

    def __init__(self) -> None:
        super().__init__()
        self._columns = Columns()

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        return super().sniff(record) or cls.telling[0] <= set(header_of(record)[1])

    def objects(self, record: bytes) -> Iterable[object]:
        if record.lstrip().startswith(b"{"):
            return super().objects(record)
        row = self._columns.read(record)
        if row is None and not self.telling[0] <= set(self._columns.names):
            raise RowError("bad header", f"no columns {', '.join(sorted(self.telling[0]))} in {show(record)}")
        return () if row is None else [row]

    def row(self, value: Object) -> TraceRecord | None:
        found, total = super().row(value), count_of(value, "total_tokens")
        if found is None:
            return None
        counts = (found.input_tokens or 0, found.output_tokens or 0)
        if total not in (None, sum(counts)) and all(counts):
            problem = f"total_tokens is {total}, but prompt and completion have {counts[0]} + {counts[1]}"
            raise RowError("bad total_tokens", f"{problem}: what was counted is not clear")
        asked = object_of(value, "proxy_server_request")
        has_tools = asked.get("tools") or asked.get("functions")
        messages = None if has_tools else plain_messages(decoded(value.get("messages")))
        usage = usage_of(find(object_of(value, "metadata"), "usage_object"))
        return found._replace(messages=messages, cached_tokens=usage.cached_tokens)

    def leave_out(self, value: Object) -> None:
        kind = text_of(value, "call_type")
        if kind and not kind.removeprefix("a").startswith(_TEXT_CALLS) and not kind.startswith(_TEXT_CALLS):
            raise LeftOutError(f"not a text completion ({kind[:30]})")
        if str(value.get("status") or "").lower() in ("failure", "failed", "error"):
            raise FailedCallError("failed call (status failure)")
        if str(value.get("cache_hit") or "").lower() == "true":
            raise LeftOutError("answered from LiteLLM's response cache")
