"""Chat logs: whole conversations, one JSON object each (ShareGPT, LMSYS, WildChat, fine-tuning files).

``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}]}``, ``{"conversation": [{"role",
"content"}]}`` or ``{"messages": [{"role", "content"}]}`` that ends with an answer. Each answer was a request of its
own: its messages are all that went before it, its session the conversation, its turn the count of answers before. A
question at the end that nobody answered is a request too.

There are no times per request (where the log has one for the conversation, it says nothing about the turns) and no
token counts: ``--tokenizer`` on the trace verbs counts prompts and answers.

Source: the ShareGPT, LMSYS-Chat-1M and WildChat data cards; OpenAI's fine-tuning format.
"""

from __future__ import annotations

from typing import Any

from harness.formats.jsonl import answered
from harness.formats.row import FailedCallError, LeftOutError, Reader, Row, RowError, Rows
from harness.formats.values import decode_object, fields_of, show

_TURNS = ("conversations", "conversation", "messages")
_IDS = ("id", "conversation_id", "conversation_hash", "session_id")
_ROLES = {
    "human": "user", "user": "user", "system": "system", "developer": "system", "tool": "tool",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant", "bing": "assistant",
    "bard": "assistant",
}  # fmt: skip


class Chat(Reader):
    """Reader of chat logs."""

    summary = "chat log (JSON or JSON Lines: ShareGPT conversations, LMSYS, WildChat, messages ending with an answer)"
    clock = "none: a conversation has no time for each request"

    def __init__(self) -> None:
        self._conversations = 0

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
        rows: list[Row | LeftOutError] = []
        for at, message in enumerate(said):
            if message["role"] == "assistant" and at:
                row = Row(None, None, None, session, len(rows), messages=tuple(said[:at]), answer=message["content"])
                rows.append(row if message["content"] else FailedCallError("empty answer (failed call)"))
        if said and said[-1]["role"] != "assistant":
            rows.append(Row(None, None, None, session, len(rows), messages=tuple(said)))
        return rows


def _message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise RowError("bad turn", "a turn of the conversation is not an object")
    speaker = turn.get("from", turn.get("role"))
    content = turn.get("value", turn.get("content"))
    if not isinstance(content, str):
        raise RowError("not text", "a turn of the conversation is not text (an image or a tool call)")
    role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowError("unknown speaker", f"a turn is from {show(str(speaker))}, expected {', '.join(sorted(_ROLES))}")
    return {"role": role, "content": content}
