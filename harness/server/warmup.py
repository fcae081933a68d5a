"""What is sent before the clock starts: one request that shows whether the others can be answered, and a warm-up.

Neither is measured: they are over before the servers' counters are read, and share no prefix with a planned prompt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Thread

import msgspec

from harness.errors import ServerError
from harness.plan.file import Request, iter_requests
from harness.record.run_spec import NO_TEMPERATURE, RunSpec
from harness.server import probe
from harness.server.access import Access, page_under
from harness.server.question import HEARING_S

FIRST_ANSWER_S = 15.0
WARM_REQUESTS, WARM_IN_FLIGHT = 16, 8
"""Engines compile, capture and open connections at their first requests: so many cover what was seen of that."""
WARM_TOKENS = 16
WARM_S = 30.0
_HOPELESS = (401, 403, 404)
_HOW = "\n  --length-field, --output-lengths and --extra-body change what is sent"
_PATHS = {"completions": "/completions", "chat": "/chat/completions"}


def ask(
    spec: RunSpec, base_url: str, access: Access, prompt: Mapping[str, object], tokens: int, deadline_s: float
) -> None:
    """Send one request as the run will, and read its whole answer, whatever it says. Raises `ServerError`."""
    body: dict[str, object] = {"model": spec.model, **prompt, spec.length_field: tokens}
    if spec.output_lengths == "forced":
        body["ignore_eos"] = True
    if spec.length_field != NO_TEMPERATURE:
        body["temperature"] = 0
    body |= {**spec.extra_body, "stream": False}
    kept = {name: value for name, value in body.items() if value is not None and name != "stream_options"}
    probe.fetch(page_under(base_url, _PATHS[spec.endpoint]), access, kept, deadline_s=deadline_s)


def first_request(spec: RunSpec, access: Access, plan: Path, tell: Callable[[str], None]) -> None:
    """Ask each server for one token, and wait where it says when to come back.

    Raises `ServerError` when every request would end like that: a wrong key, path or model. Else ``tell`` hears of it.
    """
    first = next(iter(iter_requests(plan)), None)
    named: dict[str, object] = {"model": first.model} if first is not None and first.model else {}
    hello = {"messages": [{"role": "user", "content": "Hello"}]} if spec.endpoint == "chat" else {"prompt": "Hello"}
    for url in spec.base_urls:
        try:
            ask(spec, url, access, {**hello, **named}, 1, FIRST_ANSWER_S)
        except probe.RefusalError as e:
            if e.status in _HOPELESS or e.wait_s is not None:
                raise ServerError(f"{e}\n  no load was begun: every request would end like this first one") from e
            tell(f"note: a first request was refused: {e}{_HOW if e.status in (400, 422) else ''}")
        except probe.RedirectError:
            raise
        except ServerError as e:
            tell(f"note: of a first request: {e}")


def warm_up(spec: RunSpec, access: Access, plan: Path, tell: Callable[[str], None]) -> None:
    """Send some requests like those of ``plan`` to each server, a few at a time, for `WARM_S` at most.

    How they end does not matter here: the load will show it.
    """
    left: deque[tuple[str, dict[str, object], int]] = deque(
        (url, prompt, tokens)
        for prompt, tokens in islice(_turned_round(iter_requests(plan), spec), WARM_REQUESTS)
        for url in spec.base_urls
    )
    end = time.monotonic() + WARM_S

    def send() -> None:
        while left and time.monotonic() < end:
            with suppress(ServerError, IndexError):  # another thread took the last
                url, prompt, tokens = left.popleft()
                ask(spec, url, access, prompt, tokens, max(0.1, end - time.monotonic()))

    tell(f"warming up: {len(left)} requests")
    # As daemons: Ctrl-C need not wait for their answers.
    threads = [Thread(target=send, daemon=True) for _ in range(WARM_IN_FLIGHT * len(spec.base_urls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(HEARING_S)


def _turned_round(requests: Iterable[Request], spec: RunSpec) -> Iterable[tuple[dict[str, object], int]]:
    """Prompts of the same length that begin otherwise: the measured ones must not find theirs in a cache."""
    for request in requests:
        prompt: dict[str, object] = {"model": request.model} if request.model else {}
        if request.messages is not None:
            try:
                messages = msgspec.json.decode(request.messages, type=list[dict[str, object]])
            except msgspec.DecodeError:
                continue
            prompt["messages"] = [
                {**one, "content": _backwards(said)} if isinstance(said := one.get("content"), str) else one
                for one in messages
            ]
        elif request.prompt_token_ids is not None:
            prompt["prompt"] = request.prompt_token_ids[::-1]
        elif spec.endpoint == "chat":
            prompt["messages"] = [{"role": "user", "content": _backwards(request.prompt_text or "")}]
        else:
            prompt["prompt"] = _backwards(request.prompt_text or "")
        yield prompt, min(request.output_tokens or WARM_TOKENS, WARM_TOKENS)


def _backwards(text: str) -> str:
    return " ".join(reversed(text.split()))
