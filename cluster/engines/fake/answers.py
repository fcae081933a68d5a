"""What the fake server says and when: its truth (settings and counters) and each answer on its absolute schedule.

One timer serves all answers and ordinary chunks are rendered before, so that one process carries many streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from harness.cluster.engines.fake.faults import FAULTS as FAULTS
from harness.cluster.engines.fake.pacing import Pacer
from harness.cluster.engines.fake.planted import Planted, RateLimit

if TYPE_CHECKING:
    from harness.cluster.engines.fake.engine import PacingEngine


class Body(TypedDict, total=False):
    """What is read of a request's body."""

    model: str
    prompt: str | list[int]
    messages: list[dict[str, str]]
    max_tokens: int
    max_completion_tokens: int
    ignore_eos: bool
    temperature: float
    stream: bool
    stream_options: dict[str, bool]
    fault: str
    """One of `FAULTS`."""


class AnswerSink(Protocol):
    """Where an answer goes: `cluster.engines.fake.server.ServerConnection`."""

    closed: bool
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    @property
    def truth(self) -> Truth:
        """Settings and counters of the server."""

    def write(self, data: bytes) -> None:
        """Hand bytes to the kernel."""

    def reply(self, status: int, value: object) -> None:
        """A complete JSON answer."""


class Truth:
    """Counters and settings shared by all connections of one server."""

    def __init__(self, args: argparse.Namespace, loop: asyncio.AbstractEventLoop) -> None:
        self.pacer = Pacer(loop)
        self.engine: PacingEngine | None = None
        if args.step is not None or args.simulate is not None:
            from harness.cluster.engines.fake.engine import engine_of  # NumPy is half of a start without it

            self.engine = engine_of(args, loop)
        self.started_s = time.time()
        self.ttft_s: float = args.ttft
        self.itl_s: float = args.itl
        self.model: str = args.model
        self.version: str = args.serves_version
        self.slots: int = args.slots
        self.pad: str = "x" * args.pad
        self.api_key = os.environ.get("FAKE_SERVER_API_KEY", "")
        self.log = Path(args.log).open("a", buffering=1) if args.log else None  # noqa: SIM115 - lives as long as we do
        self.hosted: bool = args.hosted
        self.planted = Planted(args.answers, args.die_after)
        self.busy_s: float = args.busy
        self.limit = RateLimit(args.rate_limit)
        self.first_s: float | None = None
        self.running = 0
        self.queue: deque[AnswerStream] = deque()
        self.prompt_tokens = self.generation_tokens = self.finished = 0
        # What most chunks of most answers are, by chat or not.
        event = {"id": "fake", "model": self.model}
        self.ordinary = {
            chat: sse({**event, "choices": [{"index": 0, **said(f" t{self.pad}", chat), "finish_reason": None}]})
            for chat in (True, False)
        }

    def metrics(self) -> str:
        """The counters in Prometheus text form, by vLLM's names."""
        label, finished = f'{{engine="0",model_name="{self.model}"}}', "vllm:request_success_total"
        engine = self.engine
        tokens = self if engine is None else engine
        values = {
            f"vllm:prompt_tokens_total{label}": tokens.prompt_tokens,
            f"vllm:generation_tokens_total{label}": tokens.generation_tokens,
            f'{finished}{{engine="0",finished_reason="length",model_name="{self.model}"}}': self.finished,
            f"vllm:num_requests_running{label}": tokens.running,
            f"vllm:num_requests_waiting{label}": len(self.queue) if engine is None else engine.waiting,
            "process_start_time_seconds": self.started_s,
        }
        if engine is not None:
            values |= {
                f"vllm:iteration_tokens_total_count{label}": engine.steps,
                f"vllm:num_preemptions_total{label}": engine.scheduler.preemptions,
            }
            if engine.kv_usage is not None:
                values[f"vllm:kv_cache_usage_perc{label}"] = engine.kv_usage
            if engine.scheduler.limits.prefix_cache:
                values[f"vllm:prefix_cache_queries_total{label}"] = engine.prompt_tokens
                values[f"vllm:prefix_cache_hits_total{label}"] = engine.cached_tokens
        lines = (f"{name} {float(value)}\n" for name, value in values.items())
        return "# TYPE vllm:prompt_tokens_total counter\n" + "".join(lines)

    @property
    def longest(self) -> int:
        """Input and output tokens that a request may have."""
        return 32768 if self.engine is None or self.engine.longest is None else self.engine.longest

    def keys(self, headers: dict[str, str]) -> tuple[str, str]:
        """The key that was given, as it was, and the one that is right."""
        if self.hosted:
            return headers.get("api-key", ""), self.api_key
        return headers.get("authorization", ""), f"Bearer {self.api_key}"

    def refused(self, body: Body, *, load: bool) -> tuple[int, str, str] | None:
        """Status, words and headers of a refusal; null when there is none."""
        now = time.monotonic()
        self.first_s = now if self.first_s is None else self.first_s
        if (left := self.first_s + self.busy_s - now) > 0:
            return 429, "too many requests", f"Retry-After: {math.ceil(left)}\r\n"
        if load and (found := self.limit.refused(body, now)):
            return found
        limited = self.engine is not None and self.engine.longest is not None
        if limited and count_prompt(body) + asked_tokens(body) > self.longest:
            return 400, f"This model's maximum context length is {self.longest} tokens.", ""
        unknown = [name for name in ("max_tokens", "ignore_eos", "temperature") if name in body]
        return (400, f"Unsupported parameter: {unknown[0]}", "") if self.hosted and unknown else None

    def admit(self, answer: AnswerStream) -> None:
        """Serve now or queue."""
        if self.engine is not None:
            if answer.fault != "hang":
                self.engine.submit(answer)
        elif self.slots and self.running >= self.slots:
            self.queue.append(answer)
        else:
            self.running += 1
            answer.begin()

    def release(self, answer: AnswerStream) -> None:
        """An answer is over, its slot is free: the next in the queue begins."""
        if self.engine is not None:
            self.engine.leave(answer)
            return
        self.running -= 1
        while self.queue:
            answer = self.queue.popleft()
            if not answer.connection.closed:
                self.running += 1
                answer.begin()
                return


class AnswerStream:
    """One request being answered: writes its chunks on an absolute schedule. ``load``: not asked before a load."""

    def __init__(self, connection: AnswerSink, body: Body, chat: bool, received_ns: int, *, load: bool) -> None:
        self.connection, self.body, self.chat, self.received_ns, self.load = connection, body, chat, received_ns, load
        self.truth = connection.truth
        self.fault = str(body.get("fault") or "")
        self.stream = bool(body.get("stream"))
        tokens = asked_tokens(body)
        self.tokens = max(1, tokens // 2) if self.fault == "short" or self.truth.hosted else tokens
        planted = self.truth.planted.answer(body, self.tokens, load=load)
        self.pieces, ended = planted or ([], False)
        self.logprob = self.truth.planted.logprob(body)
        self.tokens = len(self.pieces) or self.tokens
        self.finish = "stop" if ended else "length"
        self.prompt_tokens = count_prompt(body)
        self.ordinary = None if self.fault or self.pieces else self.truth.ordinary[chat]
        self.newline = {"crlf": b"\r\n", "cr": b"\r"}.get(self.fault, b"\n")
        self.sent = 0
        self.chunk_ns: list[int] = []
        self.came_ns, self.due_ns = received_ns, list[int]()
        """By the engine, where there is one: from when it counted, and the end of the step that gave each chunk."""
        self.over = False
        self.held = b""

    def words(self) -> Sequence[Hashable]:
        """The prompt: its token ids, or its words."""
        prompt = self.body.get("prompt")
        if isinstance(prompt, list):
            return prompt
        texts = [prompt or ""] if prompt is not None else [str(m.get("content")) for m in self.body.get("messages", [])]
        return [word for text in texts for word in text.split()]

    def begin(self) -> None:
        """Start the clock of this answer."""
        self.t0 = self.connection.loop.time()
        if self.fault != "hang":
            self.truth.pacer.call_at(self.t0 + self.truth.ttft_s, self)

    def wait(self) -> None:
        """For the next token: on the fixed schedule, or until the engine gives it."""
        truth = self.truth
        if truth.engine is None:
            truth.pacer.call_at(self.t0 + truth.ttft_s + self.sent * truth.itl_s, self)

    def token(self, given: int, due_ns: int) -> None:
        """The engine has given this answer so many tokens, the last at ``due_ns``: write what is to be written now."""
        stalled = self.fault == "stall" and self.sent >= 2
        if self.over or stalled or given <= self.sent or (not self.stream and given < self.tokens):
            return
        self.due_ns.append(due_ns)
        self.tick()

    def tick(self) -> None:
        """Write the next chunk, or the end."""
        if self.connection.closed:
            self.end()
        elif not self.stream:
            self.whole()
        elif self.ordinary is not None and 0 < self.sent < self.tokens - 1:
            self.connection.transport.write(self.ordinary)
            self.chunk_ns.append(time.monotonic_ns())
            self.sent += 1
            self.wait()
        elif self.fault in ("empty", "only_done"):  # as a gateway does that lost its engine
            nothing = self.event(said("", self.chat), "stop") if self.fault == "empty" else b""
            self.connection.write(self.opening() + nothing + self.done() + b"0\r\n\r\n")
            self.end()
        else:
            self.next_chunk()

    def next_chunk(self) -> None:
        """One token, or what the fault makes of it, with what comes before the first and after the last."""
        fault, out = self.fault, b"" if self.sent else self.opening()
        step = min(2 if fault == "bundle" else 1, self.tokens - self.sent)
        text = "".join(self.pieces[self.sent : self.sent + step]) or f" t{self.truth.pad}" * step
        self.sent += step
        last = self.sent >= self.tokens
        finish = None if not last or fault == "no_finish" else 1 if fault == "odd_fields" else self.finish
        out += self.event(said(text, self.chat), finish)
        if self.sent >= 2 and fault in ("stall", "cut", "error_event", "no_finish"):
            if fault == "error_event":
                out += self.data({"error": {"message": "engine died", "type": "InternalServerError", "code": 500}})
            self.connection.write(out + (b"0\r\n\r\n" if fault in ("error_event", "no_finish") else b""))
            if fault == "cut":
                self.connection.transport.close()
            if fault != "stall":
                self.end()
            return
        if last:
            out += self.closing()
        if fault == "bulk":
            self.held += out
            out = self.held if last else b""
        self.connection.write(out)
        self.chunk_ns.append(time.monotonic_ns())
        if last:
            self.end()
        else:
            self.wait()

    def whole(self) -> None:
        """The answer to a request that did not ask for a stream: everything after the last token's time."""
        truth = self.truth
        if truth.engine is None:
            due = self.t0 + truth.ttft_s + (self.tokens - 1) * truth.itl_s
            if due > self.connection.loop.time():
                truth.pacer.call_at(due, self)
                return
        text = "".join(self.pieces) or " t" * self.tokens
        choice = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        answer = {"index": 0, **choice, "finish_reason": self.finish}
        self.connection.reply(200, {"model": truth.model, "choices": [answer], "usage": self.usage()})
        self.sent = self.tokens
        self.end()

    def opening(self) -> bytes:
        """What comes before the first token."""
        label = "application/json" if self.fault == "json_label" else "text/event-stream; charset=utf-8"
        out = head(200, label, chunked=True)
        if self.fault == "no_data":
            out += http_chunk(b"data:\n\n")
        if self.chat and self.fault not in ("empty", "only_done"):
            out += self.event({"delta": {"role": "assistant", "content": ""}}, None)
        return out

    def closing(self) -> bytes:
        """What follows the last token."""
        out = b""
        if (self.body.get("stream_options") or {}).get("include_usage") and self.fault != "no_usage":
            out += self.data({"id": "fake", "model": self.truth.model, "choices": [], "usage": self.usage()})
            if self.fault == "late_zeros":
                out += self.data({"id": "fake", "choices": [], "usage": dict.fromkeys(self.usage(), 0)})
        return out + (b"" if self.fault == "no_done" else self.done()) + b"0\r\n\r\n"

    def done(self) -> bytes:
        """The last event."""
        return http_chunk(b"data: [DONE]" + self.newline * 2)

    def usage(self) -> dict[str, object]:
        """The server's own token books for this answer."""
        wrong = {"double_usage": 2 * self.tokens, "half_usage": self.tokens // 2, "hidden_reasoning": 2 * self.tokens}
        tokens = wrong.get(self.fault, self.tokens)
        total = self.prompt_tokens + tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": tokens, "total_tokens": total}
        details = {
            "odd_fields": {"prompt_tokens_details": {"cached_tokens": -1}},
            "hidden_reasoning": {"completion_tokens_details": {"reasoning_tokens": self.tokens}},
        }
        return {**counts, **details.get(self.fault, {})}

    def event(self, choice: Mapping[str, object], finish: object) -> bytes:
        """One SSE event with one choice."""
        text = "text" in choice
        scored = {} if self.logprob is None or not self.sent else {"logprobs": self.scores(text)}
        choices = [{"index": 0, **choice, **scored, "finish_reason": finish}]
        return self.data({"id": "fake", "model": self.truth.model, "choices": choices})

    def scores(self, text: bool) -> dict[str, object]:
        """Log-probability of one token, as completions (``text``) or chat have it."""
        return {"token_logprobs": [self.logprob]} if text else {"content": [{"token": "t", "logprob": self.logprob}]}

    def data(self, value: Mapping[str, object]) -> bytes:
        """One SSE event as an HTTP chunk."""
        return sse(value, self.newline, b": ping" + self.newline * 2 if self.fault in ("crlf", "cr") else b"")

    def end(self) -> None:
        """Books, log and the next in the queue."""
        if self.over:
            return
        self.over = True
        truth = self.truth
        truth.prompt_tokens += self.prompt_tokens
        truth.generation_tokens += self.sent
        truth.finished += self.sent >= self.tokens
        if truth.log:
            row = {"load": self.load, "received_ns": self.received_ns, "chunk_ns": self.chunk_ns, "tokens": self.sent}
            by_engine = {} if truth.engine is None else {"came_ns": self.came_ns, "due_ns": self.due_ns}
            truth.log.write(json.dumps({**row, "prompt_tokens": self.prompt_tokens, **by_engine}) + "\n")
        truth.release(self)


def said(text: str, chat: bool) -> dict[str, object]:
    """The part of a choice that holds some text."""
    return {"delta": {"content": text}} if chat else {"text": text}


def asked_tokens(body: Body) -> int:
    """Output tokens that are asked for."""
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 16)


def count_prompt(body: Body) -> int:
    """Prompt tokens by this server's own simple rule: ids one each, text by words."""
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return len(prompt)
    if isinstance(prompt, str):
        return len(prompt.split())
    return sum(len(str(m.get("content", "")).split()) for m in body.get("messages") or [])


def head(status: int, content_type: str, *, length: int | None = None, chunked: bool = False, extra: str = "") -> bytes:
    """A response head."""
    size = "Transfer-Encoding: chunked\r\n" if chunked else f"Content-Length: {length}\r\n"
    return f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\n{size}{extra}\r\n".encode()


def sse(value: Mapping[str, object], newline: bytes = b"\n", comment: bytes = b"") -> bytes:
    """One SSE event as an HTTP chunk."""
    return http_chunk(comment + b"data: " + json.dumps(value).encode() + newline * 2)


def http_chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
