"""Chat logs: whole conversations, one JSON object each (ShareGPT, LMSYS, WildChat, fine-tuning files).

``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``, ``{"conversation": [{"role",
"content"}]}`` or ``{"messages": [{"role", "content"}]}`` that ends with an answer. Each answer was a request of its
own: its messages are all that went before it, its session the conversation, its turn the count of answers before. A
question at the end that nobody answered is a request too. A function call is an answer (``from: function_call``,
``tool_calls``), what the function gave back (``observation``, ``tool``) a message: both are sent as their text.
Definitions of tools, images, sound and video are not sent, and a note says of how many requests that is true.

There are no times per request (where the log has one for the conversation, it says nothing about the turns) and no
token counts: ``--tokenizer`` on the trace verbs counts prompts and answers.

Source: the ShareGPT, LMSYS-Chat-1M and WildChat data cards; OpenAI's fine-tuning format.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from harness.trace.formats.jsonl import answered
from harness.trace.formats.record import FailedCallError, LeftOutError, Reader, RowError, Rows, TraceRecord
from harness.trace.formats.values import decode_object, fields_of, show

_TURNS = ("conversations", "conversation", "messages")
_IDS = ("id", "conversation_id", "conversation_hash", "session_id")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "system", "tool": "tool",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool", "ipython": "tool",
    "function_response": "tool", "tool_response": "tool", "tool_call": "assistant",
}  # fmt: skip
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_MARKS = ("<image>", "<video>", "<audio>", "<image_placeholder>")


class Chat(Reader):
    """Reader of chat logs."""

    summary = "chat log (JSON or JSON Lines: ShareGPT conversations, LMSYS, WildChat, messages ending with an answer)"
    clock = "none: a conversation has no time for each request"
    sends_text = True

    def __init__(self) -> None:
        self._conversations = self._media = self._tools = 0

    @staticmethod
    def sniff(record: bytes) -> bool:
        """A list of turns, and nothing that another format has."""
        fields = fields_of(record)
        if any(fields.get(name, b"").startswith(b"[") for name in _TURNS[:2]):
            return True
        others = {"input_tokens", "output_tokens", "arrival_s", "custom_id", "usage", "startTime", "answer"}
        return "messages" in fields and not fields.keys() & others and answered(fields["messages"])

    def parse(self, record: bytes) -> Rows:
        """Read one conversation."""
        value = decode_object(record)
        turns = next((value[name] for name in _TURNS if isinstance(value.get(name), list)), None)
        if turns is None:
            raise RowError("no conversation", f"no list {' or '.join(_TURNS)} in {show(record)}")
        self._conversations += 1
        named = next((str(value[name]) for name in _IDS if isinstance(value.get(name), str | int)), "")
        session = named or f"conversation-{self._conversations}"
        said = [_message(turn) for turn in turns]
        files = any(value.get(name) for name in _MEDIA)
        defined = any(value.get(name) not in (None, "", "[]", []) for name in ("tools", "functions"))
        rows: list[TraceRecord | LeftOutError] = []
        for at, turn in enumerate([*said, None]):
            if at and (turn is None or turn.message["role"] == "assistant"):
                before = said[:at]
                if turn is None and before[-1].message["role"] == "assistant":
                    break
                row = TraceRecord(
                    None, None, None, session, len(rows), messages=tuple(each.message for each in before),
                    answer=None if turn is None else turn.message["content"],
                )  # fmt: skip
                if turn is not None and not turn.message["content"]:
                    rows.append(FailedCallError("empty answer (failed call)"))
                    continue
                rows.append(row)
                self._media += any(each.media for each in before) or files
                self._tools += defined or any(each.calls for each in before)
        return rows

    def notes(self) -> list[str]:
        """What of the prompts is not sent, or not as it was."""
        said = []
        if self._media:
            said.append(
                f"{self._media} requests had images, sound or video, which are not sent: their prompts are shorter "
                "than they were in production"
            )
        if self._tools:
            said.append(
                f"{self._tools} requests had tools: calls and results are sent as their text, definitions are not sent"
            )
        return said


class _Said(NamedTuple):
    """One turn."""

    message: dict[str, str]
    media: bool
    """It had an image, sound or video."""
    calls: bool
    """It is a function call, or what came of one."""


def _message(turn: Any) -> _Said:
    if not isinstance(turn, dict):
        raise RowError("bad turn", "a turn of the conversation is not an object")
    speaker = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    made = turn.get("tool_calls") or turn.get("function_call")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    text, media = _text(content)
    if text is None and not made:
        raise RowError("not text", "a turn of the conversation is neither text nor a call of a tool")
    if role is None:
        raise RowError("unknown speaker", f"a turn is from {show(str(speaker))}, expected {', '.join(sorted(_ROLES))}")
    if made:
        text = (text or "") + msgspec.json.encode(made).decode()
    calls = bool(made) or role == "tool" or speaker in ("function_call", "tool_call")
    return _Said({"role": role, "content": text or ""}, media, calls)


def _text(content: Any) -> tuple[str | None, bool]:
    """The text of a turn, and whether it had something that is none."""
    if isinstance(content, str):
        return content, any(mark in content for mark in _MARKS)
    if not isinstance(content, list) or not all(isinstance(part, dict | str) for part in content):
        return None, False
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    known = [text for text in texts if isinstance(text, str)]
    return "".join(known), len(known) < len(texts)
