"""Look at a trace, convert, sample, make up or anonymize one: trace inspect, convert, sample, synth, anonymize."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from harness.cli.options import JSON_OPTION, READ_OPTIONS, TRACE_ARGUMENT, stack
from harness.cli.output import print_json, say
from harness.cli.types import DURATION, WINDOW
from harness.cli.verb import Group
from harness.errors import EXIT_VALID, UsageError
from harness.options import ReadOptions, taken
from harness.trace.files import Files, check_output, open_asked, write_trace
from harness.trace.io import Trace, TraceRecord
from harness.trace.shape import TraceShape, compared, described, measure, shape_of
from harness.trace.survey import Survey

_READ = stack(TRACE_ARGUMENT, READ_OPTIONS)
_OUTPUT = click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write: .jsonl, .jsonl.gz or .parquet; never overwritten.",
)
_SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of what is random.")
_LENGTHS = stack(
    click.option(
        "--input-tokens", metavar="DIST", help="Input lengths: 512, lognormal:mean=800,cv=1, uniform:low=1,high=9 ..."
    ),
    click.option("--output-tokens", metavar="DIST", help="Output lengths, the same way."),
)
_TOKENIZER = click.option(
    "--tokenizer",
    type=click.Path(exists=True, path_type=Path),
    help="Model folder, or its tokenizer.json, to count the tokens of text with.",
)
_BLOCK = click.option(
    "--block-tokens",
    type=click.IntRange(1, 65_536),
    default=16,
    show_default=True,
    help="Tokens per prefix block of text.",
)


@click.group(
    cls=Group,
    short_help="Look at a trace, convert, sample, make up or anonymize one.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def trace() -> None:
    """Look at a trace, convert, sample, make up or anonymize one.

    A trace is a file (plain, gzip, zstd, xz, bzip2 or zip), several of them, a folder, a pattern in quotes, - for
    standard input, s3://bucket/key or s3://bucket/prefix/; rows of several files are merged by arrival.
    scenarios/traces/README.md lists the formats, which are found by content.
    """


@trace.command(
    short_help="Say what a trace is.",
    epilog="""\b
Examples:
  harness trace inspect AzureLLMInferenceTrace_code.csv.gz
  zcat trace.jsonl.gz | harness trace inspect - --format json
""",
)
@_READ
@_TOKENIZER
@_BLOCK
@JSON_OPTION
def inspect(trace: Files, tokenizer: Path | None, block_tokens: int, format_: str, **reading: Any) -> int:
    """Say what a trace is: format, rows, its clock and prefix blocks and what shows them, rate over time, bursts, token
    lengths, sessions, prefix reuse.
    """
    source = open_asked(trace, taken(ReadOptions, reading), survey=True)
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
    if format_ == "text":
        print(described(source, shape))
        return EXIT_VALID
    names = ("rows_read", "rows_kept", "rows_dropped", "rows_failed", "examples", "clock", "blocks", "grid_s", "notes")
    facts = {name: getattr(source, name) for name in ("format", "sha256", *names)}
    print_json({"file": source.sources.name, **facts, **dataclasses.asdict(shape)})
    return EXIT_VALID


@trace.command(
    short_help="Write a trace in the harness's own format.",
    epilog="""\b
Examples:
  harness trace convert spend-logs.csv -o trace.jsonl
  harness trace convert 0_trace.jsonl --part 1 -o trace.parquet
  harness trace convert access.log --input-tokens lognormal:mean=900,cv=1.2 --output-tokens 200 -o trace.jsonl
""",
)
@_READ
@_OUTPUT
@_LENGTHS
@_SEED
@_TOKENIZER
def convert(trace: Files, output: Path, tokenizer: Path | None, **reading: Any) -> int:
    """Write a trace in the harness's own format.

    --input-tokens and --output-tokens are for logs that have arrivals only; with --tokenizer the lengths of text are
    counted and written beside it.
    """
    check_output(output)
    source = open_asked(trace, taken(ReadOptions, reading))
    records: Iterable[TraceRecord] = source
    if tokenizer is not None:
        from harness.plan.tokenizers import load_tokenizer
        from harness.trace.anonymize import count_tokens

        records = count_tokens(source, load_tokenizer(tokenizer))
    _finish(source, records, output)
    return EXIT_VALID


@trace.command(
    short_help="Keep a window, N requests, or a thinner trace.",
    epilog="""\b
Examples:
  harness trace sample trace.jsonl --window 10m:20m -o part.jsonl
  harness trace sample trace.jsonl --thin 0.1 -o tenth.jsonl
""",
)
@_READ
@_OUTPUT
@click.option("--window", "window_s", type=WINDOW, help="From and to this time of the trace, like 10m:20m.")
@click.option("--limit", type=click.IntRange(min=1), help="At most N requests, whole sessions from the beginning.")
@click.option("--thin", type=click.FloatRange(0, 1, min_open=True), help="Keep this share of sessions, at random.")
@click.option("--cut-sessions", is_flag=True, help="Let --window and --limit cut through sessions.")
@_SEED
def sample(
    trace: Files, output: Path, window_s: tuple[float, float] | None, limit: int | None, thin: float | None,
    cut_sessions: bool, seed: int, **reading: Any,
) -> int:  # fmt: skip
    """Keep a window, N requests, or a thinner trace; sessions stay whole. Prints the shape before and after."""
    from harness.trace.edit import Sample
    from harness.trace.edit import sample as choose

    how = Sample(window_s=window_s, limit=limit, thin=thin, cut_sessions=cut_sessions, seed=seed)
    check_output(output)
    source = open_asked(trace, taken(ReadOptions, reading))
    tap = _Tap(choose(source, how))
    write_trace(tap, output)
    before = measure(source)
    _notes(source)
    say(compared(before, tap.shape()))
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


@trace.command(
    short_help="Make up a trace from distributions.",
    epilog="""\b
Examples:
  harness trace synth --rate 8 --duration 10m --input-tokens lognormal:mean=900,cv=1.2 --output-tokens 200 -o t.jsonl
  harness trace synth --servegen ServeGen/data/language/m-small --window 10h:11h -o t.jsonl
""",
)
@_OUTPUT
@click.option("--rate", type=click.FloatRange(min=0, min_open=True, max=1e6), help="Mean requests/s.")
@click.option(
    "--arrivals",
    default="poisson",
    show_default=True,
    metavar="NAME",
    help="poisson, constant, gamma:cv=2 (above 1: burstier than Poisson) or weibull:shape=0.5.",
)
@_LENGTHS
@click.option("--requests", type=click.IntRange(min=1), help="How many.")
@click.option("--duration", "duration_s", type=DURATION, help="For how long, e.g. 10m.")
@click.option("--servegen", type=click.Path(exists=True, path_type=Path), help="ServeGen client models, a folder.")
@click.option("--window", "window_s", type=WINDOW, help="With --servegen: this part of the model's time, 10h:11h.")
@_SEED
def synth(output: Path, **options: Any) -> int:
    """Make up a trace from distributions of gaps and lengths, or from ServeGen's client models."""
    asked = SynthOptions(**options)
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
    say(compared(None, tap.shape()))
    print(output)
    return EXIT_VALID


@trace.command(
    short_help="Take out every word; keep lengths, times and shared prefixes.",
    epilog="""\b
Example:
  harness trace anonymize chats.jsonl --tokenizer tokenizer.json -o shared.jsonl
""",
)
@_READ
@_OUTPUT
@_TOKENIZER
@_BLOCK
def anonymize(trace: Files, output: Path, tokenizer: Path | None, block_tokens: int, **reading: Any) -> int:
    """Take out every word; keep lengths, times and shared prefixes.

    Text is counted with --tokenizer; of its blocks only hashes stay, keyed with a random salt that is thrown away.
    Sessions are numbered.
    """
    from harness.plan.tokenizers import load_tokenizer
    from harness.trace.anonymize import anonymize as without_text

    check_output(output)
    counter = None if tokenizer is None else load_tokenizer(tokenizer)
    source = open_asked(trace, taken(ReadOptions, reading))
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
    words = [f"clients: {', '.join(model.clients)}; model time {start_s:g} s to {min(end_s, last_s):g} s"]
    if model.without_lengths:
        words.append(f"{model.without_lengths} requests left out: the model has no lengths for their time")
    if model.without_family:
        words.append(f"{model.without_family} windows without a fitted family of gaps: drawn as Poisson")
    say("\n".join([*words, compared(None, tap.shape())]))
    print(output)
    return EXIT_VALID


class _Tap:
    """Records on their way through, measured as they pass."""

    def __init__(self, records: Iterable[TraceRecord]) -> None:
        self._records = records
        self._seen = Survey()

    def __iter__(self) -> Iterator[TraceRecord]:
        for record in self._records:
            self._seen.add(record)
            yield record

    def shape(self) -> TraceShape:
        """Of what has passed."""
        return shape_of(self._seen)


def _finish(source: Trace, records: Iterable[TraceRecord], output: Path) -> None:
    count = write_trace(records, output)
    _notes(source)
    say(f"{count} requests written, {source.rows_read} rows read ({source.format})")
    print(output)


def _notes(source: Trace) -> None:
    for note in source.notes:
        say(f"note: {note}")
