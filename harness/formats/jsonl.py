"""Our own trace format: JSON Lines, one request per line.

=================  ===================================================================================================
``arrival_s``      number, seconds on any clock (the first row becomes zero). Never decreasing. On all rows or on none.
                   Numbers are 64-bit floats: seconds since 1970 keep a quarter of a microsecond
``prompt``         string, the prompt as text, sent as it is
``messages``       chat messages ``[{"role": ..., "content": ...}, ...]``, contents are strings
``input_tokens``   integer, prompt length. A prompt of exactly this length is made when there is no text
``output_tokens``  integer, length of the answer, forced on the server. Left out: the server decides, unless a maximum
                   is set when the plan is made
``session_id``     string; requests of one conversation share it and stay on one load worker
``turn``           integer from 0, place in the session; needs ``session_id``
``prefix_ids``     integers, one per block of ``block_tokens`` input tokens, the last block may be partial; requests
                   whose leading ids are equal share those tokens. Needs ``input_tokens`` and ``block_tokens``
``block_tokens``   integer, tokens per id in ``prefix_ids``
=================  ===================================================================================================

A row needs one of ``prompt``, ``messages`` and ``input_tokens``; ``prompt`` and ``messages`` exclude each other.
``null`` means not given. Unknown fields are refused: a misspelt field must not be silently ignored. A row with zero
input or output tokens records a failed call: it is counted, not replayed. Lines are UTF-8, at most 16 MiB; blank lines
are skipped; gzip is read as it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

import msgspec

from harness.formats.row import MAX_ARRIVAL_S, MAX_TOKENS, FailedCallError, Row, RowError

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: _Text
    content: str


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    arrival_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_ARRIVAL_S)] | None = None
    prompt: _Text | None = None
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)] | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    session_id: _Text | None = None
    turn: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    prefix_ids: tuple[Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)], ...] | None = None
    block_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None = None


FIELDS = _Line.__struct_fields__
DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises for bytes that are not what was asked for; RecursionError is JSON nested too deep."""

_TELLING = {"prompt", "messages", "input_tokens", "output_tokens", "arrival_s", "prefix_ids", "block_tokens"}
_decode = msgspec.json.Decoder(_Line).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Jsonl:
    """Reader of our own JSON Lines."""

    summary = "our JSON Lines: arrival_s, prompt or messages or input_tokens, output_tokens, session_id, prefix_ids ..."
    has_header = False

    @staticmethod
    def sniff(line: bytes) -> bool:
        """An object with at least one field that is only ours; a misspelt one beside it is then reported by name."""
        return bool(fields_of(line).keys() & _TELLING)

    def header(self, line: bytes) -> None:
        """There is none."""

    def parse(self, line: bytes) -> Row:
        """Read one line."""
        try:
            row = _decode(line)
        except DECODE_ERRORS as e:
            raise decode_error(e, line, FIELDS) from None
        if problem := _contradiction(row):
            raise RowError("bad fields", problem)
        if row.input_tokens == 0 or row.output_tokens == 0:
            raise FailedCallError
        return Row(
            None if row.arrival_s is None else round(row.arrival_s * 1e9),
            row.input_tokens,
            row.output_tokens,
            row.session_id,
            row.turn,
            row.prefix_ids,
            row.block_tokens,
            row.prompt,
            None if row.messages is None else tuple({"role": m.role, "content": m.content} for m in row.messages),
        )

    def notes(self) -> list[str]:
        """None."""
        return []


def _contradiction(row: _Line) -> str | None:
    """What is wrong with fields that are each right alone."""
    has_text = row.prompt is not None or row.messages is not None
    if row.prompt is not None and row.messages is not None:
        return "prompt and messages exclude each other: give one"
    if not has_text and row.input_tokens is None:
        return "no prompt, messages or input_tokens: nothing to send"
    if row.turn is not None and row.session_id is None:
        return "turn without session_id: a turn is a place in a session"
    if row.prefix_ids is None:
        return None if row.block_tokens is None else "block_tokens without prefix_ids"
    if has_text:
        return "prefix_ids beside prompt or messages: a text is its own prefix"
    if row.block_tokens is None or row.input_tokens is None:
        return "prefix_ids need block_tokens and input_tokens"
    expected = -(-row.input_tokens // row.block_tokens)
    if len(row.prefix_ids) != expected:
        return (
            f"{len(row.prefix_ids)} prefix_ids for {row.input_tokens} input_tokens in blocks of {row.block_tokens}, "
            f"expected {expected} (the last block may be partial)"
        )
    return None


def fields_of(line: bytes) -> dict[str, bytes]:
    """Field name -> its JSON of a line that is a JSON object; empty when it is not one."""
    try:
        return {name: bytes(raw) for name, raw in _decode_fields(line).items()}
    except DECODE_ERRORS:
        return {}


def decode_error(error: Exception, line: bytes, fields: Iterable[str]) -> RowError:
    """A `RowError` that says in plain words why a line could not be decoded, with the nearest valid field name."""
    if b"\0" in line:
        return RowError("NUL bytes", "holds NUL bytes: the file is damaged or not text")
    if isinstance(error, UnicodeDecodeError):
        return RowError("not UTF-8", f"not UTF-8 ({error.reason}): convert the file, for example with iconv")
    if not isinstance(error, msgspec.ValidationError):
        return RowError(
            "not JSON", f"not a JSON object on one line ({error}): {line[:60].decode('utf-8', 'replace')!r}"
        )
    problem = str(error)
    unknown = re.search(r"unknown field `(.*?)`", problem)
    if unknown and " - at " not in problem:
        near = difflib.get_close_matches(unknown[1], fields, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(sorted(fields))}"
        return RowError("unknown field", f"unknown field {unknown[1]!r}: {hint}")
    return RowError("bad fields", problem.replace("`", "").replace("$.", "").replace(" - at ", " at "))
