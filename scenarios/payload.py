"""The body of each request, as bytes, before it is due.

Source: the OpenAI API reference; vLLM's ``ignore_eos`` forces an output length and ``return_token_ids`` gives the ids
of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from harness.errors import UsageError
from harness.plan.file import Request
from harness.record.run_spec import DEFAULTS, NO_TEMPERATURE, OutputLengths
from scenarios.client.completion import Answer
from scenarios.client.endpoint import ENDPOINTS


@dataclass(frozen=True, slots=True)
class Lengths:
    """How the planned lengths of answers are asked for: in which field of the body, and as what."""

    field: str = DEFAULTS.length_field
    kind: OutputLengths = DEFAULTS.output_lengths


FORCED = Lengths()


@dataclass(frozen=True, slots=True)
class Draft:
    """The body of a turn of a live conversation, as JSON around the place where its history goes.

    The prompt's JSON is an array or a string: ``new`` is the inside of it that this turn adds, and a history the inside
    that all turns before it made.
    """

    before: bytes
    new: bytes
    after: bytes
    form: str
    """"messages", "text" or "token_ids"."""

    def payload(self, history: bytes = b"") -> bytes:
        """The bytes of the request from its Content-Length header on."""
        return _framed(self.before + self._joined(history, self.new) + self.after)

    def history(self, history: bytes, answer: Answer) -> bytes | None:
        """What the next turn carries: this turn with its own ``history``, and what was answered.

        Null when that is not known: the server gave no token ids.
        """
        asked = self._joined(history, self.new)
        if self.form == "messages":
            return self._joined(asked, msgspec.json.encode({"role": "assistant", "content": answer.text}))
        if self.form == "text":
            return asked + msgspec.json.encode(answer.text)[1:-1]
        if not answer.token_ids and answer.parts:
            return None
        return self._joined(asked, msgspec.json.encode(answer.token_ids)[1:-1])

    def _joined(self, first: bytes, second: bytes) -> bytes:
        return first + b"," + second if first and second and self.form != "text" else first + second


def prepare(
    request: Request,
    *,
    endpoint: str,
    model: str,
    extra_body: Mapping[str, object] | None = None,
    stream: bool = True,
    lengths: Lengths = FORCED,
) -> bytes:
    """The bytes of one request from its Content-Length header on; `Endpoint.head` comes before them.

    It asks for its own ``model`` if the plan has one. Generation is greedy (`NO_TEMPERATURE` aside), and forced to
    ``output_tokens``, or as ``lengths`` say, when the plan has them. ``extra_body`` fields win over ours; a null there
    removes the field (for servers that refuse one they do not know).

    Raises `UsageError` when the endpoint cannot take this kind of prompt.
    """
    return _framed(_encoded(request, _body(request, endpoint, model, extra_body or {}, stream, lengths)))


def draft(
    request: Request,
    *,
    endpoint: str,
    model: str,
    extra_body: Mapping[str, object] | None = None,
    stream: bool = True,
    lengths: Lengths = FORCED,
    kept: bool,
) -> Draft:
    """One turn of a live conversation, the same way. ``kept``: a later turn needs its answer.

    Raises `UsageError` also for an ``extra_body`` that brings a prompt of its own or asks for several answers.
    """
    extra = dict(extra_body or {})
    if taken := {"messages", "prompt"} & extra.keys():
        raise UsageError(f"--extra-body must not say {taken.pop()}: a live conversation makes its own")
    for name in ("n", "best_of"):
        if extra.get(name) not in (None, 1):
            raise UsageError(f"--extra-body asks for several answers ({name}): a live conversation goes on from one")
    if extra.get("echo"):
        raise UsageError("--extra-body must not say echo: a live conversation carries the answer, not the prompt twice")
    form = "messages" if endpoint == "chat" else "text" if request.prompt_token_ids is None else "token_ids"
    if kept and form == "token_ids":
        extra = {"return_token_ids": True, **extra}
    body = _body(request, endpoint, model, extra, stream, lengths)
    name = "messages" if form == "messages" else "prompt"
    prompt = _encoded(request, body.pop(name))
    before, after = b'{"%b":%b' % (name.encode(), prompt[:1]), prompt[-1:] + b"," + _encoded(request, body)[1:]
    return Draft(before, prompt[1:-1], after, form)


def most_tokens(
    request: Request, extra_body: Mapping[str, object] | None = None, lengths: Lengths = FORCED
) -> int | None:
    """Output tokens that this request asks for at most, over all its answers; null when it names no bound."""
    extra = extra_body or {}
    named = {lengths.field: None if lengths.kind == "free" else request.output_tokens, **extra}
    fields = (lengths.field, "max_tokens", "max_completion_tokens")
    asked = [n for name in fields if isinstance(n := named.get(name), int)]
    answers = [n for n in (extra.get("n"), extra.get("best_of"), 1) if isinstance(n, int)]
    return max(asked) * max(answers) if asked else None


def _framed(raw: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)


def _encoded(request: Request, value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError) as e:
        raise UsageError(f"request {request.request_id} cannot be written as JSON: {e}") from e


def _body(
    request: Request, endpoint: str, model: str, extra_body: Mapping[str, object], stream: bool, lengths: Lengths
) -> dict[str, object]:
    body: dict[str, object] = {"model": request.model or model}
    if endpoint == "completions":
        if request.messages is not None:
            raise UsageError(f"request {request.request_id} holds chat messages: use the chat endpoint")
        body["prompt"] = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_text
    elif endpoint == "chat":
        body["messages"] = _messages(request)
    else:
        raise UsageError(f"unknown endpoint {endpoint!r}: valid: {', '.join(ENDPOINTS)}")
    if request.output_tokens is not None and lengths.kind != "free":
        body[lengths.field] = request.output_tokens
        if lengths.kind == "forced":
            body["ignore_eos"] = True
    if lengths.field != NO_TEMPERATURE:
        body["temperature"] = 0
    body["stream"] = stream
    if stream:
        body["stream_options"] = {"include_usage": True}
    for name, value in extra_body.items():
        if value is None:
            body.pop(name, None)
        else:
            body[name] = value
    return body


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
