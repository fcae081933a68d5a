"""vLLM's own client on our plan: ``vllm bench serve`` as installed, with its dataset reader replaced by the plan.

Only the list of requests is ours: prompts or messages, lengths and arrival times of the plan, so that both clients ask
a server for exactly the same. Sending, timing and figures are vLLM's. Its ``vllm`` console script does not start in the
CPU wheel, and no dataset of its command line takes such requests with times of one's own, hence this process of our
own::

    python tests/bench/vllm_bench.py PLAN [options of vllm bench serve]

Source: vLLM ``benchmarks/serve.py`` (``main_async``, ``get_request`` with ``self_timed``).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from harness.cluster.process.process import Process, describe_exit, tail
from harness.errors import ServerError, UsageError
from harness.plan.file import Request, iter_requests
from harness.server.access import page_under

DEADLINE_S = 3600.0
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def check_can_run() -> None:
    """Raise `UsageError` when vLLM, and with it its client, is not installed here."""
    if find_spec("vllm") is None:
        raise UsageError("the cross-check runs vLLM's own client: install the harness with its [cpu] or [gpu] extra")


def run_vllm_bench(
    plan: Path, out: Path, *, base_url: str, model: str, concurrency: int | None, extra_body: Mapping[str, object],
    api_key: str | None, endpoint: str = "completions", headers: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
) -> Mapping[str, Any]:  # fmt: skip
    """Send ``plan`` with vLLM's client and return the figures it saved (to ``out``, JSON; its words beside it).

    On the chat ``endpoint`` they come with the stamps of each request.

    Raises `ServerError` when it ends without figures or not within ``deadline_s``.
    """
    url = urlsplit(page_under(base_url, PATHS[endpoint]))
    argv = [
        sys.executable, __file__, str(plan), "--backend", "openai",
        "--base-url", f"{url.scheme}://{url.netloc}", "--endpoint", urlunsplit(("", "", url.path, url.query, "")),
        *(["--header", *(f"{name}={value}" for name, value in headers.items())] if headers else []),
        "--model", model, "--dataset-name", "timed_trace",
        "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99",
        "--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-result", "--result-dir", str(out.parent),
        "--result-filename", out.name,
        *(["--extra-body", msgspec.json.encode(extra_body).decode()] if extra_body else []),
        *(["--save-detailed"] if endpoint == "chat" else []),
        *(["--no-self-timed", "--max-concurrency", str(concurrency)] if concurrency else []),
    ]  # fmt: skip
    log = out.with_suffix(".log")
    with Process.start(argv, name="vllm bench serve", env={**_QUIET, "OPENAI_API_KEY": api_key}, log=log) as child:
        code = child.wait(deadline_s)
    try:
        found: Mapping[str, Any] = msgspec.json.decode(out.read_bytes())
    except (OSError, msgspec.DecodeError) as e:
        how = f"took more than {deadline_s:.0f} s" if code is None else f"ended ({describe_exit(code)}) without figures"
        raise ServerError(f"vllm bench serve {how}; its log: {log}", tail(log, 12)) from e
    return found


def _count_without_usage(*_: object, **__: object) -> None:
    """Stands in for a tokenizer: without one vLLM's client leaves out TTFT, and with usage it never asks it."""
    raise ServerError("the server does not say how many tokens it made: vLLM's client would count them by a tokenizer")


def main(argv: Sequence[str]) -> None:
    """Run vLLM's ``bench serve`` with the requests of a plan."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plan, *options = argv
    parser: argparse.ArgumentParser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    args = parser.parse_args(options)
    chat = urlsplit(args.endpoint).path.endswith(PATHS["chat"])
    if chat:
        # Requests with times of their own are for completions backends alone, so its chat one goes by their name.
        serve.ASYNC_REQUEST_FUNCS["openai"] = serve.ASYNC_REQUEST_FUNCS["openai-chat"]

    def sample(request: Request) -> Any:
        return SampleRequest(
            **_prompt(request, chat=chat),
            prompt_len=request.input_tokens or 0,
            expected_output_len=request.output_tokens or 16,
            request_id=str(request.request_id),
            timestamp=(request.scheduled_ns or 0) / 1e9,
            request_overrides=None if request.model is None else {"model": request.model},
        )

    samples = [sample(request) for request in iter_requests(Path(plan))]
    serve.get_samples = lambda args, tokenizer: samples
    serve.get_tokenizer = lambda *args, **kwargs: _count_without_usage
    asyncio.run(serve.main_async(args))


def _prompt(request: Request, *, chat: bool) -> Mapping[str, Any]:
    """What our client would send, as vLLM's takes it. Raises `UsageError` for what the endpoint cannot take."""
    if not chat:
        if request.prompt_token_ids is None and request.prompt_text is None:
            raise UsageError(f"request {request.request_id} holds chat messages, not a completions prompt")
        return {"prompt": request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_text}
    if request.messages is not None:
        return {"prompt": "", "chat_messages": msgspec.json.decode(request.messages)}
    if request.prompt_text is None:
        raise UsageError(f"request {request.request_id} is a list of token ids, which the chat endpoint cannot take")
    return {"prompt": "", "chat_messages": [{"role": "user", "content": request.prompt_text}]}


if __name__ == "__main__":
    main(sys.argv[1:])
