"""Any table of requests: CSV, JSON (Lines), Parquet or Arrow with a time and token counts, by whatever names.

Columns are found by common names, or named by the user (``--map``, in JSON with dots into objects). Needed are the
input tokens (or, where nothing counts them, the prompt) and one of the time and the output tokens. What is not replayed
is said in a note.

What the times are is found from the first rows (`harness.trace.formats.values.Clock`) or said by ``--time-unit``. The
kind found holds for the whole trace: a row of another kind is refused, but dates and numbers since 1970 may mix. With
Anthropic's columns beside ``input_tokens`` (``cache_read_input_tokens``, ``cache_creation_input_tokens``) these are
added. A table is what is in no other format: every other reader is asked first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain, islice
from typing import Any, ClassVar

from harness.errors import TraceError, UsageError, unknown_name
from harness.trace.formats import columnar
from harness.trace.formats.record import (
    MAX_TOKENS,
    ROLES,
    Item,
    LeftOutError,
    Object,
    Place,
    Reader,
    Role,
    RowError,
    TableOptions,
    TraceRecord,
    attempt,
    decode_object,
    decoded,
    fields_of,
    find,
    safe,
    show,
)
from harness.trace.formats.values import (
    Clock,
    Columns,
    TokenCounts,
    header_of,
    plain_messages,
    token_count,
    unit_of,
    usage_of,
)
from harness.trace.source import TraceFile

_LOOKED_AT = 1000
_BESIDE = ("cache_read_input_tokens", "cache_creation_input_tokens")
_UNREAD = (RowError, LeftOutError)
_MISSING = frozenset({"", "nan", "null", "none", "na", "n/a", "-", "<na>", "nat"})

# --- columns ---------------------------------------------------------------------------------------------------------

_COMMON: dict[Role, str] = {
    "arrival": "arrival arrival_time arrivals arrived_at arrival_timestamp arrived timestamp time_stamp ts "
    "request_time request_timestamp requested_at request_start request_received received_at received "
    "request_start_time start_time start_timestamp started_at start created_at created submitted_at "
    "sent_at event_time event_timestamp date_time datetime time epoch epoch_time epoch_timestamp timestamp_epoch "
    "time_epoch arrival_epoch unix_time unix_timestamp unix_epoch unix timestamp_unix time_unix arrival_unix "
    "start_time_unix event_time_unix request_time_unix t",
    "input": "input_tokens prompt_tokens input_length prompt_length input_len prompt_len num_prompt_tokens "
    "num_input_tokens num_prefill_tokens prefill_tokens n_prompt_tokens n_input_tokens nb_input_tokens context_tokens "
    "request_tokens query_tokens prompt_token_count input_token_count prompt_tokens_count input_tokens_count "
    "tokens_prompt tokens_input tokens_in input_toks prompt_toks prompt_num_tokens input_num_tokens isl "
    "input_sequence_length total_prompt_tokens total_input_tokens llm_token_count_prompt gen_ai_usage_input_tokens "
    "gen_ai_usage_prompt_tokens tokens_per_prompt promptlen",
    "output": "output_tokens completion_tokens generated_tokens generation_tokens response_tokens output_length "
    "completion_length response_length generation_length output_len completion_len response_len num_output_tokens "
    "num_completion_tokens num_generated_tokens num_generation_tokens num_decode_tokens decode_tokens n_output_tokens "
    "n_completion_tokens n_generated_tokens nb_output_tokens answer_tokens completion_token_count output_token_count "
    "completion_tokens_count output_tokens_count generated_token_count tokens_completion tokens_output tokens_out "
    "tokens_generated output_toks completion_toks output_num_tokens completion_num_tokens osl output_sequence_length "
    "total_completion_tokens total_output_tokens llm_token_count_completion gen_ai_usage_output_tokens "
    "gen_ai_usage_completion_tokens",
    "session": "session_id session conversation_id conversation thread_id chat_session_id chat_session dialog_id",
    "model": "model model_name response_model request_model served_model llm_model_name deployment_name model_id",
    "cached": "cached_tokens cached_input_tokens cached_prompt_tokens prompt_cached_tokens input_cached_tokens "
    "cache_hit_tokens num_cached_tokens cache_read_tokens",
    "prompt": "prompt messages prompt_text text_input input_text",
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_RANKS: dict[str, tuple[int, Role]] = {
    _plain(name): (rank, role) for role, names in _COMMON.items() for rank, name in enumerate(names.split())
}
"""Name without case and marks -> (how early it is taken of several, what it is)."""


def _ranked(name: str) -> tuple[int, Role] | None:
    name = name.removeprefix("usage.")
    found = _RANKS.get(_plain(name))
    if found is None:
        bare, unit = unit_of(name)
        timed = _RANKS.get(_plain(bare)) if unit else None
        found = timed if timed is not None and timed[1] == "arrival" else None
    return found


def role_of(name: str) -> Role | None:
    """What a column of this name is; None: nothing known."""
    found = _ranked(name)
    return None if found is None else found[1]


def recognised(names: Iterable[str]) -> dict[Role, str]:
    """Role -> the column for it; of several the one whose name says it best. A prompt only where nothing counts it."""
    best: dict[Role, tuple[int, int, str]] = {}
    for at, name in enumerate(names):
        if found := _ranked(name):
            rank, role = found
            best[role] = min(best.get(role, (rank, at, name)), (rank, at, name))
    return {role: best[role][2] for role in ROLES if role in best and (role != "prompt" or "input" not in best)}


def is_table(found: Mapping[Role, str]) -> bool:
    """Whether these columns are enough to replay: a prompt or its length, and a time or a length of the answer."""
    return ("input" in found or "prompt" in found) and ("output" in found or "arrival" in found)


def parse_map(text: str) -> dict[Role, str]:
    """``arrival=ts,input=p,output=c`` as roles and columns. Raises `UsageError`."""
    found: dict[Role, str] = {}
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise UsageError(f"--map {text!r}: expected ROLE=COLUMN,..., with roles {', '.join(ROLES)}")
        if role not in ROLES:
            raise unknown_name("role", role, ROLES)
        if role in found:
            raise UsageError(f"--map {text!r}: {role} is named twice")
        found[role] = column
    return found


# --- rows ------------------------------------------------------------------------------------------------------------


class TableReader(Reader):
    """Reader of tables; of formats that are tables with names of their own, too."""

    summary = "any table (CSV, JSON Lines, Parquet) with a time and token counts: --map says which columns"
    quoted = True
    names: ClassVar[Mapping[Role, str]] = {}
    known: ClassVar[frozenset[str]] = frozenset()
    """Its columns that have no role, but are read."""
    block_tokens: ClassVar[int] = 0
    looked_at: ClassVar[int] = _LOOKED_AT

    def __init__(self) -> None:
        self._asked = TableOptions()
        self._columns = Columns()
        self._at: Mapping[Role, str] = {}
        self._others: dict[str, None] = {}
        self._last_names: Set[str] = frozenset()
        self._clock: Clock | None = None
        self._looked = False

    def ask(self, asked: TableOptions) -> None:
        """Columns and unit as the user names them. Raises `UsageError` for a format that has its own."""
        if self.names:
            super().ask(asked)
        self._asked = asked

    @classmethod
    def sniff(cls, record: bytes) -> bool:
        if cls.names:
            return set(cls.names.values()) <= set(header_of(record)[1])
        if record.lstrip()[:1] == b"{":
            fields = fields_of(record)
            return is_table(recognised([*fields, *(f"usage.{name}" for name in fields_of(fields.get("usage", b"")))]))
        return b"\0" not in record and is_table(recognised(header_of(record)[1]))

    @property
    def clock(self) -> str:  # type: ignore[override]
        return self._clock.said if self._clock is not None else "none"

    @property
    def in_order(self) -> bool:  # type: ignore[override]
        return self._clock is None or not self._clock.absolute

    def unclear(self) -> str | None:
        return self._clock.unclear if self._clock is not None else None

    def records(self, file: TraceFile) -> Iterator[tuple[int, Any]]:
        """Lines, objects, or rows of a columnar file: of the columns that are read. Raises `TraceError`."""
        if not columnar.is_columnar(file):
            return super().records(file)
        names: list[str] = columnar.schema_of(file).names
        wanted = self._wanted(names).values()
        top = {column.partition(".")[0] if column not in names else column for column in wanted}
        if missing := sorted(top - set(names)):
            there = safe(", ".join(names), 500)
            raise TraceError(file.name, None, f"no column {safe(', '.join(missing), 200)}; there are {there}")
        return columnar.chosen_rows(file, [name for name in names if name in top])

    def rows(self, records: Iterable[tuple[Place, Any]]) -> Iterator[tuple[Place, Item]]:
        """What each record of one file holds, after a look at the first ones."""
        named = ((place, attempt(self._named, record)) for place, record in records)
        made = ((place, row) for place, row in named if row is not None)  # without headers
        first = [] if self._looked else list(islice(made, self.looked_at))
        if not self._looked:
            self._looked = bool(first)
            self.look([row for _, row in first if not isinstance(row, _UNREAD)])
        for place, row in chain(first, made):
            yield place, row if isinstance(row, _UNREAD) else attempt(self.row, row)

    def notes(self) -> list[str]:
        said = super().notes()
        if self._at and not self._asked.columns and not self.names:
            found = ", ".join(f"{role}={safe(name, 60)}" for role, name in self._at.items())
            said.append(f"columns recognised by their names: {found} (--map says others)")
        if self._others:
            said.append(f"columns not replayed: {safe(', '.join(self._others), 500)}")
        if problem := self.unclear():
            said.append(problem)
        return said

    def _named(self, record: Any) -> Object | None:
        if isinstance(record, dict):
            return record
        if record.lstrip()[:1] == b"{":
            return decode_object(record)
        if not self._columns.names and (problem := self._missing(header_of(record)[1])):
            raise RowError("bad header", f"{problem} in {show(record)}")
        row = self._columns.read(record)
        if row is None:
            self._columns.needed = set(self._wanted(self._columns.names).values())
        return row

    def _missing(self, names: Sequence[str]) -> str | None:
        wanted = {**self.names, **self._asked.columns}
        if missing := [name for name in wanted.values() if name not in names]:
            return f"no column {', '.join(missing)}"
        if twice := [name for name in self._wanted(names).values() if names.count(name) > 1]:
            return f"two columns {', '.join(twice)}"
        return None if wanted or is_table(recognised(names)) else "no columns of a time and of token counts"

    def _wanted(self, names: Iterable[str]) -> dict[Role, str]:
        found = recognised(names)
        if self.names:
            found = {role: name for role, name in found.items() if role in ("session", "model", "cached")}
        return {**found, **self.names, **self._asked.columns}

    def look(self, rows: Sequence[Object]) -> None:
        self._at = self._wanted(dict.fromkeys(name for row in rows for name in (*row, *_usage_names(row))))
        if "arrival" in self._at:
            self._clock = self.clock_of(self._at["arrival"])
            self._clock.look([value for row in rows if (value := self.value(row, "arrival")) is not None])

    def clock_of(self, name: str) -> Clock:
        return Clock(name, self._asked.unit)

    def row(self, row: Object) -> TraceRecord:
        """The row of named values. Raises `RowError` and `LeftOutError`."""
        if row.keys() != self._last_names and len(self._others) < 50:
            self._last_names = row.keys()
            used = {name.partition(".")[0] for name in self._at.values()} | {*_BESIDE, "usage", *self.known}
            self._others |= {name: None for name in row if name not in used}
        session = model = text = messages = None
        if "session" in self._at and (said := self.value(row, "session")) is not None:
            session = str(said)
        if "model" in self._at and (said := self.value(row, "model")) is not None:
            model = str(said)
        arrival_ns = self.arrival_ns(row, session)
        input_tokens, output_tokens, cached_tokens = self._counts(row)
        if "prompt" in self._at and (prompt := self.value(row, "prompt")) is not None:
            messages = plain_messages(decoded(prompt))
            text = prompt if isinstance(prompt, str) and messages is None else None
        if input_tokens is None and text is None and messages is None:
            raise RowError("no input tokens", f"{self._at.get('input', 'the input length')} is empty")
        ids = self.prefix_ids(row, input_tokens, text)
        return TraceRecord(
            arrival_ns, input_tokens, output_tokens, session, prefix_ids=ids,
            block_tokens=None if ids is None else self.block_tokens, text=text, messages=messages, model=model,
            cached_tokens=cached_tokens, think_s=self.think_s(row, session),
        )  # fmt: skip

    def prefix_ids(self, row: Object, input_tokens: int | None, text: str | None) -> tuple[int, ...] | None:
        """One for each block of `block_tokens`, where the format has them. Raises `RowError`."""
        return None

    def think_s(self, row: Object, session: str | None) -> float | None:
        """Time between the turn before and this one, where the format says it. Raises `RowError`."""
        return None

    def arrival_ns(self, row: Object, session: str | None) -> int | None:
        """When the row's request arrived. Raises `RowError`."""
        if self._clock is None:
            return None
        arrival = self.value(row, "arrival")
        if arrival is None:
            raise RowError("no time", f"{self._clock.name} is empty")
        return self._clock.ns(arrival)

    def _counts(self, row: Object) -> TokenCounts:
        name = self._at.get("input", "")
        if name.startswith("usage.") and name not in row and not self._asked.columns:
            return usage_of(row.get("usage"))
        counts = TokenCounts(self._count(row, "input"), self._count(row, "output"), self._count(row, "cached"))
        if name == "input_tokens" and not self._asked.columns and any(each in row for each in _BESIDE):
            # Anthropic's columns stand beside it.
            beside = {each: token_count(each, _given(row.get(each))) for each in _BESIDE}
            if counts.input_tokens is not None and any(beside.values()):
                whole_input = usage_of({"input_tokens": counts.input_tokens, **beside})
                counts = counts._replace(input_tokens=whole_input[0], cached_tokens=whole_input[2])
        return counts

    def _count(self, row: Object, role: Role) -> int | None:
        name = self._at.get(role)
        if name is None:
            return None
        count = row.get(name)
        # As most rows have it: there are many.
        return count if type(count) is int and 0 <= count <= MAX_TOKENS else token_count(name, self.value(row, role))

    def value(self, row: Object, role: Role) -> object:
        """What the row says; None where it does not."""
        name = self._at.get(role)
        if name is None:
            return None
        value = row.get(name)
        if value is None and "." in name:
            value = find(row, name)
        if value is None or type(value) is int:
            return value
        value = _given(value)
        if role == "arrival" and isinstance(value, str) and self._columns.mark == ";" and ":" not in value:
            return value.replace(",", ".")  # a decimal comma
        return value


def _given(value: object) -> object:
    if isinstance(value, str):
        if value.isdigit():
            return value
        return None if value.strip().lower() in _MISSING else value.strip()
    return None if isinstance(value, float) and value != value else value


def _usage_names(row: Object) -> list[str]:
    usage = row.get("usage")
    return [f"usage.{name}" for name in usage] if isinstance(usage, dict) else []
