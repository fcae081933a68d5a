"""SGLang server logs with ``--enable-request-time-stats-logging``, or with ``--log-requests``.

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

import re

from harness.trace.formats.record import LeftOutError, Reader, RowError, TraceRecord
from harness.trace.formats.values import Copies, IsoClock, called, epoch_ns, token_count

_LINE = re.compile(rb"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)[^\]]{0,40}\] (.*)", re.DOTALL)
_STATS = re.compile(rb"Req ?Time ?Stats\(([^)]*)\):?(.*)", re.DOTALL)
_FINISH = re.compile(rb"Finish: obj=\w+\(.*?rid='?([\w-]+)'?.*'meta_info': \{(.*)", re.DOTALL)
_PAIR = re.compile(rb"(\w+)=([\w.+-]+)")
_META = re.compile(rb"'(prompt_tokens|completion_tokens|cached_tokens|e2e_latency)': ([\d.]+)")
_EPOCH_S = 978_307_200
_WAITING = 10_000
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
        line = _LINE.match(record[:100_000])
        return line is not None and (_STATS.search(line[2]) or _FINISH.match(line[2])) is not None

    def parse(self, record: bytes) -> TraceRecord | tuple[()]:
        """Read one line; most are about something else."""
        if (line := _LINE.match(record)) is None:
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
