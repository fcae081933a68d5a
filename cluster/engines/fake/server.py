"""An OpenAI-compatible server whose TTFT, ITL and token counts are exactly known: the truth our figures must match.

Start it::

    python -m harness.cluster.engines.fake.server --port 0 --ttft 0.05 --itl 0.01

It prints ``ready http://127.0.0.1:PORT/v1`` and serves ``/v1/completions``, ``/v1/chat/completions`` (streamed or not),
``/v1/models``, ``/tokenize``, ``/health``, ``/version`` and ``/metrics`` (vLLM's names) until it is killed.

- The first token is due ``--ttft`` after the request began service, each other ``--itl`` later (absolute schedule).
- ``--slots N`` serves N requests at once; others queue (a server that is too slow).
- ``--step 20,1.5,0.02`` in place of ``--ttft`` and ``--itl``: tokens come at the end of the steps of the laboratory's
  engine (`cluster.simulator`), each of 20 ms, 1.5 ms for each sequence and 0.02 ms for each prompt token that it reads,
  with ``--slots`` sequences and ``--max-num-batched-tokens`` tokens at most; ``--async-scheduling`` plans each while
  the one before it runs, as vLLM does. ``--log`` also says from when the engine counted a request (``came_ns``) and
  when the step ended that gave each chunk (``due_ns``).
- ``--simulate MODEL TIER`` paces tokens as vLLM with a model of the catalogue on one of its tiers would, with its
  limits, KV cache and prefix cache (`cluster.engines.simulated`); ``--step`` then says what a step takes, where given,
  or ``--calibration``, which is the text of what ``harness calibrate-model`` wrote.
- ``--log FILE`` writes one JSON line per finished answer with the monotonic times (ns, CLOCK_MONOTONIC, shared by all
  processes of this host) at which the kernel had the whole request and at which it was handed each chunk: the exact
  truth, also while this process is busy.
- ``FAKE_SERVER_API_KEY`` in the environment makes it demand that key.
- ``--hosted`` makes it as hosted APIs are: everything under ``/openai/deployments/fake?api-version=...``, each request
  with a header ``X-Tenant: t1`` and the key in ``api-key``; no list of models, no counters; lengths in
  ``max_completion_tokens``, of which half as many tokens come, and neither ``ignore_eos`` nor a temperature.
- ``--busy S`` answers 429 with ``Retry-After`` until S seconds after the first request for tokens.
- ``--rate-limit N`` admits N requests of a load in any second, answers 429 with ``Retry-After: 1`` to the others, and
  403 to one that comes back sooner.
- ``--answers FILE`` of JSON lines ``{"prompt": TEXT, "answers": [TEXT, ...]}`` plants answers, a word a token: the k-th
  time that a load sends a prompt it gets the k-th answer, then always the last. ``max_tokens`` caps an answer,
  ``ignore_eos`` fills it up. ``"logprob": -0.5`` beside them is that of each token, where a request asks for
  ``logprobs``.
- ``--die-after N`` ends the process, without a word, when request N + 1 of a load comes.
- A request body may carry ``"fault"``: one of `cluster.engines.fake.answers.FAULTS`.

Prompt tokens: the number of token ids, or of words in a text. Output tokens: ``max_tokens``, one per chunk.

Where one process is not enough, start several and give the load all their URLs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import hmac
import json
import socket
import struct
import sys
import time
from typing import Any, ClassVar

from harness.cluster.engines.fake.answers import AnswerStream, Truth, head
from harness.cluster.engines.fake.pacing import step_ms
from harness.server import QUESTION

MAX_REQUEST = 64 << 20
SO_TIMESTAMPNS, TIMESPEC = 35, struct.Struct("qq")  # Linux, 64 bits; the socket module has no name for it


def came_ns(said: list[tuple[int, int, bytes]]) -> int:
    """When the kernel got what was read (now, where it does not say), ns: it waits while a tick is being written.

    Not the client's own function for this: what is held to the truth must not share its faults.
    """
    wall_ns, now_ns = time.time_ns(), time.monotonic_ns()
    for _, kind, value in said:
        if kind == SO_TIMESTAMPNS:
            seconds, ns = TIMESPEC.unpack(value)
            return min(int(seconds) * 10**9 + int(ns) - wall_ns + now_ns, now_ns)
    return now_ns


class Socket(socket.socket):
    """A socket that notes when the kernel got what asyncio reads."""

    came_ns: ClassVar[int] = 0
    """Of the last read of any socket: asyncio hands it to its protocol before it reads on."""

    def accept(self) -> tuple[Socket, Any]:
        """A connection; it stamps as its listener does."""
        connection, address = super().accept()
        return Socket(fileno=connection.detach()), address

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """What asyncio calls to read."""
        data, said, _, _ = self.recvmsg(size, 64, flags)
        Socket.came_ns = came_ns(said)
        return data


class ServerConnection(asyncio.Protocol):
    """One keep-alive connection: parses requests, one at a time."""

    def __init__(self, truth: Truth, loop: asyncio.AbstractEventLoop) -> None:
        self.truth, self.loop = truth, loop
        self.buffer = bytearray()
        self.closed = False
        self.answer: AnswerStream | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; asyncio sets TCP_NODELAY itself."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """The client went away: free what it held."""
        self.closed = True
        answer = self.answer
        if answer is None or answer.over:
            return
        if answer in self.truth.queue:
            self.truth.queue.remove(answer)
            answer.over = True
        else:
            answer.end()

    def data_received(self, data: bytes) -> None:
        """Collect one whole request, then answer it."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0 or len(self.buffer) > MAX_REQUEST:
            if len(self.buffer) > MAX_REQUEST:
                self.transport.abort()
            return
        lines = bytes(self.buffer[:end]).decode("latin-1").split("\r\n")
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        size = int(headers.get("content-length") or 0)
        if len(self.buffer) < end + 4 + size:
            return
        body = bytes(self.buffer[end + 4 : end + 4 + size])
        del self.buffer[: end + 4 + size]
        method, path, _ = lines[0].split(" ", 2)
        known = hosted_path(path, headers) if self.truth.hosted else path.split("?")[0]
        if known is None:
            self.error(404, "Resource not found: path, api-version or X-Tenant")
        else:
            self.route(method, known, headers, body)

    def write(self, data: bytes) -> None:
        """Hand bytes to the kernel."""
        if not self.closed:
            self.transport.write(data)

    def reply(self, status: int, value: Any, extra: str = "") -> None:
        """A complete JSON answer."""
        payload = json.dumps(value).encode()
        self.write(head(status, "application/json", length=len(payload), extra=extra) + payload)

    def error(self, status: int, message: str, extra: str = "") -> None:
        """A JSON error as vLLM words it."""
        self.reply(status, {"error": {"message": message, "type": "Error", "code": status}}, extra)

    def route(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> None:
        """Answer one request."""
        truth = self.truth
        if path == "/health":
            self.write(head(200, "text/plain", length=0))
        elif path == "/version":
            self.reply(200, {"version": truth.version})
        elif path == "/metrics":
            payload = truth.metrics().encode()
            self.write(head(200, "text/plain", length=len(payload)) + payload)
        elif truth.api_key and not hmac.compare_digest(*truth.keys(headers)):
            self.error(401, "Unauthorized")
        elif path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": truth.model, "max_model_len": truth.longest}]})
        elif method != "POST":
            self.error(404, "Not Found")
        else:
            self.post(path, raw, load=not headers.get("user-agent", "").startswith(QUESTION))

    def post(self, path: str, raw: bytes, *, load: bool) -> None:
        """Answer one POST."""
        truth = self.truth
        try:
            body = json.loads(raw)
        except ValueError:
            self.error(400, "body is not JSON")
            return
        if path == "/tokenize":
            words = str(body.get("prompt", "")).split()
            self.reply(200, {"tokens": [100 + sum(map(ord, w)) % 5000 for w in words], "count": len(words)})
        elif path not in ("/v1/completions", "/v1/chat/completions"):
            self.error(404, "Not Found")
        elif body.get("model") != truth.model:
            self.error(404, f"The model `{body.get('model')}` does not exist.")
        elif refused := truth.refused(body, load=load):
            self.error(*refused)
        elif not self.refuse(str(body.get("fault") or "")):
            if load:
                truth.planted.count_request()
            self.answer = AnswerStream(self, body, "chat" in path, Socket.came_ns, load=load)
            truth.admit(self.answer)

    def refuse(self, fault: str) -> bool:
        """Act out a fault that needs no token; false when there is none."""
        if fault.startswith("http"):
            self.error(int(fault[4:]), f"fault {fault}")
        elif fault == "redirect":
            self.write(head(307, "text/plain", length=0, extra="Location: http://127.0.0.1:9/\r\n"))
        elif fault == "html":
            page = b"<!doctype html><title>login</title>"
            self.write(head(200, "text/html", length=len(page)) + page)
        elif fault == "reset":
            self.transport.abort()
        else:
            return False
        return True


def hosted_path(path: str, headers: dict[str, str]) -> str | None:
    """What a path of a hosted API is here; null for what it does not know, its list of models among it."""
    at, _, query = path.partition("?")
    known = at.removeprefix("/openai/deployments/fake")
    asked = "api-version=" in query and headers.get("x-tenant") == "t1"
    if known == at or known in ("/models", "/metrics") or not asked:
        return None
    return known if known in ("/tokenize", "/version") else f"/v1{known}"


async def serve(args: argparse.Namespace) -> None:
    """Listen until cancelled."""
    loop = asyncio.get_running_loop()
    truth = Truth(args, loop)
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # a collection stops every stream, and there is little garbage
    listener = Socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":
        listener.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)  # inherited, and so in time for the first request
    listener.bind((args.host, args.port))
    server = await loop.create_server(lambda: ServerConnection(truth, loop), sock=listener, backlog=4096)
    port = listener.getsockname()[1]
    print(f"ready http://{args.host}:{port}/v1", flush=True)
    await server.serve_forever()


def main() -> None:
    """Parse arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port (default)")
    parser.add_argument("--model", default="fake", help="the one model it serves")
    parser.add_argument("--ttft", type=float, default=0.05, help="seconds to the first token")
    parser.add_argument("--itl", type=float, default=0.01, help="seconds between tokens")
    parser.add_argument("--slots", type=int, default=0, help="requests served at once; 0: no limit")
    parser.add_argument(
        "--step", type=step_ms, metavar="BASE_MS,PER_SEQUENCE_MS,PER_PROMPT_TOKEN_MS",
        help="pace tokens by the steps of a continuous-batching engine, in place of --ttft and --itl",
    )  # fmt: skip
    parser.add_argument("--max-num-batched-tokens", type=int, help="tokens of a step at most; with --step")
    parser.add_argument(
        "--async-scheduling", action="store_true", help="plan a step while the one before it runs; with --step"
    )
    parser.add_argument(
        "--simulate", nargs=2, metavar=("MODEL", "TIER"), help="be as vLLM with this model on this tier; see --step"
    )
    parser.add_argument("--slow", type=float, default=1.0, help="so many times as slow; with --simulate")
    parser.add_argument("--calibration", metavar="JSON", help="what harness calibrate-model found; with --simulate")
    parser.add_argument("--serves-version", default="fake-1", help="version that it says")
    parser.add_argument("--pad", type=int, default=0, help="extra bytes per token")
    parser.add_argument("--hosted", action="store_true", help="be as a hosted API is")
    parser.add_argument("--busy", type=float, default=0.0, help="seconds for which it asks to come back later")
    parser.add_argument("--rate-limit", type=int, help="requests of a load that it admits in any second")
    parser.add_argument("--answers", help="file of planted answers")
    parser.add_argument("--die-after", type=int, help="requests of a load that it lives for")
    parser.add_argument("--log", help="file for the exact truth, one JSON line per answer")
    args = parser.parse_args()
    if args.max_num_batched_tokens is not None and (args.step is None or args.max_num_batched_tokens < 1):
        parser.error("--max-num-batched-tokens is at least 1 and needs --step")
    if args.async_scheduling and args.step is None:
        parser.error("--async-scheduling needs --step")
    try:
        asyncio.run(serve(args))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
