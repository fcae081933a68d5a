"""Logs of inference engines: vLLM and SGLang.

vLLM server logs written with ``--enable-log-requests``: free text, read as far as it goes.

=========================================  ===========================================================================
``INFO  Received request ID: ...``         the arrival (``MM-DD hh:mm:ss``: whole seconds, no year)
``DEBUG Request ID details: ...``          ``prompt_token_ids``: input tokens, and their blocks of 16 as vLLM caches
                                           them (up to 0.10 in the INFO line, of chats the rendered ``prompt`` alone)
``DEBUG Generated response ID details``    ``output_token_ids``: output tokens (with ``--enable-log-outputs``; streaming
                                           answers: with their deltas)
``INFO  Generated response ID: ...``       the end; ``finish_reason: abort`` or ``error`` is a failed call
=========================================  ===========================================================================

Without ``VLLM_LOGGING_LEVEL=DEBUG`` the log has no lengths at all: then it is read like an access log, and refused
until lengths are stated. Without ``--enable-log-outputs`` output lengths are not known and left out. ``--max-log-len``
cuts the lists; ids that end at one same length on many rows are reported. Rows are sorted by arrival, as answers end
in another order.

Source: vLLM 0.32, ``vllm/entrypoints/serve/utils/request_logger.py`` and ``vllm/logger.py``; logs of 0.3 to 0.11.

SGLang server logs with ``--enable-request-time-stats-logging``, or with ``--log-requests``.

``ReqTimeStats(rid=..., input_len=..., cached_input_len=..., output_len=..., ...)`` states each request when it has
ended; its arrival is ``entry_time`` in seconds since 1970, or where that is of another clock (older versions) the time
of the line less its durations. With disaggregation ``type=prefill`` has the input and ``type=decode`` the output of one
request, joined by ``bootstrap_room``. Every tensor-parallel rank may print the line, and health checks are none.

``Finish: obj=GenerateReqInput(rid=...) ... 'meta_info': {...}`` states ``prompt_tokens``, ``completion_tokens``,
``cached_tokens`` and ``e2e_latency``; the arrival is the time of the line less the latter.

Times of lines are whole seconds, taken as UTC.

Source: sgl-project/sglang, ``req_time_stats.py`` and ``tokenizer_manager.py``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from harness.trace.formats.record import FailedCallError, Item, LeftOutError, Reader, RowError, Rows, TraceRecord
from harness.trace.formats.values import Copies, IsoClock, called, epoch_ns, prefix_hashes, show, token_count

BLOCK_TOKENS = 16
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
    """A request whose end has not been seen."""

    arrival_ns: int | None = None
    prompt_ids: list[int] | None = None
    text: str | None = None
    deltas: int = 0
    output_tokens: int | None = None
    failed: str | None = field(default=None)


class VllmLog(Reader):
    """Reader of vLLM server logs."""

    summary = "vLLM server log with --enable-log-requests (lengths: VLLM_LOGGING_LEVEL=DEBUG, --enable-log-outputs)"
    clock = "MM-DD hh:mm:ss before each line: whole seconds without a year"
    in_order = False
    log = True

    def __init__(self) -> None:
        self._open: dict[bytes, _Open] = {}
        self._year = 2000  # a leap year: the log has none
        self._month = 0
        self._no_output = 0
        self._lengths: Counter[int] = Counter()

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A request line."""
        line = _LINE.match(record[:100_000])
        return line is not None and (_RECEIVED.match(line[6]) or _DETAILS.match(line[6])) is not None

    def parse(self, record: bytes) -> Rows:
        """Read one line; the request comes out when its answer has ended."""
        line = _LINE.match(record)
        if line is None:
            return ()
        if match := _RECEIVED.match(line[6]):
            request = self._request(match[1])
            request.arrival_ns = self._arrival_ns(line)
            self._prompt(request, match[2])
        elif match := _DETAILS.match(line[6]):
            self._prompt(self._request(match[1]), match[2])
        elif match := _GENERATED.match(line[6]):
            return self._generated(match)
        return self._overflow()

    def end(self) -> Iterator[tuple[None, Item]]:
        """Requests without an end in the log."""
        return ((None, self._row(id_)) for id_ in list(self._open))

    def blocks(self) -> str | None:
        """16 tokens, made from the token ids."""
        return f"{BLOCK_TOKENS} tokens, made here from the logged token ids" if self._lengths else None

    def notes(self) -> list[str]:
        """What the log does not say."""
        notes = [
            "the log's clock has whole seconds and no year; time differences are exact unless 29 February is crossed"
        ]
        if self._no_output:
            notes.append(f"{self._no_output} rows have no output length: log with --enable-log-outputs at DEBUG level")
        length, count = max(self._lengths.items(), default=(0, 0))
        if count > 2 and count > 0.02 * self._lengths.total():
            notes.append(f"{count} prompts have {length} tokens, the most of all: is the log cut by --max-log-len?")
        return notes

    def _request(self, id_: bytes) -> _Open:
        return self._open.setdefault(id_, _Open())

    def _prompt(self, request: _Open, text: bytes) -> None:
        # The prompt itself may say "prompt_token_ids: [...]", so the last one counts.
        found = _PROMPT_IDS.findall(text)
        if found and found[-1] != b"None":
            numbers = [i.strip() for i in found[-1][1:-1].split(b",") if i.strip()]
            if any(not i.isdigit() or len(i) > 10 for i in numbers):
                raise RowError("bad prompt_token_ids", f"prompt_token_ids are no token ids: {show(found[-1])}")
            request.prompt_ids = [int(i) for i in numbers]
        elif literal := _PROMPT_TEXT.match(text):
            try:
                request.text = ast.literal_eval(literal[1].decode())
            except (ValueError, SyntaxError, UnicodeDecodeError):
                raise RowError("bad prompt", f"the prompt is no Python text: {show(literal[1])}") from None

    def _generated(self, match: re.Match[bytes]) -> Rows:
        request = self._open.get(match[1])
        if request is None:
            return ()  # asked before the log begins
        found = _OUTPUT_IDS.findall(match[4])
        count = len([i for i in found[-1][1:-1].split(b",") if i.strip()]) if found and found[-1] != b"None" else None
        if match[2] == b" (streaming delta)":
            request.deltas += count or 0
            return ()
        if count is not None:
            request.output_tokens = count
        if match[3]:
            return ()  # the INFO line follows
        if reason := re.search(rb"finish_reason: (abort|error)\s*$", match[4]):
            request.failed = reason[1].decode()
        return [self._row(match[1])]

    def _row(self, id_: bytes) -> TraceRecord | RowError | FailedCallError:
        request = self._open.pop(id_)
        if request.arrival_ns is None:
            return RowError(
                "no arrival", f"request {id_.decode('utf-8', 'replace')[:60]} has details, but no 'Received'"
            )
        if request.failed:
            return FailedCallError(f"failed call (finish_reason {request.failed})")
        ids = request.prompt_ids
        output_tokens = request.output_tokens if request.output_tokens is not None else request.deltas or None
        if ids is None:
            self._no_output += request.text is not None and output_tokens is None
            return TraceRecord(request.arrival_ns, None, output_tokens, text=request.text or None)
        try:
            called(len(ids), output_tokens)
        except FailedCallError as e:
            return e
        self._lengths[len(ids)] += 1
        self._no_output += output_tokens is None
        hashes = prefix_hashes(ids, BLOCK_TOKENS)
        return TraceRecord(request.arrival_ns, len(ids), output_tokens, prefix_ids=hashes, block_tokens=BLOCK_TOKENS)

    def _overflow(self) -> Rows:
        return [self._row(next(iter(self._open)))] if len(self._open) > _WAITING else ()

    def _arrival_ns(self, line: re.Match[bytes]) -> int:
        month, day, hour, minute, second = (int(line[i]) for i in range(1, 6))
        if month < self._month - 6:
            self._year += 1  # December to January
        self._month = month
        try:
            moment = datetime(self._year, month, day, hour, minute, second, tzinfo=UTC)
        except ValueError:
            raise RowError("bad time", f"not a time: {line[0][:60].decode('utf-8', 'replace')!r}") from None
        return int(moment.timestamp()) * 1_000_000_000


_SGLANG_LINE = re.compile(rb"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]{0,40}\] (.*)", re.DOTALL)
_STATS = re.compile(rb"Req ?Time ?Stats\(([^)]*)\):?(.*)", re.DOTALL)
_FINISH = re.compile(rb"Finish: obj=\w+\(.*?rid='?([\w-]+)'?.*'meta_info': \{(.*)", re.DOTALL)
_PAIR = re.compile(rb"(\w+)=([\w.+-]+)")
_META = re.compile(rb"'(prompt_tokens|completion_tokens|cached_tokens|e2e_latency)': ([\d.]+)")
_EPOCH_S = 978_307_200
"""Prefills of which the decoding may still come."""


class SGLang(Reader):
    """Reader of SGLang server logs."""

    summary = "SGLang server log (ReqTimeStats of --enable-request-time-stats-logging, or Finish of --log-requests)"
    clock = "entry_time in seconds since 1970, else the time of the line less the request's duration"
    in_order = False
    log = True

    def __init__(self) -> None:
        self._clock = IsoClock("time")
        self._copies = Copies("rid")
        self._prefills: dict[str, TraceRecord] = {}

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A line that states a request."""
        line = _SGLANG_LINE.match(record[:100_000])
        return line is not None and (_STATS.search(line[2]) or _FINISH.match(line[2])) is not None

    def parse(self, record: bytes) -> TraceRecord | tuple[()]:
        """Read one line; most are about something else."""
        if (line := _SGLANG_LINE.match(record)) is None:
            return ()
        written_ns = self._clock.ns(line[1].decode())
        if stats := _STATS.search(line[2]):
            return self._stats(written_ns, _pairs(stats[1]), _pairs(stats[2]))
        if finish := _FINISH.match(line[2]):
            self._copies.check(finish[1].decode())
            return _row(
                written_ns, {name.decode(): value.decode() for name, value in _META.findall(finish[2])},
                ("prompt_tokens", "completion_tokens", "cached_tokens"), "e2e_latency",
            )  # fmt: skip
        return ()

    def end(self) -> list[tuple[None, LeftOutError]]:
        """Prefills without their decoding."""
        return [(None, LeftOutError("a prefill without its decode line"))] * len(self._prefills)

    def _stats(self, written_ns: int, request: dict[str, str], times: dict[str, str]) -> TraceRecord | tuple[()]:
        rid, kind = request.get("rid", ""), request.get("type", "unified")
        if rid.startswith("HEALTH_CHECK"):
            return ()
        self._copies.check(f"{rid} {kind}")
        spent_ns = sum(round(_duration_s(text) * 1e9) for name, text in times.items() if name.endswith("_duration"))
        arrival_ns = written_ns - spent_ns
        entry = times.get("entry_time", request.get("entry_time", ""))
        if re.fullmatch(r"\d+(\.\d+)?", entry) and float(entry) > _EPOCH_S:
            arrival_ns = epoch_ns("entry_time", entry)
        row = _row(arrival_ns, request, ("input_len", "output_len", "cached_input_len"))
        room = request.get("bootstrap_room") or rid
        if kind == "prefill":
            self._prefills[room] = row
            if len(self._prefills) > _WAITING:
                del self._prefills[next(iter(self._prefills))]
            return ()
        if kind == "decode" and (first := self._prefills.pop(room, None)) is not None:
            row = first._replace(output_tokens=row.output_tokens)
        called(row.input_tokens, row.output_tokens)
        return row


def _row(at_ns: int, fields: dict[str, str], names: tuple[str, str, str], before: str = "") -> TraceRecord:
    input_tokens, output_tokens, cached = (token_count(name, fields.get(name)) for name in names)
    if input_tokens is None or output_tokens is None:
        raise RowError("no token counts", f"no {names[0]} or {names[1]}")
    called(input_tokens, output_tokens)
    return TraceRecord(
        at_ns - round(float(fields.get(before, 0)) * 1e9), input_tokens, output_tokens, cached_tokens=cached
    )


def _pairs(text: bytes) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in _PAIR.findall(text)}


def _duration_s(text: str) -> float:
    """Seconds of ``1.56ms`` or ``0.2s``; 0 for what is neither."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text)
    return float(match[1]) / (1000 if match[2] == "ms" else 1) if match else 0.0
