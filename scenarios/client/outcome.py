"""What one answer amounts to: a success, or a failure with its class, and the figures of its row. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal

from scenarios.client.completion import Completion
from scenarios.client.events import CompletionDetails, PromptDetails, Usage, message_in

DETAIL_LIMIT = 300
Secret = str | tuple[str, ...] | None
"""The API key, and the values of other secret headers."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one answer says, as the columns of `harness.record.results.SCHEMA` mean it.

    ``chunk_ns`` are stamps as they were fed. ``chunk_tokens`` is null unless the tokens of every chunk are known.
    """

    chunk_ns: array[int]
    chunk_tokens: array[int] | None
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    finish_reason: str | None
    http_status: int | None
    error: str | None
    detail: str | None


def outcome_of(
    completion: Completion, *, status: int | None, done: bool, body: bytes, location: str, secret: Secret
) -> Outcome:
    """The facts of an answer with these events, and this ``status``; final once ``done``.

    ``body`` and ``location`` tell why, where the status is not 200; ``secret`` is cut out of every detail.
    """
    usage = completion.usage or Usage()
    details = usage.prompt_tokens_details or PromptDetails()
    spent = usage.completion_tokens_details or CompletionDetails()
    error = _judge(completion, status, done, body, location)
    chunk_ns, chunk_tokens = completion.chunks()
    return Outcome(
        chunk_ns=chunk_ns,
        chunk_tokens=chunk_tokens,
        input_tokens=usage.prompt_tokens,
        cached_tokens=details.cached_tokens,
        output_tokens=None if completion.several else usage.completion_tokens,
        reasoning_tokens=None if completion.several else spent.reasoning_tokens,
        finish_reason=completion.finish_reason,
        http_status=status,
        error=error[0] if error is not None else None,
        detail=clean(error[1] if error is not None else _left_out(completion), secret) or None,
    )


LeftOut = Literal["several choices", "fields"]
"""Why something that a success said became no fact."""


def _left_out(completion: Completion) -> str:
    """What a success said that became no fact, and why; empty for an ordinary one."""
    words: dict[LeftOut, str] = {}
    if completion.several:
        words["several choices"] = "choices[0] alone is timed; usage counts all, so output_tokens is null"
    if completion.odd:
        words["fields"] = f"left out, as of no type that can be read: {', '.join(completion.odd)}"
    return "; ".join(said if why == "fields" else f"{why}: {said}" for why, said in words.items())


def _judge(
    completion: Completion, status: int | None, done: bool, body: bytes, location: str
) -> tuple[str, str] | None:
    """The error class and detail, or None when the answer is a success: only if it was one."""
    if status is not None and status != 200:
        said = f"HTTP {status}"
        if 300 <= status < 400 and location:
            return "redirect", f"{said} to {location}"
        message = message_in(body)
        return _status_error(status), f"{said}: {message}" if message else said
    if completion.error is not None:
        return completion.error
    if completion.finish_reason in ("abort", "error"):
        return "server", f"the server ended the answer with finish_reason {completion.finish_reason}"
    if not done:
        return "cut", "the answer did not end"
    if not completion.ended and not completion.finished:
        if completion.empty:
            return "protocol", "status 200 without a single completion event"
        return "incomplete", "the stream ended without [DONE] and without a finish reason"
    if completion.said_nothing:  # as from a gateway that lost its engine: fast, and no answer
        how = completion.finish_reason or "none"
        return "empty", f"no output and no usage, though tokens were asked for (finish reason: {how})"
    return None


def _status_error(status: int) -> str:
    known = {401: "auth", 403: "auth", 404: "not_found", 429: "overloaded", 503: "overloaded"}
    if status in known:
        return known[status]
    return {3: "redirect", 4: "rejected", 5: "server"}.get(status // 100, "protocol")


def clean(text: str, secret: Secret = None) -> str:
    """One printable line of at most 300 characters, without ``secret``."""
    for one in (secret,) if isinstance(secret, str) else secret or ():
        text = text.replace(one, "[api key]") if one else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * DETAIL_LIMIT]).split())
    return text if len(text) <= DETAIL_LIMIT else text[: DETAIL_LIMIT - 3] + "..."
