"""The ``harness trace`` verbs: inspect, convert, sample, synth, anonymize. `harness.trace.verbs` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from harness.cli.options import JSON_OPTION, READ_OPTIONS, TRACE_ARGUMENT, stack
from harness.cli.types import DURATION, WINDOW
from harness.cli.verb import Group
from harness.options import ReadOptions, taken

Files = tuple[Path, ...]
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
    from harness.trace import verbs

    return verbs.inspect(
        trace, taken(ReadOptions, reading), tokenizer=tokenizer, block_tokens=block_tokens, format_=format_
    )


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
    from harness.trace import verbs

    return verbs.convert(trace, output, taken(ReadOptions, reading), tokenizer=tokenizer)


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
    from harness.trace import verbs
    from harness.trace.edit import Sample

    how = Sample(window_s=window_s, limit=limit, thin=thin, cut_sessions=cut_sessions, seed=seed)
    return verbs.sample(trace, output, taken(ReadOptions, reading), how)


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
    from harness.trace import verbs

    return verbs.synth(output, verbs.SynthOptions(**options))


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
    from harness.trace import verbs

    return verbs.anonymize(trace, output, taken(ReadOptions, reading), tokenizer=tokenizer, block_tokens=block_tokens)
