"""What the events of an OpenAI-compatible server mean: chunks that carry output, usage, errors, the end.

Decoding is typed and partial (msgspec): only fields that become facts are read. Pure, no I/O.

Sources: WHATWG HTML section 9.2 (server-sent events), the OpenAI API reference, vLLM's ``entrypoints/openai`` protocol
(continuous usage, token_ids, error events).
"""

from __future__ import annotations

from array import array
from itertools import compress
from typing import Annotated, Any, TypeVar, get_args

import msgspec

_LINES = 50_000
"""Of one event; each is looked at in Python, while nothing is read."""
BOM = b"\xef\xbb\xbf"

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


class _Delta(msgspec.Struct, gc=False):
    """Output fields, of any type: what matters is whether they are empty. And the role, which no token is."""

    role: Any = None
    content: Any = None
    reasoning: Any = None
    reasoning_content: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None

    def has_output(self) -> bool:
        return bool(
            self.content
            or self.reasoning
            or self.reasoning_content
            or self.tool_calls
            or self.refusal
            or self.function_call
        )

    def may_be_token(self) -> bool:
        """Whether it is like a token without text: empty content, and not the chunk that names the role."""
        return self.content is not None and self.role is None


class _Choice(msgspec.Struct, gc=False):
    index: Any = None
    text: Any = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: Any = None
    token_ids: Any = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    object: Any = None
    message: Any = None


class _OddEvent(_Event, gc=False):
    usage: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode
_decode_events = msgspec.json.Decoder(list[_Event]).decode
_decode_odd = msgspec.json.Decoder(_OddEvent).decode


class Answer:
    """What a server said in one answer: its text, event by event, and its token ids where it gives them.

    Reasoning is apart: clients do not send it back.
    """

    __slots__ = ("blanks", "other", "parts", "reasoning", "token_ids")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.reasoning: list[str] = []
        self.token_ids: list[int] = []
        self.blanks = 0
        """Events that may be a token without text."""
        self.other = False
        """Something was said that is no text."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts)

    def take(self, choice: _Choice) -> None:
        """Take what one choice of an event says."""
        delta = choice.delta or choice.message
        text = choice.text if delta is None else delta.content
        if isinstance(text, str) and text:
            self.parts.append(text)
        elif text is not None and (delta is None or delta.may_be_token()):
            self.blanks += 1
        if delta is not None:
            thought = delta.reasoning_content or delta.reasoning
            if isinstance(thought, str) and thought:
                self.reasoning.append(thought)
            self.other |= bool(delta.tool_calls or delta.function_call or delta.refusal)
        if isinstance(choice.token_ids, list):
            self.token_ids += [i for i in choice.token_ids if isinstance(i, int)]


def readable(kind: type[_Struct], value: object, odd: dict[str, None], name: str) -> _Struct | None:
    """``value`` as this kind of struct, without the fields of it that cannot be; their names are added to ``odd``."""
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
    """The larger of each count of two; not said is less than any. ``a`` may be changed: some say it with each token."""
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


_NONE, _POSSIBLE, _CERTAIN = range(3)
_UNSAID = -1


class Completion:
    """What the events of one answer said so far.

    ``error`` is (class, detail) once something failed: nothing is taken after it. ``ended``: [DONE] was seen.
    """

    __slots__ = (
        "_certain", "_counted", "_stamps", "_tokens", "answer", "ended", "error", "finish_reason", "finished",
        "odd", "several", "usage",
    )  # fmt: skip

    def __init__(self) -> None:
        self.error: tuple[str, str] | None = None
        self.ended = False
        self.finish_reason: str | None = None
        self.finished = False
        """Whether a finish reason of any type was seen."""
        self.usage: Usage | None = None
        """The largest of each count that was seen: some servers send zeros before or after the real ones."""
        self.odd: dict[str, None] = {}
        """Fields that were left out since they are of no type that the API knows, in the order met."""
        self.several = False
        """Whether there were choices beside the first. Only the first is timed; usage counts all."""
        # One entry per event that may carry output: when, whether it surely does, and its tokens when the server said.
        # Arrays, because ten thousand streams may be open: 13 bytes for each event.
        self._stamps = array("q")
        self._certain = bytearray()
        self._tokens = array("i")
        self._counted = 0
        self.answer: Answer | None = None
        """Where to put what was said, when anyone wants to know."""

    @property
    def outputs(self) -> int:
        """How many events may carry output."""
        return len(self._stamps)

    @property
    def empty(self) -> bool:
        """True while no event said anything."""
        return not self._stamps and self.usage is None

    @property
    def said_nothing(self) -> bool:
        """True when nothing was put out, and no count says that anything was."""
        usage = None if self.usage is None else self.usage.completion_tokens
        return not (usage or self._counted or self._certain.count(_CERTAIN) or self.several)

    @property
    def blank(self) -> bool:
        """True while nothing was said that any fact is made of."""
        return self.open and self.empty and not self.finished and not self.odd and not self.several

    @property
    def open(self) -> bool:
        """True while events still count: no end and no failure was seen."""
        return not self.ended and self.error is None

    @property
    def is_plain(self) -> bool:
        """True when all that was said is one output of unsaid length."""
        return (
            self.open
            and not self.finished
            and not self.odd
            and not self.several
            and self.usage is None
            and self._certain == bytes([_CERTAIN])
            and self._tokens[0] == _UNSAID
        )

    def take_plain(self, stamps: array[int]) -> None:
        """Take events that are known to be plain (`scenarios.client.fast_path`)."""
        self._stamps.extend(stamps)
        self._certain += bytes([_CERTAIN]) * len(stamps)
        self._tokens.extend(array("i", [_UNSAID]) * len(stamps))

    def fail(self, error: str, detail: str) -> None:
        """Record a failure; the first one counts."""
        if self.error is None:
            self.error = (error, detail)

    def read_plain(self, text: bytes, times: list[int]) -> bool:
        """Take all events of ``text`` in one decode; False, and nothing taken, unless each is just ``data: {...}``."""
        done = text.endswith(b"data: [DONE]\n\n")
        end = len(text) - 16 if done else len(text) - 2
        if self.ended or end < 7 or not text.startswith(b"data: {"):
            return False
        try:
            events = _decode_events(b"[%b]" % text[6:end].replace(b"\n\ndata: ", b","))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if len(events) != len(times) - done:
            return False
        for event, stamp in zip(events, times, strict=False):
            self._take(event, stamp)
            if self.error is not None:
                return True
        self.ended = done
        return True

    def read_event(self, part: bytes, stamp: int, torn: str | None = None) -> None:
        """Take one event by the book: comments, several data lines, event names, any line end. Without data it says
        nothing, and one of another name than ours that is no JSON is for somebody else.

        ``torn`` is the error class when this is what was left at the end of a stream and turns out to be half an event.
        """
        if len(part) > _LINES and part.count(b"\n") + part.count(b"\r") > _LINES:
            self.fail("protocol", f"an event of more than {_LINES:,} lines")
            return
        document, name = _fields(part)
        if not document or self.error is not None:
            return
        if document == b"[DONE]":
            self.ended = True
            return
        try:
            event = self._decode(document)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            if self.ended or (torn is None and name not in (b"", b"message", b"error")):
                return
            if torn is not None:
                self.fail(torn, "the stream ended in the middle of an event")
            elif name == b"error":
                self.fail("server", message_in(document))
            else:
                self.fail("protocol", f"an event that is not a completion chunk ({e})")
            return
        if self.ended:  # some servers count after their [DONE]; nothing else can follow it
            self.usage = largest(self.usage, event.usage)
            return
        if name == b"error" and not event.error:
            event.error = message_in(document)
        self._take(event, stamp)

    def read_json(self, body: bytes, stamp: int) -> None:
        """Take a whole completion in one body: all its output arrived with the last byte."""
        try:
            event = self._decode(body.removeprefix(BOM))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            self.fail("protocol", f"a JSON body that is not a completion ({e})")
            return
        self._take(event, stamp)
        if not event.choices:
            self.fail("protocol", "a JSON body that is not a completion (no choices)")

    def _decode(self, document: bytes) -> _Event:
        """One event. Counts that cannot be read are left out and noted: no answer is lost for them."""
        try:
            return _decode_event(document)
        except msgspec.ValidationError:
            event = _decode_odd(document)
            event.usage = readable(Usage, event.usage, self.odd, "usage")
            return event

    def _take(self, event: _Event, stamp: int) -> None:
        if event.error or event.object == "error":
            self.fail("server", _message_of(event))
            return
        usage = event.usage
        if usage is not None:
            self.usage = largest(self.usage, usage)
        choices = event.choices
        if not choices:
            return
        choice = self._first(choices)
        if choice is None:
            return
        if self.answer is not None:
            self.answer.take(choice)
        output, counted = _NONE, None
        if choice.finish_reason:
            self._finish(choice.finish_reason)
        delta = choice.delta or choice.message
        if choice.text or (delta is not None and delta.has_output()):
            output = _CERTAIN
        elif choice.text is not None or (delta is not None and delta.may_be_token()):
            output = _POSSIBLE
        if isinstance(choice.token_ids, list):
            counted = len(choice.token_ids)
        if counted is None and usage is not None and usage.completion_tokens is not None:
            counted = max(usage.completion_tokens - self._counted, 0)
        self._counted += counted or 0
        if output != _NONE or counted:
            self._stamps.append(stamp)
            self._certain.append(output)
            self._tokens.append(_UNSAID if counted is None else counted)

    def _first(self, choices: list[_Choice]) -> _Choice | None:
        """The choice that is timed, if it is among these."""
        first: _Choice | None = choices[0]
        if len(choices) > 1 or choices[0].index:
            first = next((one for place, one in enumerate(choices) if _index(one, place) == 0), None)
            self.several |= len(choices) > 1 or first is None
            if self.answer is not None:
                self.answer.other |= self.several
        return first

    def _finish(self, reason: object) -> None:
        self.finished = True
        if isinstance(reason, str):
            self.finish_reason = reason[:64]
        else:
            self.odd["finish_reason"] = None

    def chunks(self) -> tuple[array[int], array[int] | None]:
        """Stamps of the chunks that carry output, and the tokens in each when those are known, never guessed.

        An empty text may be a token whose character is not whole yet, a special one, or no token at all: only the
        server's own count decides.
        """
        if self.several:
            return self._at_least(_CERTAIN), None
        total = self.usage.completion_tokens if self.usage is not None else None
        if self._counts_agree(total):
            return array("q", compress(self._stamps, self._tokens)), array("i", filter(None, self._tokens))
        certain = self._at_least(_CERTAIN)
        if total is not None and len(certain) != total:
            possible = self._at_least(_POSSIBLE)
            if len(possible) == total:
                return possible, _ones(total)
        return certain, _ones(total) if len(certain) == total else None

    def _at_least(self, least: int) -> array[int]:
        """Stamps of the events that carry output for certain, or possibly."""
        if sum(map(self._certain.count, range(least, _CERTAIN + 1))) == len(self._certain):
            return self._stamps
        return array("q", compress(self._stamps, (certain >= least for certain in self._certain)))

    def _counts_agree(self, total: int | None) -> bool:
        """Whether the server gave a count for every event, and they agree with what was seen."""
        tokens = self._tokens
        if not tokens or _UNSAID in tokens or (total is not None and sum(tokens) != total):
            return False
        return not any(not n and c == _CERTAIN for n, c in zip(tokens, self._certain, strict=True))


def _index(choice: _Choice, place: int) -> int:
    """Which choice this is: as it says, else by its place."""
    return choice.index if type(choice.index) is int else place


def _fields(part: bytes) -> tuple[bytes, bytes]:
    """The data of an event, and its name."""
    data, name = [], b""
    for line in part.removeprefix(BOM).splitlines():
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.strip()
    return b"\n".join(data).strip(), name


def _ones(n: int) -> array[int]:
    return array("i", [1]) * n


def _message_of(event: _Event) -> str:
    for value in (event.error, event.message):
        if isinstance(value, dict):
            value = value.get("message") or value.get("type") or value.get("code")
        if value:
            return str(value)
    return "an error event without a message"


def message_in(body: bytes) -> str:
    """The human part of an error body: OpenAI, FastAPI or plain."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode("utf-8", "replace")
    if isinstance(document, dict):
        for value in (document.get("error"), document.get("message"), document.get("detail")):
            if isinstance(value, dict):
                value = value.get("message") or value
            if value:
                return str(value)
    return body.decode("utf-8", "replace")
