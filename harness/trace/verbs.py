"""What the ``harness trace`` verbs do: read a trace, write another, and say how they differ. Data goes to stdout."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from harness.errors import EXIT_VALID, UsageError
from harness.progress import console
from harness.trace.io import Trace, TraceRecord
from harness.trace.reading import Files, open_asked
from harness.trace.shape import Shape, measure
from harness.trace.shape_text import compared, described
from harness.trace.writer import check_output, write_trace


def inspect(trace: Files, format_: str, **options: Any) -> int:
    """Say what a trace is."""
    source = open_asked(trace, options, survey=True)
    records: Iterable[TraceRecord] = source
    if options.get("tokenizer") is not None:
        from harness.plan.tokenizers import load_tokenizer
        from harness.trace.anonymize import anonymize

        # Hashes of the text's blocks are all that is needed; the text is never kept.
        records = anonymize(
            source,
            salt=bytes(16),
            tokenizer=load_tokenizer(options["tokenizer"]),
            block_tokens=options["block_tokens"],
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


def convert(trace: Files, output: Path, **options: Any) -> int:
    """Any trace -> our JSON Lines or Parquet."""
    check_output(output)
    source = open_asked(trace, options)
    records: Iterable[TraceRecord] = source
    if options.get("tokenizer") is not None:
        from harness.plan.tokenizers import load_tokenizer
        from harness.trace.anonymize import count_tokens

        records = count_tokens(source, load_tokenizer(options["tokenizer"]))
    _finish(source, records, output)
    return EXIT_VALID


def sample(trace: Files, output: Path, **options: Any) -> int:
    """A smaller trace, and what became of its shape."""
    from harness.trace.reshape import Sample
    from harness.trace.reshape import sample as choose

    check_output(output)
    how = Sample(**{field.name: options[field.name] for field in dataclasses.fields(Sample)})
    source = open_asked(trace, options)
    tap = _Tap(choose(source, how))
    write_trace(tap, output)
    before = measure(source)
    _notes(source)
    _say(compared(before, tap.shape()))
    print(output)
    return EXIT_VALID


def synth(output: Path, **options: Any) -> int:
    """A made-up trace."""
    check_output(output)
    if options["servegen"] is not None:
        return _servegen(output, options)
    from harness.trace.distributions import parse_arrivals, parse_lengths
    from harness.trace.synth import synthesize

    missing = [name for name in ("rate", "input_tokens", "output_tokens") if options[name] is None]
    if missing:
        names = ", ".join("--" + name.replace("_", "-") for name in missing)
        raise UsageError(f"say {names} (or --servegen FOLDER)")
    if options["window_s"] is not None:
        raise UsageError("--window goes with --servegen; say --duration or --requests")
    records = synthesize(
        gaps=parse_arrivals(options["arrivals"], options["rate"]),
        input_tokens=parse_lengths(options["input_tokens"]),
        output_tokens=parse_lengths(options["output_tokens"]),
        requests=options["requests"],
        duration_s=options["duration_s"],
        seed=options["seed"],
    )
    tap = _Tap(records)
    write_trace(tap, output)
    _say(compared(None, tap.shape()))
    print(output)
    return EXIT_VALID


def anonymize(trace: Files, output: Path, **options: Any) -> int:
    """A trace that may be shared."""
    from harness.plan.tokenizers import load_tokenizer
    from harness.trace.anonymize import anonymize as without_text

    check_output(output)
    tokenizer = None if options["tokenizer"] is None else load_tokenizer(options["tokenizer"])
    source = open_asked(trace, options)
    records = without_text(
        source, salt=secrets.token_bytes(32), tokenizer=tokenizer, block_tokens=options["block_tokens"]
    )
    _finish(source, records, output)
    return EXIT_VALID


def _servegen(output: Path, options: dict[str, Any]) -> int:
    from itertools import islice

    from harness.trace.synth import read_servegen

    for name in ("rate", "input_tokens", "output_tokens"):
        if options[name] is not None:
            raise UsageError(f"--{name.replace('_', '-')} comes from the model with --servegen")
    model = read_servegen(options["servegen"])
    first_s, last_s = model.span_s
    start_s, end_s = options["window_s"] or (first_s, last_s)
    if options["duration_s"] is not None:
        end_s = min(end_s, start_s + options["duration_s"])
    if options["window_s"] is None and options["duration_s"] is None and options["requests"] is None:
        raise UsageError(
            f"the model covers {last_s - first_s:g} s; say how much of it: --window 10h:11h, --duration or --requests"
        )
    if not first_s <= start_s < last_s:
        raise UsageError(f"the model covers {first_s:g} s to {last_s:g} s, the window begins at {start_s:g} s")
    tap = _Tap(islice(model.draw(start_s, end_s, options["seed"]), options["requests"]))
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
        from harness.trace.shape import Columns

        self._records = records
        self._columns = Columns()

    def __iter__(self) -> Iterator[TraceRecord]:
        for record in self._records:
            self._columns.add(record)
            yield record

    def shape(self) -> Shape:
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
