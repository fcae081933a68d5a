"""Logs of engines (vLLM, SGLang), a router before them (NVIDIA Dynamo) and a cloud (AWS Bedrock), with token counts.

**vLLM**'s server log (``--enable-log-requests``): ``Received request`` is the arrival (``MM-DD hh:mm:ss``);
``details`` at DEBUG level have ``prompt_token_ids``, the input and its blocks of 16 as vLLM caches them (up to 0.10 in
the INFO line, of chats the rendered ``prompt`` alone), and ``output_token_ids`` (``--enable-log-outputs``; of streams
with their deltas); ``Generated response`` is the end, and with ``finish_reason: abort`` or ``error`` a failed call.
Without lengths it is read like an access log. Source: vLLM 0.32, ``request_logger.py``; logs of 0.3 to 0.11.

**SGLang**'s: ``ReqTimeStats(...)`` states each request when it has ended; its arrival is ``entry_time`` since 1970, or
where that is of another clock the time of the line less its durations. With disaggregation ``type=prefill`` has the
input and ``type=decode`` the output of one request, joined by ``bootstrap_room``. Every tensor-parallel rank may print
the line, and health checks are none. Source: sgl-project/sglang, ``req_time_stats.py``, ``tokenizer_manager.py``.

**Bedrock**: tokens read from a prompt cache and written to it stand **beside** the input and are added. Prompts are not
sent: bodies are of each model's own form and often lie elsewhere. Source: AWS, "Monitor model invocation".

**Dynamo** (``DYN_REQUEST_TRACE=1``): one hash for each ``trace_block_size`` tokens, of its block and everything before
it, 64 bits without a sign, of which 63 are kept. Source: ai-dynamo/dynamo, ``dynamo.request.trace.v1``.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from harness.trace.formats.gateways import ObjectReader
from harness.trace.formats.record import (
    FailedCallError,
    Item,
    LeftOutError,
    Object,
    Reader,
    RowError,
    Rows,
    TraceRecord,
    fields_of,
    find,
    object_of,
    show,
    text_of,
)
from harness.trace.formats.values import (
    count_of,
    is_epoch,
    iso_ns,
    ns_of,
    number_of,
)

BLOCK_TOKENS = 16
_NO_OUTPUT = "rows have no output length: log with --enable-log-outputs at DEBUG level"
_WAITING = 10_000
"""Requests that may be open at one time; older ones are given without their end."""

_LINE = re.compile(
    rb"(?:\x1b\[[\d;]*m|[^\[\]\n]){0,120}?\b(?:INFO|DEBUG|WARNING|ERROR)(?:\x1b\[[\d;]*m)? "
    rb"(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d) (?:\x1b\[[\d;]*m)?\[?[^\[\]\s]+\](?:\x1b\[[\d;]*m)? (.*)",
    re.DOTALL,
)
_RECEIVED = re.compile(rb"Received request (\S+): (.*)", re.DOTALL)
_DETAILS = re.compile(rb"Request (\S+) details: (.*)", re.DOTALL)
_GENERATED = re.compile(rb"Generated response (\S+?)( \(streaming (?:delta|complete)\))?( details)?: (.*)", re.DOTALL)
_PROMPT_TEXT = re.compile(rb"prompt: ('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"), ", re.DOTALL)
_PROMPT_IDS = re.compile(rb"prompt_token_ids: (None|\[[\d, ]*\])")
_OUTPUT_IDS = re.compile(rb"output_token_ids: (None|[\[(][\d, ]*[\])])")


@dataclass(slots=True)
class _Open:
    arrival_ns: int | None = None
    prompt_ids: list[int] | None = None
    text: str | None = None
    deltas: int = 0
    output_tokens: int | None = None
    failed: str | None = None


class VllmLog(Reader):
    summary = "vLLM server log with --enable-log-requests (lengths: VLLM_LOGGING_LEVEL=DEBUG, --enable-log-outputs)"
    clock = "MM-DD hh:mm:ss before each line: whole seconds without a year"
    in_order = False
    log = True

    def __init__(self) -> None:
        self._open: dict[bytes, _Open] = {}
        self._year = 2000  # a leap year: the log has none
        self._month = 0
        self._lengths: Counter[int] = Counter()

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        line = _LINE.match(record[:100_000])
        return line is not None and (_RECEIVED.match(line[6]) or _DETAILS.match(line[6])) is not None

    def parse(self, record: bytes) -> Rows:
        line = _LINE.match(record)
        if line is None:
            return ()
        if match := _RECEIVED.match(line[6]):
            request = self._open.setdefault(match[1], _Open())
            request.arrival_ns = self._arrival_ns(line)
            self._prompt(request, match[2])
        elif match := _DETAILS.match(line[6]):
            self._prompt(self._open.setdefault(match[1], _Open()), match[2])
        elif match := _GENERATED.match(line[6]):
            return self._generated(match)
        return [self._row(next(iter(self._open)))] if len(self._open) > _WAITING else ()

    def end(self) -> Iterator[tuple[None, Item]]:
        return ((None, self._row(id_)) for id_ in list(self._open))

    def blocks(self) -> str | None:
        return f"{BLOCK_TOKENS} tokens, made here from the logged token ids" if self._lengths else None

    def notes(self) -> list[str]:
        notes = [
            "the log's clock has whole seconds and no year; time differences are exact unless 29 February is crossed",
            *super().notes(),
        ]
        length, count = max(self._lengths.items(), default=(0, 0))
        if count > 2 and count > 0.02 * self._lengths.total():
            notes.append(f"{count} prompts have {length} tokens, the most of all: is the log cut by --max-log-len?")
        return notes

    def _prompt(self, request: _Open, text: bytes) -> None:
        ids = _listed(_PROMPT_IDS, text)
        if ids is not None:
            if any(not i.isdigit() or len(i) > 10 for i in ids):
                raise RowError("bad prompt_token_ids", f"prompt_token_ids are no token ids: {show(b','.join(ids))}")
            request.prompt_ids = [int(i) for i in ids]
        elif literal := _PROMPT_TEXT.match(text):
            try:
                request.text = ast.literal_eval(literal[1].decode())
            except (ValueError, SyntaxError, UnicodeDecodeError):
                raise RowError("bad prompt", f"the prompt is no Python text: {show(literal[1])}") from None

    def _generated(self, match: re.Match[bytes]) -> Rows:
        request = self._open.get(match[1])
        if request is None:
            return ()  # asked before the log begins
        ids = _listed(_OUTPUT_IDS, match[4])
        if match[2] == b" (streaming delta)":
            request.deltas += len(ids or ())
            return ()
        if ids is not None:
            request.output_tokens = len(ids)
        if match[3]:
            return ()  # the INFO line follows
        if reason := re.search(rb"finish_reason: (abort|error)\s*$", match[4]):
            request.failed = reason[1].decode()
        return [self._row(match[1])]

    def _row(self, id_: bytes) -> TraceRecord | RowError | FailedCallError:
        request = self._open.pop(id_)
        if request.arrival_ns is None:
            return RowError("no arrival", f"request {show(id_)} has details, but no 'Received'")
        if request.failed:
            return FailedCallError(f"failed call (finish_reason {request.failed})")
        ids = request.prompt_ids
        output_tokens = request.output_tokens if request.output_tokens is not None else request.deltas or None
        if ids is None:
            self.noted[_NO_OUTPUT] += request.text is not None and output_tokens is None
            return TraceRecord(request.arrival_ns, None, output_tokens, text=request.text or None)
        self._lengths[len(ids)] += 1
        self.noted[_NO_OUTPUT] += output_tokens is None
        return TraceRecord(
            request.arrival_ns, len(ids), output_tokens, prefix_ids=_hashes(ids), block_tokens=BLOCK_TOKENS
        )

    def _arrival_ns(self, line: re.Match[bytes]) -> int:
        month = int(line[1])
        if month < self._month - 6:
            self._year += 1  # December to January
        self._month = month
        return iso_ns("time", f"{self._year}-%s-%s %s:%s:%s" % tuple(text.decode() for text in line.groups()[:5]))


def _listed(pattern: re.Pattern[bytes], text: bytes) -> list[bytes] | None:
    """The last list of ids: a prompt may itself say ``prompt_token_ids: [...]``."""
    found = pattern.findall(text)
    return [i.strip() for i in found[-1][1:-1].split(b",") if i.strip()] if found and found[-1] != b"None" else None


def _hashes(ids: Sequence[int]) -> tuple[int, ...]:
    """One chained 63-bit hash per block of token ids: equal leading hashes are equal leading tokens."""
    chain = hashlib.blake2b(digest_size=8)
    hashes = []
    for at in range(0, len(ids), BLOCK_TOKENS):
        chain.update(b"".join(i.to_bytes(8, "little", signed=True) for i in ids[at : at + BLOCK_TOKENS]))
        hashes.append(int.from_bytes(chain.digest(), "little") >> 1)
    return tuple(hashes)


_SGLANG_LINE = re.compile(rb"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]{0,40}\] (.*)", re.DOTALL)
_STATS = re.compile(rb"Req ?Time ?Stats\(([^)]*)\):?(.*)", re.DOTALL)
_FINISH = re.compile(rb"Finish: obj=\w+\(.*?(rid)='?([\w-]+)'?.*'meta_info': \{(.*)", re.DOTALL)
_PAIR = re.compile(rb"(\w+)=([\w.+-]+)")
_META = re.compile(rb"'(prompt_tokens|completion_tokens|cached_tokens|e2e_latency)': ([\d.]+)")
_SPENT = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")


class SGLang(ObjectReader):
    summary = "SGLang server log (ReqTimeStats of --enable-request-time-stats-logging, or Finish of --log-requests)"
    clock = "entry_time in seconds since 1970, else the time of the line less the request's duration"
    log = True
    counted = True
    id = ("rid",)
    input, output = ("input_len", "prompt_tokens"), ("output_len", "completion_tokens")
    cached = ("cached_input_len", "cached_tokens")

    def __init__(self) -> None:
        super().__init__()
        self._prefills: dict[object, TraceRecord] = {}

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        line = _SGLANG_LINE.match(record[:100_000])
        return line is not None and (_STATS.search(line[2]) or _FINISH.match(line[2])) is not None

    def objects(self, record: bytes) -> Iterable[object]:
        line = _SGLANG_LINE.match(record)
        if line is None:
            return ()
        if stats := _STATS.search(line[2]):
            pairs = [*_PAIR.findall(stats[2]), *_PAIR.findall(stats[1])]
        elif finish := _FINISH.match(line[2]):
            pairs = [finish.groups()[:2], *_META.findall(finish[3])]
        else:
            return ()
        fields = {name.decode(): text.decode() for name, text in pairs} | {"written": line[1].decode()}
        return () if fields.get("rid", "").startswith("HEALTH_CHECK") else [fields]

    def row(self, value: Object) -> TraceRecord | None:
        kind, room = value.get("type"), value.get("bootstrap_room") or value.get("rid")
        row = super().row({**value, "rid": f"{value.get('rid')} {kind}"})
        if row is not None and kind == "prefill":
            self._prefills[room] = row
            if len(self._prefills) > _WAITING:
                del self._prefills[next(iter(self._prefills))]
            return None
        if row is not None and kind == "decode" and (first := self._prefills.pop(room, None)) is not None:
            row = first._replace(output_tokens=row.output_tokens)
        return row

    def arrival_ns(self, value: Object) -> int:
        entry = number_of(value.get("entry_time"))
        if entry is not None and is_epoch(entry, "s"):
            return ns_of("entry_time", value["entry_time"], "s")
        spent = [_SPENT.fullmatch(str(text)) for name, text in value.items() if name.endswith("_duration")]
        spent_ns = sum(ns_of("duration", each[1], "ms" if each[2] == "ms" else "s") for each in spent if each)
        return iso_ns("time", str(value["written"])) - spent_ns - ns_of("e2e_latency", value.get("e2e_latency", 0), "s")

    def end(self) -> list[tuple[None, LeftOutError]]:
        return [(None, LeftOutError("a prefill without its decode line"))] * len(self._prefills)


class Bedrock(ObjectReader):
    summary = "AWS Bedrock model invocation log (JSON of S3 or CloudWatch: ModelInvocationLog)"
    clock = "timestamp, a date and time in whole seconds, UTC"
    page, id, arrival, model = ("events", "logEvents"), ("requestId",), ("timestamp",), ("modelId",)
    input, output = ("input.inputTokenCount",), ("output.outputTokenCount",)
    cached = ("input.cacheReadInputTokenCount",)
    added = ("input.cacheReadInputTokenCount", "input.cacheWriteInputTokenCount")
    counted = True

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        inner = fields.get("message", fields.get("events", b"") or fields.get("logEvents", b""))
        return fields.get("schemaType") == b'"ModelInvocationLog"' or b"ModelInvocationLog" in inner

    def row(self, value: Object) -> TraceRecord | None:
        return super().row(object_of(value, "message") or value)

    def leave_out(self, value: Object) -> None:
        if value.get("errorCode"):
            raise FailedCallError("failed call (errorCode)")
        if find(value, *self.output) is None:  # of embeddings and images, too
            raise LeftOutError("no text completion (no outputTokenCount)")


class Dynamo(ObjectReader):
    summary = "NVIDIA Dynamo request trace (JSON Lines: dynamo.request.trace.v1, request_end)"
    clock = "request.request_received_ms, milliseconds"
    id = ("request_id",)
    input, output, cached = ("input_tokens", "replay.input_length"), ("output_tokens",), ("cached_tokens",)
    counted = True

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        fields = fields_of(record)
        fields = fields_of(fields["event"]) if "event" in fields else fields
        return fields.get("schema", b"").startswith(b'"dynamo.request.trace.')

    def arrival_ns(self, value: Object) -> int:
        return ns_of("request_received_ms", value.get("request_received_ms"), "ms")

    def leave_out(self, value: Object) -> None:
        if find(value, "output_tokens") is None:
            raise FailedCallError("failed call (no output tokens)")

    def row(self, value: Object) -> TraceRecord | None:
        event = object_of(value, "event") or value
        request: Any = event.get("request")
        if event.get("event_type") != "request_end" or not isinstance(request, dict):
            return None
        found = super().row(request)
        if found is None:
            return None
        found = found._replace(session_id=text_of(event, "agent_context.session_id"))
        hashes, size = find(request, "replay.input_sequence_hashes"), count_of(request, "replay.trace_block_size")
        length = count_of(request, "replay.input_length")
        if not hashes or not size or not length:
            return found
        if not isinstance(hashes, list) or not all(type(h) is int and 0 <= h < 2**64 for h in hashes):
            raise RowError("bad input_sequence_hashes", "input_sequence_hashes: expected unsigned 64-bit numbers")
        if self._blocks.size not in (0, size):
            raise RowError("block sizes differ", f"trace_block_size is {size}, {self._blocks.size} in an earlier row")
        self._blocks.size = size
        self._blocks.check("input_sequence_hashes", len(hashes), length)
        return found._replace(prefix_ids=tuple(h & (2**63 - 1) for h in hashes), block_tokens=size)
