"""OpenAI-style logs: batch files, request bodies, and responses, one JSON object each.

==========================================  ==========================================================================
``{"custom_id", "url", "body": {...}}``     batch input: what was asked; no times, no output length
``{"custom_id", "response": {...}}``        batch output: ``usage``; no prompt, no times (an offline workload has none)
``{"request": {...}, "response": {...}}``   a logged call: the prompt, ``usage``, and ``created`` as the arrival
``{"object": "chat.completion", ...}``      a response: ``usage`` and ``created``
``{"model", "messages"}`` or ``"prompt"``   a request body
==========================================  ==========================================================================

``usage.prompt_tokens`` (``input_tokens``) contain the cached ones, which are never added. ``created`` is in whole
seconds since 1970. ``max_tokens`` is a limit, not a length, and is not taken for one. Prompts that are more than text
(images, tool calls, definitions of tools) are not sent; a call that has ``usage`` is then replayed by its lengths.
Without it, the text beside definitions of tools is sent alone, and a note says so; others are refused.

Source: OpenAI API reference (Batch, Chat, Completions, Responses).
"""

from __future__ import annotations

from typing import Any

from harness.formats.row import FailedCallError, LeftOutError, Reader, Row, RowError
from harness.formats.values import Copies, called, decode_object, epoch_ns, fields_of, plain_messages, token_count

_TEXT_URLS = ("/completions", "/responses")
_OTHERS = {"usage", "startTime", "traceId", "trace_id", "prompt_tokens", "conversation"}
_OBJECTS = ("chat.completion", "text_completion", "response")


class OpenAI(Reader):
    """Reader of OpenAI batch files and API logs."""

    summary = "OpenAI batch input or output, or logged API requests and responses (JSON Lines)"
    clock = "created, a time since 1970: its size shows the unit, as 2001 to 2100 differ in each"
    in_order = False

    def __init__(self) -> None:
        self._copies = Copies("custom_id")
        self._not_text = self._without_tools = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """One of the five shapes."""
        fields = fields_of(record)
        names = fields.keys()
        return (
            {"custom_id", "body"} <= names
            or {"custom_id", "response"} <= names
            or ({"request", "response"} <= names and fields["request"].startswith(b"{"))
            or fields.get("object", b"").strip(b'"').decode("utf-8", "replace") in _OBJECTS
            or ("model" in names and bool(names & {"messages", "prompt"}) and not names & _OTHERS)
        )

    def parse(self, record: bytes) -> Row:
        """Read one object."""
        value = decode_object(record)
        if "custom_id" in value:
            self._copies.check(str(value["custom_id"]))
        url = value.get("url")
        if isinstance(url, str) and not url.endswith(_TEXT_URLS):
            raise LeftOutError(f"not a text completion ({url[:40]})")
        request, response = _shape(value)
        input_tokens, output_tokens = _usage(response)
        text, messages, prompt_ids = _prompt(request)
        if input_tokens is None:
            input_tokens = prompt_ids
        if request.get("tools") or request.get("functions"):
            if input_tokens is None:
                self._without_tools += 1
            else:
                text = messages = None
        if text is None and messages is None:
            if input_tokens is None:
                raise RowError("no text", "neither a prompt of text only nor usage: nothing to send")
            self._not_text += bool(request) and prompt_ids is None
        created = response.get("created") or response.get("created_at")
        batch = "custom_id" in value
        called(input_tokens, output_tokens)
        return Row(
            None if batch or created is None else epoch_ns("created", created),
            input_tokens,
            output_tokens,
            text=text,
            messages=messages,
            answer=_answer(response),
        )

    def notes(self) -> list[str]:
        """Prompts that cannot be sent as they are."""
        said = []
        if self._not_text:
            said.append(f"{self._not_text} prompts are more than text (images, tools): replayed by their lengths")
        if self._without_tools:
            said.append(
                f"{self._without_tools} requests define tools, which are not sent: their prompts are shorter than they "
                "were in production"
            )
        return said


def _shape(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(request body, response body) of any of the shapes; empty where there is none. Raises `FailedCallError`."""
    if value.get("error"):
        raise FailedCallError("failed call (error)")
    response = value.get("response")
    if isinstance(response, dict):
        if isinstance(response.get("status_code"), int) and response["status_code"] >= 400:
            raise FailedCallError(f"failed call (HTTP {response['status_code']})")
        response = response["body"] if isinstance(response.get("body"), dict) else response
        if response.get("error"):
            raise FailedCallError("failed call (error)")
    if isinstance(value.get("body"), dict):
        return value["body"], response if isinstance(response, dict) else {}
    if isinstance(response, dict):
        return value["request"] if isinstance(value.get("request"), dict) else {}, response
    return ({}, value) if value.get("object") in _OBJECTS else (value, {})


def _usage(response: dict[str, Any]) -> tuple[int | None, int | None]:
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return None, None
    return (
        token_count("prompt_tokens", usage.get("prompt_tokens", usage.get("input_tokens"))),
        token_count("completion_tokens", usage.get("completion_tokens", usage.get("output_tokens"))),
    )


def _prompt(request: dict[str, Any]) -> tuple[str | None, tuple[dict[str, str], ...] | None, int | None]:
    """(text, messages, number of token ids): at most one is set."""
    asked = next((request[name] for name in ("messages", "prompt", "input") if request.get(name) is not None), None)
    if isinstance(asked, str) and asked:
        return asked, None, None
    if isinstance(asked, list) and asked and all(type(i) is int for i in asked):
        return None, None, len(asked)
    return None, plain_messages(asked), None


def _answer(response: dict[str, Any]) -> str | None:
    choices = response.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    message = choices[0].get("message")
    answer = message.get("content") if isinstance(message, dict) else choices[0].get("text")
    return answer if isinstance(answer, str) else None
