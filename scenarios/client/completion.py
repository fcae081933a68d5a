"""What the events of one answer add up to: chunks that carry output, usage, errors, the end; and its row. Pure.

No I/O and no clock.
"""

from __future__ import annotations

from array import array
from itertools import compress

from harness.record.results import Result
from harness.scenarios.client.events import (
    BOM,
    UNDECODABLE,
    Choice,
    CompletionDetails,
    Event,
    PromptDetails,
    Usage,
    decode_event,
    decode_events,
    fields,
    largest,
    logprobs_of,
    message_in,
    message_of,
)

DETAIL_LIMIT = 300
Secret = str | tuple[str, ...] | None
"""The API key, and the values of other secret headers."""
_LINES = 50_000
"""Most lines of one event: they are parsed in Python, and nothing is read meanwhile."""
_NONE, _POSSIBLE, _CERTAIN = range(3)  # whether an event carries output
_UNSAID = -1
_STATUS_ERRORS = {401: "auth", 403: "auth", 404: "not_found", 429: "overloaded", 503: "overloaded"}


class StreamedAnswer:
    """The text of one answer, event by event, and its token ids where the server sends them.

    Reasoning is kept apart: clients do not send it back.
    """

    __slots__ = ("blanks", "logprobs", "other", "parts", "reasoning", "token_ids")

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.reasoning: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.blanks = 0
        """Events that may be a token without text."""
        self.other = False
        """Whether there was output that is not text."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)

    def take(self, choice: Choice) -> None:
        """Add what one choice of an event holds."""
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
        if choice.logprobs:
            self.logprobs += logprobs_of(choice.logprobs)


class Completion:
    """The state of one answer after the events so far; ``answer`` collects its text, unless it is null.

    ``error`` is (class, detail) once something failed; later events are ignored. ``ended``: [DONE] was seen.
    """

    __slots__ = (
        "_certain", "_counted", "_stamps", "_tokens", "answer", "ended", "error", "finish_reason", "finished",
        "odd", "several", "usage",
    )  # fmt: skip

    def __init__(self, answer: StreamedAnswer | None = None) -> None:
        self.answer = answer
        self.error: tuple[str, str] | None = None
        self.ended = False
        self.finish_reason: str | None = None
        self.finished = False
        """Whether a finish reason of any type was seen."""
        self.usage: Usage | None = None
        """The largest value of each count: some servers send zeros before or after the real ones."""
        self.odd: dict[str, None] = {}
        """Fields that were ignored because their type is not the API's, in the order met."""
        self.several = False
        """Whether there was more than one choice. Only the first is timed; usage counts all."""
        # One entry per event that may carry output: its time, whether it certainly does, and its tokens if the server
        # gave them. Arrays, because ten thousand streams may be open: 13 bytes per event.
        self._stamps = array("q")
        self._certain = bytearray()
        self._tokens = array("i")
        self._counted = 0

    @property
    def outputs(self) -> int:
        """Number of events that may carry output."""
        return len(self._stamps)

    @property
    def empty(self) -> bool:
        """True while there was neither output nor usage."""
        return not self._stamps and self.usage is None

    @property
    def said_nothing(self) -> bool:
        """True when there was no output, and no count claims any."""
        usage = None if self.usage is None else self.usage.completion_tokens
        return not (usage or self._counted or self._certain.count(_CERTAIN) or self.several)

    @property
    def open(self) -> bool:
        """True until the end or a failure."""
        return not self.ended and self.error is None

    @property
    def ordinary(self) -> bool:
        """True while there was nothing but output and usage."""
        return self.open and not (self.finished or self.odd or self.several)

    @property
    def is_plain(self) -> bool:
        """True when there was exactly one event, with output and nothing else."""
        one = self._certain == bytes([_CERTAIN]) and self._tokens[0] == _UNSAID
        return one and self.ordinary and self.usage is None

    def take_plain(self, stamps: array[int]) -> None:
        """Add events that are known to be plain (`scenarios.client.fast_path`)."""
        self._stamps.extend(stamps)
        self._certain += bytes([_CERTAIN]) * len(stamps)
        self._tokens.extend(array("i", [_UNSAID]) * len(stamps))

    def fail(self, error: str, detail: str) -> None:
        """Record a failure; the first one counts."""
        if self.error is None:
            self.error = (error, detail)

    def read_plain(self, text: bytes, times: list[int]) -> bool:
        """Parse all events of ``text`` in one decode; False, and nothing added, unless each is just ``data: {...}``."""
        done = text.endswith(b"data: [DONE]\n\n")
        end = len(text) - 16 if done else len(text) - 2
        if self.ended or end < 7 or not text.startswith(b"data: {"):
            return False
        try:
            events = decode_events(b"[%b]" % text[6:end].replace(b"\n\ndata: ", b","))
        except UNDECODABLE:
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
        """Parse one event in full: comments, several data lines, event names, any line end. One without data is
        ignored, and so is one that is not JSON under a name that is not ours.

        ``torn``: the stream ended with these bytes; the error class if they turn out to be half an event.
        """
        if len(part) > _LINES and part.count(b"\n") + part.count(b"\r") > _LINES:
            self.fail("protocol", f"an event of more than {_LINES:,} lines")
            return
        document, name = fields(part)
        if not document or self.error is not None:
            return
        if document == b"[DONE]":
            self.ended = True
            return
        try:
            event = decode_event(document, self.odd)
        except UNDECODABLE as e:
            if self.ended or (torn is None and name not in (b"", b"message", b"error")):
                return
            if torn is not None:
                self.fail(torn, "the stream ended in the middle of an event")
            elif name == b"error":
                self.fail("server", message_in(document))
            else:
                self.fail("protocol", f"an event that is not a completion chunk ({e})")
            return
        if self.ended:  # some servers send usage after [DONE]; nothing else can follow it
            self.usage = largest(self.usage, event.usage)
            return
        if name == b"error" and not event.error:
            event.error = message_in(document)
        self._take(event, stamp)

    def read_json(self, body: bytes, stamp: int) -> None:
        """Parse a whole completion in one body: all its output arrived with the last byte."""
        try:
            event = decode_event(body.removeprefix(BOM), self.odd)
        except UNDECODABLE as e:
            self.fail("protocol", f"a JSON body that is not a completion ({e})")
            return
        self._take(event, stamp)
        if not event.choices:
            self.fail("protocol", "a JSON body that is not a completion (no choices)")

    def _take(self, event: Event, stamp: int) -> None:
        if event.error or event.object == "error":
            self.fail("server", message_of(event))
            return
        usage = event.usage
        if usage is not None:
            self.usage = largest(self.usage, usage)
        choice = self._first(event.choices) if event.choices else None
        if choice is None:
            return
        if self.answer is not None:
            self.answer.take(choice)
        if choice.finish_reason:
            self.finished = True
            if isinstance(choice.finish_reason, str):
                self.finish_reason = choice.finish_reason[:64]
            else:
                self.odd["finish_reason"] = None
        output, counted = _NONE, None
        delta = choice.delta or choice.message
        if choice.text or (delta is not None and delta.has_output()):
            output = _CERTAIN
        elif choice.text is not None or (delta is not None and delta.may_be_token()):
            output = _POSSIBLE
        if isinstance(choice.token_ids, list):
            counted = len(choice.token_ids)
        elif usage is not None and usage.completion_tokens is not None:
            counted = max(usage.completion_tokens - self._counted, 0)
        self._counted += counted or 0
        if output != _NONE or counted:
            self._stamps.append(stamp)
            self._certain.append(output)
            self._tokens.append(_UNSAID if counted is None else counted)

    def _first(self, choices: list[Choice]) -> Choice | None:
        """The choice that is timed, if this event has it."""
        first: Choice | None = choices[0]
        if len(choices) > 1 or choices[0].index:
            first = next((one for place, one in enumerate(choices) if one.index_at(place) == 0), None)
            self.several |= len(choices) > 1 or first is None
            if self.answer is not None:
                self.answer.other |= self.several
        return first

    def chunks(self) -> tuple[array[int], array[int] | None]:
        """Stamps of the chunks that carry output, and the tokens in each; null when they are not known.

        An empty text may be part of a character, a special token, or no token at all: only the server's own count
        decides.
        """
        certain = self._at_least(_CERTAIN)
        if self.several:
            return certain, None
        total = self.usage.completion_tokens if self.usage is not None else None
        if self._counts_agree(total):
            return array("q", compress(self._stamps, self._tokens)), array("i", filter(None, self._tokens))
        for stamps in (certain, self._at_least(_POSSIBLE)):
            if len(stamps) == total:
                return stamps, array("i", [1]) * total
        return certain, None

    def _at_least(self, least: int) -> array[int]:
        """Stamps of the events that carry output: certainly, or at least possibly."""
        if sum(map(self._certain.count, range(least, _CERTAIN + 1))) == len(self._certain):
            return self._stamps
        return array("q", compress(self._stamps, (certain >= least for certain in self._certain)))

    def _counts_agree(self, total: int | None) -> bool:
        """Whether the server counted every event, consistently with the output seen."""
        tokens = self._tokens
        if not tokens or _UNSAID in tokens or (total is not None and sum(tokens) != total):
            return False
        return not any(not n and c == _CERTAIN for n, c in zip(tokens, self._certain, strict=True))


def fill(
    result: Result, completion: Completion, *, status: int | None, done: bool, body: bytes, location: str,
    secret: Secret,
) -> Result:  # fmt: skip
    """Put what an answer with these events and this ``status`` amounts to into a row, which is returned.

    ``chunk_ns`` are stamps as they were fed; ``chunk_tokens`` is null unless the tokens of every chunk are known.
    ``body`` and ``location`` tell why, where the status is not 200; ``secret`` is cut out of every detail.
    """
    usage = completion.usage or Usage()
    result.chunk_ns, result.chunk_tokens = completion.chunks()
    result.input_tokens = usage.prompt_tokens
    result.cached_tokens = (usage.prompt_tokens_details or PromptDetails()).cached_tokens
    if not completion.several:
        result.output_tokens = usage.completion_tokens
        result.reasoning_tokens = (usage.completion_tokens_details or CompletionDetails()).reasoning_tokens
    result.finish_reason, result.http_status = completion.finish_reason, status
    result.error, detail = _judge(completion, status, done, body, location)
    result.detail = clean(detail, secret) or None
    return result


def _judge(
    completion: Completion, status: int | None, done: bool, body: bytes, location: str
) -> tuple[str | None, str]:
    """The error class (null: a success, only if it was one) and the detail: of a success, what became no figure."""
    if status is not None and status != 200:
        said = f"HTTP {status}"
        if 300 <= status < 400 and location:
            return "redirect", f"{said} to {location}"
        by_hundreds = {3: "redirect", 4: "rejected", 5: "server"}.get(status // 100, "protocol")
        message = message_in(body)
        return _STATUS_ERRORS.get(status, by_hundreds), f"{said}: {message}" if message else said
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
    left_out = []
    if completion.several:
        left_out.append("several choices: choices[0] alone is timed; usage counts all, so output_tokens is null")
    if completion.odd:
        left_out.append(f"left out, as of no type that can be read: {', '.join(completion.odd)}")
    return None, "; ".join(left_out)


def clean(text: str, secret: Secret = None) -> str:
    """One printable line of at most 300 characters, without ``secret``."""
    for one in (secret,) if isinstance(secret, str) else secret or ():
        text = text.replace(one, "[api key]") if one else text
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * DETAIL_LIMIT]).split())
    return text if len(text) <= DETAIL_LIMIT else text[: DETAIL_LIMIT - 3] + "..."
