"""Traces written anew: converted, sampled, and stripped of the words of their users.

**A sample** is a window of time, a number of requests, or thinner; sessions stay whole. A window or the first N
requests keep rate and burstiness, but prefixes that were warm before are cold; thinning keeps the shape over time at a
lower rate (burstiness D of counts becomes 1 + p (D - 1)), but requests that shared a prefix lose partners.

**Without words**: lengths, arrivals and shared prefixes stay, text goes. Of its token ids, and of prefix ids, only
hashes of blocks stay, keyed with a random salt that is thrown away, so that nobody can test a guess of what a block
said; they still tell which requests share their beginning. Sessions, adapters and models are numbered.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from harness.errors import TraceError, UsageError
from harness.plan.tokenizers import TextTokenizer
from harness.trace.formats.jsonl import FIELDS
from harness.trace.io import Trace, TraceRecord
from harness.trace.prefix import BLOCK_TOKENS
from harness.trace.spool import Sessions
from harness.trace.survey import place

Records = Callable[[], Iterable[TraceRecord]]


_TEXTS = 256
_BATCH = 4096
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_ATTRIBUTES = {name: "text" if name == "prompt" else name for name in FIELDS}
Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to keep. All that are given apply: the window first, then thinning, then the limit."""

    window_s: tuple[float, float] | None = None
    """From this second of the trace to before that one: requests without a session that arrive in it, and sessions that
    begin in it with all their turns, also those after its end."""
    thin: float | None = None
    """Probability with which each session, or request without one, is kept."""
    limit: int | None = None
    """At most this many requests: whole sessions in order of their beginning, up to the first that does not fit."""
    cut_sessions: bool = False
    """Let window and limit cut through sessions: all requests in the window, exactly the first N."""
    seed: int = 0


def sample(trace: Trace, how: Selection) -> Iterator[TraceRecord]:
    """The records of ``trace`` that ``how`` keeps, in order.

    Raises `UsageError` for choices that make no sense, `TraceError` when a window is asked of a trace without times, or
    a limit is smaller than its first session.
    """
    if how.window_s is None and how.thin is None and how.limit is None:
        raise UsageError("say what to keep: --window, --thin or --limit")
    if how.window_s is not None and not 0 <= how.window_s[0] < how.window_s[1]:
        raise UsageError(f"window {how.window_s[0]:g} s to {how.window_s[1]:g} s: must begin before it ends")

    def chosen() -> Iterator[TraceRecord]:
        records: Iterable[TraceRecord] = trace
        if how.window_s is not None:
            records = _window(trace, how.window_s, how.cut_sessions)
        threshold = None if how.thin is None else int(how.thin * 2**64)
        for record in records:
            if threshold is None or place(record, how.seed) < threshold:
                yield record

    return chosen() if how.limit is None else _limited(trace, chosen, how.limit, how.cut_sessions)


def _window(trace: Trace, window_s: tuple[float, float], cut_sessions: bool) -> Iterator[TraceRecord]:
    start_s, end_s = window_s
    began_inside = Sessions(bool)
    for record in trace:
        if record.arrival_s is None:
            raise TraceError(trace.source.name, record.line, "the trace has no times, so no window can be cut from it")
        inside = start_s <= record.arrival_s < end_s
        if record.session_id is not None and not cut_sessions:
            begun = began_inside.get(record.session_id)
            inside = inside if begun is None else begun
            began_inside.set(record.session_id, inside)
        elif record.arrival_s >= end_s and cut_sessions:
            return
        if inside:
            yield record


def _limited(trace: Trace, chosen: Records, limit: int, cut_sessions: bool) -> Iterator[TraceRecord]:
    sizes = Sessions(int)
    for record in () if cut_sessions else chosen():
        if record.session_id is not None:
            sizes.set(record.session_id, (sizes.get(record.session_id) or 0) + 1)
    taken = 0
    full = False
    admitted: set[str] = set()
    for record in chosen():
        if record.session_id in admitted:
            yield record
            continue
        if full:
            continue
        session = None if cut_sessions else record.session_id
        size = 1 if session is None else sizes.get(session) or 0
        if taken + size > limit:
            if not taken:
                raise TraceError(
                    trace.source.name,
                    record.line,
                    f"its first session has {size} requests, more than the limit of {limit}; --cut-sessions cuts it",
                )
            full = True
            if not admitted:
                return
            continue
        taken += size
        if session is not None:
            admitted.add(session)
        yield record


def _text(record: TraceRecord) -> str:
    """The prompt as one text: equal beginnings of conversations are equal beginnings of it."""
    if record.messages is None:
        return record.text or ""
    return "".join(f"{message['role']}\n{message['content']}\n" for message in record.messages)


def _encoded(
    records: Iterable[TraceRecord], tokenizer: TextTokenizer | None
) -> Iterator[tuple[TraceRecord, list[int] | None, int | None]]:
    """(record, token ids of its text if it has one, tokens of its answer if it has one)."""
    iterator = iter(records)
    while batch := list(islice(iterator, _TEXTS)):
        texts = [r.text is not None or r.messages is not None for r in batch]
        if tokenizer is None:
            if any(texts):
                line = batch[texts.index(True)].line
                raise UsageError(
                    f"line {line} has text: its length and prefix blocks can be kept only with --tokenizer FILE"
                )
            yield from ((record, None, None) for record in batch)
            continue
        prompts = tokenizer.encode([_text(r) for r in batch])
        answers = tokenizer.encode([r.answer or "" for r in batch])
        for record, has_text, prompt, answer in zip(batch, texts, prompts, answers, strict=True):
            yield record, prompt if has_text else None, None if record.answer is None else len(answer)


def count_tokens(records: Iterable[TraceRecord], tokenizer: TextTokenizer) -> Iterator[TraceRecord]:
    """Records with the token counts of prompt and answer filled in where the trace has only the text."""
    for record, ids, answer_tokens in _encoded(records, tokenizer):
        yield record._replace(
            input_tokens=len(ids) if record.input_tokens is None and ids is not None else record.input_tokens,
            output_tokens=answer_tokens or None if record.output_tokens is None else record.output_tokens,
        )


_WORDLESS: Any = dict.fromkeys(("text", "messages", "answer", "expected", "check", "gate", "tags"))


def anonymize(
    records: Iterable[TraceRecord], *, salt: bytes, tokenizer: TextTokenizer | None, block_tokens: int = BLOCK_TOKENS
) -> Iterator[TraceRecord]:
    """Records without text, ids, names, tags, and what answers are checked by.

    Counts that the source gave are kept; blocks that the text has not are shared with nobody. Messages are counted
    without a template. ``salt`` must be random and forgotten. Raises `UsageError` at the first text without a
    tokenizer, `TraceError` for an empty prompt.
    """
    if not 16 <= len(salt) <= 64:
        raise UsageError("the salt must be 16 to 64 random bytes")
    sessions, adapters, models = _numbered("session"), _numbered("adapter"), _numbered("model")
    for number, (record, ids, answer_tokens) in enumerate(_encoded(records, tokenizer)):
        prefix_ids, size = record.prefix_ids, record.block_tokens
        input_tokens = record.input_tokens
        if ids is not None:
            if not ids:
                raise TraceError("trace", record.line, "a prompt without a token; leave it out first")
            input_tokens, size = input_tokens or len(ids), block_tokens
            prefix_ids = _text_blocks(ids, input_tokens, size, salt, number)
        elif prefix_ids is not None:
            prefix_ids = _keyed([i.to_bytes(8, "little", signed=True) for i in prefix_ids], salt)
        yield record._replace(
            input_tokens=input_tokens,
            output_tokens=answer_tokens or None if record.output_tokens is None else record.output_tokens,
            session_id=sessions(record.session_id), adapter=adapters(record.adapter), model=models(record.model),
            prefix_ids=prefix_ids, block_tokens=size if prefix_ids is not None else None,
            **_WORDLESS,
        )  # fmt: skip


def _numbered(what: str) -> Callable[[str | None], str | None]:
    known, count = Sessions(int), 0

    def number(name: str | None) -> str | None:
        nonlocal count
        if name is None:
            return None
        found = known.get(name)
        if found is None:
            count = found = count + 1
        known.set(name, found)
        return f"{what}-{found}"

    return number


def _text_blocks(ids: Sequence[int], tokens: int, size: int, salt: bytes, number: int) -> tuple[int, ...]:
    """One keyed hash per block of ``tokens``: whole blocks by what they say, the rest by the record's number."""
    blocks = [
        b"".join(i.to_bytes(4, "little") for i in ids[at : at + size]) for at in range(0, min(len(ids), tokens), size)
    ]
    # A partial block can be shared only by a prompt that ends there too, so its content may stand for it; what the
    # count has beyond the text is nobody else's.
    missing = -(-tokens // size) - len(blocks)
    if missing or len(ids) != tokens:
        whole = min(len(ids), tokens) // size
        rest = -(-tokens // size) - whole
        blocks = blocks[:whole] + [b"own" + number.to_bytes(8, "little")] * rest
    return _keyed(blocks, salt)


def _keyed(blocks: Sequence[bytes], salt: bytes) -> tuple[int, ...]:
    chain = hashlib.blake2b(key=salt, digest_size=8)
    found = []
    for block in blocks:
        chain.update(block)
        found.append(int.from_bytes(chain.digest(), "little") >> 1)
    return tuple(found)


def check_output(out: Path) -> None:
    """Raises `UsageError` for a name that says no format, `TraceError` for a file that exists: none is overwritten."""
    if not out.name.endswith(_SUFFIXES):
        raise UsageError(f"{out}: the name must end in {', '.join(_SUFFIXES)}")
    if out.exists():
        raise TraceError(str(out), None, "exists already and is not overwritten; choose another name")


def write_trace(records: Iterable[TraceRecord], out: Path) -> int:
    """Write ``records`` to ``out``, the first arrival at zero, and say how many there were.

    The file appears whole or not at all. Raises `UsageError` and `TraceError` as `check_output` does, and when it
    cannot be written or there is no record.
    """
    check_output(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with temporary.open("xb") as raw:
            write = _write_parquet if out.name.endswith(".parquet") else _write_lines
            count = write(_shifted(records), raw, out)
        if not count:
            raise TraceError(str(out), None, "not written: no request is left")
        # A link, unlike a rename, does not replace a file that appeared meanwhile.
        os.link(temporary, out)
    except FileExistsError:
        raise TraceError(str(out), None, "exists already and is not overwritten; choose another name") from None
    except OSError as e:
        raise TraceError(str(out), None, f"cannot write: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return count


def _shifted(records: Iterable[TraceRecord]) -> Iterator[Row]:
    first_ns: int | None = None
    for record in records:
        row: Row = {name: value for name, a in _ATTRIBUTES.items() if (value := getattr(record, a)) is not None}
        if record.arrival_ns is not None:
            first_ns = record.arrival_ns if first_ns is None else first_ns
            row["arrival_s"] = (record.arrival_ns - first_ns) / 1e9
        if record.tags is not None:
            row["tags"] = dict(record.tags)
        yield row


def _write_lines(rows: Iterator[Row], raw: IO[bytes], out: Path) -> int:
    encode = msgspec.json.Encoder().encode
    count = 0
    with contextlib.ExitStack() as stack:
        file: IO[bytes] = raw
        if out.name.endswith(".gz"):
            # Without name and time, so that equal traces are equal files.
            file = cast(IO[bytes], stack.enter_context(gzip.GzipFile("", "wb", 6, raw, mtime=0)))
        for row in rows:
            # JSON in a record and in Parquet, objects in JSON Lines.
            row |= {name: msgspec.Raw(str(row[name]).encode()) for name in ("check", "gate") if name in row}
            file.write(encode(row) + b"\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[Row], raw: IO[bytes], out: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    types = {
        "messages": pa.list_(message), "prefix_ids": pa.list_(pa.int64()), "input_tokens": pa.int32(),
        "output_tokens": pa.int32(), "turn": pa.int32(), "block_tokens": pa.int32(), "cached_tokens": pa.int32(),
        "max_tokens": pa.int32(), "expected": pa.list_(pa.string()), "weight": pa.float64(),
    }  # fmt: skip
    schema = pa.schema([
        (name, types.get(name) or (pa.float64() if name.endswith("_s") else pa.string())) for name in FIELDS
    ])  # fmt: skip
    count = 0
    with pq.ParquetWriter(raw, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _BATCH)):
            for row in batch:
                if "tags" in row:
                    row["tags"] = msgspec.json.encode(row["tags"]).decode()
            count += len(batch)
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return count
