"""The body of each request, as bytes, before it is due.

Source: the OpenAI API reference; vLLM's ``ignore_eos`` forces an output length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from harness.errors import UsageError
from harness.plan import Request
from scenarios.target import ENDPOINTS


def prepare(
    request: Request,
    *,
    endpoint: str,
    model: str,
    extra_body: Mapping[str, object] | None = None,
    stream: bool = True,
) -> bytes:
    """The bytes of one request from its Content-Length header on; `Target.head` comes before them.

    It asks for its own ``model`` if the plan has one. Generation is greedy, and forced to ``output_tokens`` when the
    plan has them. ``extra_body`` fields win over ours; a null there removes the field (for servers that refuse one they
    do not know).

    Raises `UsageError` when the endpoint cannot take this kind of prompt.
    """
    body: dict[str, object] = {"model": request.model or model}
    if endpoint == "completions":
        if request.messages is not None:
            raise UsageError(f"request {request.request_id} holds chat messages: use the chat endpoint")
        body["prompt"] = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_text
    elif endpoint == "chat":
        body["messages"] = _messages(request)
    else:
        raise UsageError(f"unknown endpoint {endpoint!r}: valid: {', '.join(ENDPOINTS)}")
    if request.output_tokens is not None:
        body["max_tokens"] = request.output_tokens
        body["ignore_eos"] = True
    body.update(temperature=0, stream=stream)
    if stream:
        body["stream_options"] = {"include_usage": True}
    for name, value in (extra_body or {}).items():
        if value is None:
            body.pop(name, None)
        else:
            body[name] = value
    try:
        raw = msgspec.json.encode(body)
    except (TypeError, ValueError) as e:
        raise UsageError(f"request {request.request_id} cannot be written as JSON: {e}") from e
    return b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)


def _messages(request: Request) -> object:
    if request.messages is not None:
        try:
            return msgspec.json.decode(request.messages, type=list[dict[str, Any]])
        except msgspec.DecodeError as e:
            raise UsageError(f"request {request.request_id}: its chat messages are not a JSON list ({e})") from e
    if request.prompt_text is None:
        raise UsageError(
            f"request {request.request_id} is a list of token ids, which the chat endpoint cannot take: "
            "use the completions endpoint, or a plan with text"
        )
    return [{"role": "user", "content": request.prompt_text}]
