"""Look at a trace, convert, sample, make up or anonymize one: trace inspect, convert, sample, synth, anonymize."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from harness.cli.output import print_json, say
from harness.cli.verb import JSON_OPTION, TRACE_ARGUMENT, Group, takes
from harness.errors import EXIT_VALID, UsageError
from harness.option_types import COUNT, EXISTING, NEW_FILE, WINDOW, opt
from harness.options import ReadOptions

if TYPE_CHECKING:
    from harness.trace.io import Files, Trace, TraceRecord
    from harness.trace.synth import Lengths

Window = tuple[float, float]
SEED = "Seed of what is random."
INPUTS = "Input lengths: 512, lognormal:mean=800,cv=1, uniform:low=1,high=9 ..."
OUTPUTS = "Output lengths, the same way."
_OUTPUT = click.option(
    "-o", "--output", required=True, type=NEW_FILE,
    help="File to write: .jsonl, .jsonl.gz or .parquet; never overwritten.",
)  # fmt: skip
_TOKENIZER = click.option(
    "--tokenizer", type=EXISTING, help="Model folder, or its tokenizer.json, to count the tokens of text with."
)
_BLOCK = click.option(
    "--block-tokens", type=click.IntRange(1, 65_536), default=16, show_default=True,
    help="Tokens per prefix block of text.",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions(ReadOptions):
    """How a trace is read that may lack its lengths."""

    heading: ClassVar = "Options"
    input_tokens: str | None = opt(INPUTS, metavar="DIST")
    output_tokens: str | None = opt(OUTPUTS, metavar="DIST")
    seed: int = opt(SEED, 0, kind=click.IntRange(min=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What of a trace is kept."""

    window_s: Window | None = opt("From and to this time of the trace, like 10m:20m.", kind=WINDOW)
    limit: int | None = opt("At most N requests, whole sessions from the beginning.", kind=COUNT)
    thin: float | None = opt("Keep this share of sessions, at random.", kind=click.FloatRange(0, 1, min_open=True))
    cut_sessions: bool = opt("Let --window and --limit cut through sessions.", False)
    seed: int = opt(SEED, 0, kind=click.IntRange(min=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthOptions:
    """What ``harness trace synth`` is asked for."""

    rate: float | None = opt("Mean requests/s.", kind=click.FloatRange(min=0, min_open=True, max=1e6))
    arrivals: str = opt(
        "poisson, constant, gamma:cv=2 (above 1: burstier than Poisson) or weibull:shape=0.5.",
        "poisson",
        metavar="NAME",
    )
    input_tokens: str | None = opt(INPUTS, metavar="DIST")
    output_tokens: str | None = opt(OUTPUTS, metavar="DIST")
    like: Path | None = opt("Lengths, input with output, of requests of this trace, in place of both.", kind=EXISTING)
    peak: float | None = opt(
        "Days with a busy afternoon: this many times the mean rate at 16 h, and as much below it at 4 h.",
        kind=click.FloatRange(1, 2),
    )  # fmt: skip
    requests: int | None = opt("How many.", kind=COUNT)
    duration_s: float | None = opt("For how long, e.g. 10m.")
    servegen: Path | None = opt("ServeGen client models, a folder.", kind=EXISTING)
    window_s: Window | None = opt("With --servegen: this part of the model's time, 10h:11h.", kind=WINDOW)
    seed: int = opt(SEED, 0, kind=click.IntRange(min=0))


@click.group(
    cls=Group,
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
@TRACE_ARGUMENT
@takes(ReadOptions)
@_TOKENIZER
@_BLOCK
@JSON_OPTION
def inspect(trace: Files, tokenizer: Path | None, block_tokens: int, format_: str, asked: ReadOptions) -> int:
    """Say what a trace is: format, rows, its clock and prefix blocks and what shows them, rate over time, bursts, token
    lengths, sessions, prefix reuse.
    """
    from harness.trace.io import open_asked
    from harness.trace.shape import described, measure

    source = open_asked(trace, asked, survey=True)
    # Hashes of the text's blocks are all that is needed; the text is never kept.
    shape = measure(source if tokenizer is None else _without_text(source, bytes(16), tokenizer, block_tokens))
    if format_ == "text":
        print(described(source, shape))
        return EXIT_VALID
    names = ("rows_read", "rows_kept", "rows_dropped", "rows_failed", "examples", "clock", "blocks", "grid_s", "notes")
    facts = {name: getattr(source, name) for name in ("format", "sha256", *names)}
    print_json({"schema": "harness.trace/1", "file": source.sources.name, **facts, **dataclasses.asdict(shape)})
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
@TRACE_ARGUMENT
@_OUTPUT
@takes(ConvertOptions)
@_TOKENIZER
def convert(trace: Files, output: Path, tokenizer: Path | None, asked: ConvertOptions) -> int:
    """Write a trace in the harness's own format.

    --input-tokens and --output-tokens are for logs that have arrivals only; with --tokenizer the lengths of text are
    counted and written beside it.
    """
    from harness.trace.edit import check_output
    from harness.trace.io import open_asked

    check_output(output)
    source = open_asked(trace, asked)
    records: Iterable[TraceRecord] = source
    if tokenizer is not None:
        from harness.plan.tokenizers import load_tokenizer
        from harness.trace.edit import count_tokens

        records = count_tokens(source, load_tokenizer(tokenizer))
    return _finish(records, output, source)


@trace.command(
    short_help="Keep a window, N requests, or a thinner trace.",
    epilog="""\b
Examples:
  harness trace sample trace.jsonl --window 10m:20m -o part.jsonl
  harness trace sample trace.jsonl --thin 0.1 -o tenth.jsonl
""",
)
@TRACE_ARGUMENT
@takes(ReadOptions, to="reading")
@_OUTPUT
@takes(SampleOptions)
def sample(trace: Files, output: Path, reading: ReadOptions, asked: SampleOptions) -> int:
    """Keep a window, N requests, or a thinner trace; sessions stay whole."""
    from harness.trace.edit import Selection, check_output
    from harness.trace.edit import sample as choose
    from harness.trace.io import open_asked

    how = Selection(
        window_s=asked.window_s, limit=asked.limit, thin=asked.thin, cut_sessions=asked.cut_sessions, seed=asked.seed
    )
    check_output(output)
    source = open_asked(trace, reading)
    return _finish(choose(source, how), output, source)


@trace.command(
    short_help="Make up a trace from distributions.",
    epilog="""\b
Examples:
  harness trace synth --rate 8 --duration 10m --input-tokens lognormal:mean=900,cv=1.2 --output-tokens 200 -o t.jsonl
  harness trace synth --like azure-conv-2023.csv --rate 1.157 --peak 1.6 --duration 24h -o day.jsonl.gz
  harness trace synth --servegen ServeGen/data/language/m-small --window 10h:11h -o t.jsonl
""",
)
@_OUTPUT
@takes(SynthOptions)
def synth(output: Path, asked: SynthOptions) -> int:
    """Make up a trace from distributions of gaps and lengths, or from ServeGen's client models."""
    from harness.trace.edit import check_output
    from harness.trace.synth import daily, parse_arrivals, synthesize

    check_output(output)
    rate, inputs, outputs = asked.rate, asked.input_tokens, asked.output_tokens
    given: dict[str, object] = {"--rate": rate, "--input-tokens": inputs, "--output-tokens": outputs}
    if asked.servegen is not None:
        given |= {"--like": asked.like, "--peak": asked.peak}
        if said := [flag for flag, value in given.items() if value is not None]:
            raise UsageError(f"{said[0]} comes from the model with --servegen")
        return _servegen(output, asked, asked.servegen)
    if asked.like is not None:
        if said := [flag for flag in ("--input-tokens", "--output-tokens") if given[flag] is not None]:
            raise UsageError(f"{said[0]} comes from the trace with --like")
        given = {"--rate": rate}
    if rate is None or None in given.values():
        missing = ", ".join(flag for flag, value in given.items() if value is None)
        raise UsageError(f"say {missing} (or --servegen FOLDER, or --like TRACE for lengths)")
    if asked.window_s is not None:
        raise UsageError("--window goes with --servegen; say --duration or --requests")
    records = synthesize(
        gaps=parse_arrivals(asked.arrivals, rate), lengths=_lengths(asked), requests=asked.requests,
        duration_s=asked.duration_s, seed=asked.seed, warp=None if asked.peak is None else daily(asked.peak),
    )  # fmt: skip
    return _finish(records, output)


def _lengths(asked: SynthOptions) -> Lengths:
    """Where the lengths of made-up requests come from."""
    from harness.trace.io import open_trace
    from harness.trace.synth import drawn_apart, drawn_like, parse_lengths

    if asked.like is not None:
        return drawn_like(open_trace(asked.like))
    return drawn_apart(parse_lengths(asked.input_tokens or ""), parse_lengths(asked.output_tokens or ""))


@trace.command(
    short_help="Take out every word; keep lengths, times and shared prefixes.",
    epilog="""\b
Example:
  harness trace anonymize chats.jsonl --tokenizer tokenizer.json -o shared.jsonl
""",
)
@TRACE_ARGUMENT
@takes(ReadOptions)
@_OUTPUT
@_TOKENIZER
@_BLOCK
def anonymize(trace: Files, output: Path, tokenizer: Path | None, block_tokens: int, asked: ReadOptions) -> int:
    """Take out every word; keep lengths, times and shared prefixes.

    Text is counted with --tokenizer; of its blocks only hashes stay, keyed with a random salt that is thrown away.
    Sessions are numbered.
    """
    from harness.trace.edit import check_output
    from harness.trace.io import open_asked

    check_output(output)
    source = open_asked(trace, asked)
    return _finish(_without_text(source, secrets.token_bytes(32), tokenizer, block_tokens), output, source)


def _without_text(source: Trace, salt: bytes, tokenizer: Path | None, block_tokens: int) -> Iterator[TraceRecord]:
    from harness.plan.tokenizers import load_tokenizer
    from harness.trace.edit import anonymize

    counter = None if tokenizer is None else load_tokenizer(tokenizer)
    return anonymize(source, salt=salt, tokenizer=counter, block_tokens=block_tokens)


def _servegen(output: Path, asked: SynthOptions, folder: Path) -> int:
    from itertools import islice

    from harness.trace.synth import read_servegen

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

    def words() -> Iterator[str]:
        yield f"clients: {', '.join(model.clients)}; model time {start_s:g} s to {min(end_s, last_s):g} s"
        if model.without_lengths:
            yield f"{model.without_lengths} requests left out: the model has no lengths for their time"
        if model.without_family:
            yield f"{model.without_family} windows without a fitted family of gaps: drawn as Poisson"

    return _finish(islice(model.draw(start_s, end_s, asked.seed), asked.requests), output, None, words)


def _finish(
    records: Iterable[TraceRecord], output: Path, source: Trace | None = None,
    words: Callable[[], Iterable[str]] = tuple,
) -> int:  # fmt: skip
    """Write records, and say how many, with what there is to say of them afterwards."""
    from harness.trace.edit import write_trace

    count = write_trace(records, output)
    for note in (*words(), *(source.notes if source else ())):
        say(f"note: {note}")
    read = f", {source.rows_read} rows read ({source.format})" if source else ""
    say(f"{count} requests written{read}; what they are: harness trace inspect {output}")
    print(output)
    return EXIT_VALID
