"""What the ``harness trace`` verbs do: read a trace, write another, and say how they differ. Data goes to stdout."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from harness.console import console
from harness.errors import EXIT_VALID, UsageError
from harness.options import ReadOptions
from harness.trace.files import Files, check_output, open_asked, write_trace
from harness.trace.io import Trace, TraceRecord
from harness.trace.shape import TraceShape, measure
from harness.trace.shape_text import compared, described

if TYPE_CHECKING:
    from harness.trace.edit import Sample


def inspect(trace: Files, reading: ReadOptions, *, tokenizer: Path | None, block_tokens: int, format_: str) -> int:
    """Say what a trace is."""
    source = open_asked(trace, reading, survey=True)
    records: Iterable[TraceRecord] = source
    if tokenizer is not None:
        from harness.plan.tokenizers import load_tokenizer
        from harness.trace.anonymize import anonymize

        # Hashes of the text's blocks are all that is needed; the text is never kept.
        records = anonymize(
            source,
            salt=bytes(16),
            tokenizer=load_tokenizer(tokenizer),
            block_tokens=block_tokens,
        )
    shape = measure(records)
    facts = {
        "file": source.sources.name,
        "format": source.format,
        "sha256": source.sha256,
        "rows_read": source.rows_read,
        "rows_kept": source.rows_kept,
        "rows_dropped": source.rows_dropped,
        "rows_failed": source.rows_failed,
        "examples": source.examples,
        "clock": source.clock,
        "blocks": source.blocks,
        "span_s": shape.span_s,
        "grid_s": source.grid_s,
        "notes": source.notes,
    }
    if format_ == "json":
        _print_json({**facts, **{k: v for k, v in dataclasses.asdict(shape).items() if k not in facts}})
    else:
        _print(described(facts, shape))
    return EXIT_VALID


def convert(trace: Files, output: Path, reading: ReadOptions, *, tokenizer: Path | None) -> int:
    """Any trace -> our JSON Lines or Parquet."""
    check_output(output)
    source = open_asked(trace, reading)
    records: Iterable[TraceRecord] = source
    if tokenizer is not None:
        from harness.plan.tokenizers import load_tokenizer
        from harness.trace.anonymize import count_tokens

        records = count_tokens(source, load_tokenizer(tokenizer))
    _finish(source, records, output)
    return EXIT_VALID


def sample(trace: Files, output: Path, reading: ReadOptions, how: Sample) -> int:
    """A smaller trace, and what became of its shape."""
    from harness.trace.edit import sample as choose

    check_output(output)
    source = open_asked(trace, reading)
    tap = _Tap(choose(source, how))
    write_trace(tap, output)
    before = measure(source)
    _notes(source)
    _say(compared(before, tap.shape()))
    print(output)
    return EXIT_VALID


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthOptions:
    """What ``harness trace synth`` is asked for."""

    rate: float | None
    arrivals: str
    input_tokens: str | None
    output_tokens: str | None
    requests: int | None
    duration_s: float | None
    servegen: Path | None
    window_s: tuple[float, float] | None
    seed: int


def synth(output: Path, asked: SynthOptions) -> int:
    """A made-up trace."""
    check_output(output)
    if asked.servegen is not None:
        return _servegen(output, asked, asked.servegen)
    from harness.trace.synth import parse_arrivals, parse_lengths, synthesize

    rate, inputs, outputs = asked.rate, asked.input_tokens, asked.output_tokens
    if rate is None or inputs is None or outputs is None:
        given = {"--rate": rate, "--input-tokens": inputs, "--output-tokens": outputs}
        missing = ", ".join(flag for flag, value in given.items() if value is None)
        raise UsageError(f"say {missing} (or --servegen FOLDER)")
    if asked.window_s is not None:
        raise UsageError("--window goes with --servegen; say --duration or --requests")
    records = synthesize(
        gaps=parse_arrivals(asked.arrivals, rate),
        input_tokens=parse_lengths(inputs),
        output_tokens=parse_lengths(outputs),
        requests=asked.requests,
        duration_s=asked.duration_s,
        seed=asked.seed,
    )
    tap = _Tap(records)
    write_trace(tap, output)
    _say(compared(None, tap.shape()))
    print(output)
    return EXIT_VALID


def anonymize(trace: Files, output: Path, reading: ReadOptions, *, tokenizer: Path | None, block_tokens: int) -> int:
    """A trace that may be shared."""
    from harness.plan.tokenizers import load_tokenizer
    from harness.trace.anonymize import anonymize as without_text

    check_output(output)
    counter = None if tokenizer is None else load_tokenizer(tokenizer)
    source = open_asked(trace, reading)
    records = without_text(source, salt=secrets.token_bytes(32), tokenizer=counter, block_tokens=block_tokens)
    _finish(source, records, output)
    return EXIT_VALID


def _servegen(output: Path, asked: SynthOptions, folder: Path) -> int:
    from itertools import islice

    from harness.trace.synth import read_servegen

    given = {"--rate": asked.rate, "--input-tokens": asked.input_tokens, "--output-tokens": asked.output_tokens}
    for flag, value in given.items():
        if value is not None:
            raise UsageError(f"{flag} comes from the model with --servegen")
    model = read_servegen(folder)
    first_s, last_s = model.span_s
    start_s, end_s = asked.window_s or (first_s, last_s)
    if asked.duration_s is not None:
        end_s = min(end_s, start_s + asked.duration_s)
    if asked.window_s is None and asked.duration_s is None and asked.requests is None:
        raise UsageError(
            f"the model covers {last_s - first_s:g} s; say how much of it: --window 10h:11h, --duration or --requests"
        )
    if not first_s <= start_s < last_s:
        raise UsageError(f"the model covers {first_s:g} s to {last_s:g} s, the window begins at {start_s:g} s")
    tap = _Tap(islice(model.draw(start_s, end_s, asked.seed), asked.requests))
    write_trace(tap, output)
    say = [f"clients: {', '.join(model.clients)}; model time {start_s:g} s to {min(end_s, last_s):g} s"]
    if model.without_lengths:
        say.append(f"{model.without_lengths} requests left out: the model has no lengths for their time")
    if model.without_family:
        say.append(f"{model.without_family} windows without a fitted family of gaps: drawn as Poisson")
    _say("\n".join([*say, compared(None, tap.shape())]))
    print(output)
    return EXIT_VALID


# --- shared --------------------------------------------------------------------------------------------------------


class _Tap:
    """Records on their way through, measured as they pass."""

    def __init__(self, records: Iterable[TraceRecord]) -> None:
        from harness.trace.shape import RowColumns

        self._records = records
        self._columns = RowColumns()

    def __iter__(self) -> Iterator[TraceRecord]:
        for record in self._records:
            self._columns.add(record)
            yield record

    def shape(self) -> TraceShape:
        """Of what has passed."""
        return self._columns.shape()


def _finish(source: Trace, records: Iterable[TraceRecord], output: Path) -> None:
    count = write_trace(records, output)
    _notes(source)
    _say(f"{count} requests written, {source.rows_read} rows read ({source.format})")
    print(output)


def _notes(source: Trace) -> None:
    for note in source.notes:
        _say(f"note: {note}")


def _say(words: str) -> None:
    console().print(words, markup=False)


def _print(text: str) -> None:
    print(text)


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
