"""The JSON that an OpenAI-compatible server sends, as far as facts are read from it; and the fields of an event.

Decoding is typed and partial (msgspec). Pure, no I/O.

Sources: WHATWG HTML section 9.2 (server-sent events), the OpenAI API reference, vLLM's ``entrypoints/openai`` protocol
(continuous usage, token_ids, error events).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeVar, get_args

import msgspec

BOM = b"\xef\xbb\xbf"
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are not the JSON asked for."""

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

Tokens = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class PromptDetails(msgspec.Struct, gc=False):
    """How the prompt was served; null where the server does not say."""

    cached_tokens: Tokens | None = None


class CompletionDetails(msgspec.Struct, gc=False):
    """What the output was spent on; null where the server does not say."""

    reasoning_tokens: Tokens | None = None


class Usage(msgspec.Struct, gc=False):
    """Token counts as the server made them; null where it does not say."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class Delta(msgspec.Struct, gc=False):
    """Output fields, of any type, since only whether they are empty matters; and the role, which is not output."""

    role: Any = None
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None

    def has_output(self) -> bool:
        """Whether any output field is set."""
        text = self.content or self.reasoning or self.reasoning_content
        return bool(text or self.tool_calls or self.refusal or self.function_call)

    def may_be_token(self) -> bool:
        """Whether it could be a token without text: empty content, and not the chunk that names the role."""
        return self.content is not None and self.role is None


class Choice(msgspec.Struct, gc=False):
    """One of the answers to a request: all that an event says of it."""

    index: Any = None
    text: Any = None
    delta: Delta | None = None
    message: Delta | None = None
    finish_reason: Any = None
    token_ids: Any = None
    logprobs: Any = None

    def index_at(self, place: int) -> int:
        """Which choice this is: its own index, or else its place among the choices of the event."""
        return self.index if type(self.index) is int else place


def logprobs_of(said: Any) -> list[float]:
    """Log-probabilities of the tokens of a choice, as chat (``content``) or completions (``token_logprobs``) say."""
    if not isinstance(said, dict):
        return []
    tokens = said.get("content") or said.get("token_logprobs")
    if not isinstance(tokens, list):
        return []
    found = (one.get("logprob") if isinstance(one, dict) else one for one in tokens)
    return [float(one) for one in found if isinstance(one, int | float) and math.isfinite(one)]


class Event(msgspec.Struct, gc=False):
    """One server-sent event, or a whole answer in one JSON body."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: Any = None
    message: Any = None


class _OddEvent(Event, gc=False):
    usage: Any = None


_decode_text = msgspec.json.Decoder(str).decode
_decode_texts = msgspec.json.Decoder(list[str]).decode
_decode_event = msgspec.json.Decoder(Event).decode
decode_events = msgspec.json.Decoder(list[Event]).decode
_decode_odd = msgspec.json.Decoder(_OddEvent).decode


def is_text(texts: list[bytes]) -> bool:
    """Whether each is the inside of a JSON string."""
    try:  # joined by spaces, so that half a character or escape is not completed by the next text
        _decode_text(b'"%b"' % b" ".join(texts))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


def decode_texts(texts: list[bytes]) -> list[str]:
    """The insides of JSON strings, decoded."""
    return _decode_texts(b'["%b"]' % b'","'.join(texts))


def decode_event(document: bytes, odd: dict[str, None]) -> Event:
    """One event. Counts that cannot be read are left out, and their names added to ``odd``: no answer is lost for them.

    Raises one of `UNDECODABLE`.
    """
    try:
        return _decode_event(document)
    except msgspec.ValidationError:
        event = _decode_odd(document)
        event.usage = readable(Usage, event.usage, odd, "usage")
        return event


def readable(kind: type[_Struct], value: object, odd: dict[str, None], name: str) -> _Struct | None:
    """``value`` as this kind of struct, without fields of the wrong type, whose names are added to ``odd``."""
    if value is None:
        return None
    if not isinstance(value, dict):
        odd[name] = None
        return None
    made = kind()
    for field in msgspec.structs.fields(kind):
        given, path = value.get(field.name), f"{name}.{field.name}"
        try:
            setattr(made, field.name, msgspec.convert(given, field.type))
        except msgspec.ValidationError:
            arms = (arm for arm in get_args(field.type) if isinstance(arm, type) and issubclass(arm, msgspec.Struct))
            inner = next(arms, None)
            if inner is None:
                odd[path] = None
            else:
                setattr(made, field.name, readable(inner, given, odd, path))
    return made


def largest(a: _Struct | None, b: _Struct | None) -> _Struct | None:
    """The larger of each count of two; null is less than any. ``a`` may be changed: some servers send it per token."""
    if a is None or b is None:
        return b if a is None else a
    for name in a.__struct_fields__:
        other = getattr(b, name)
        if other is None:
            continue
        one = getattr(a, name)
        if isinstance(other, msgspec.Struct):
            setattr(a, name, largest(one, other))
        elif one is None or other > one:
            setattr(a, name, other)
    return a


def fields(part: bytes) -> tuple[bytes, bytes]:
    """The data of an event, and its name."""
    data, name = [], b""
    for line in part.removeprefix(BOM).splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
    return b"\n".join(data).strip(), name


def message_of(event: Event) -> str:
    """The message of an error event."""
    for value in (event.error, event.message):
        if isinstance(value, dict):
            value = value.get("message") or value.get("type") or value.get("code")
        if value:
            return str(value)
    return "an error event without a message"


def message_in(body: bytes) -> str:
    """The message in an error body of OpenAI's or FastAPI's kind; else all of it."""
    try:
        document = msgspec.json.decode(body)
    except UNDECODABLE:
        return body.decode("utf-8", "replace")
    if isinstance(document, dict):
        for value in (document.get("error"), document.get("message"), document.get("detail")):
            if isinstance(value, dict):
                value = value.get("message") or value
            if value:
                return str(value)
    return body.decode("utf-8", "replace")
