"""A trace opened with the reading options of the command line, the same for every verb that reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import UsageError
from harness.options import ReadOptions
from harness.plan.seeds import load_seed
from harness.trace.formats.record import Asked
from harness.trace.io import Trace, open_trace
from harness.trace.selection import parse_where

Files = Path | Sequence[Path]
"""What the command line calls a trace: a file, or several."""


def open_asked(trace: Files, asked: ReadOptions, *, arrivals_only: bool = False, survey: bool = False) -> Trace:
    """The trace, read as ``asked``.

    The two lengths are distributions (`harness.trace.distributions`) for logs that have arrivals only, drawn from the
    seed. ``arrivals_only``: such logs are read without lengths too; ``survey``: whatever there is is to be described.

    Raises what `open_trace` does, and `UsageError` for one of the two lengths without the other.
    """
    lengths = None
    if asked.input_tokens or asked.output_tokens:
        from harness.trace.distributions import draw_lengths, parse_lengths

        if not (asked.input_tokens and asked.output_tokens):
            raise UsageError("--input-tokens and --output-tokens go together")
        seed = load_seed(asked.seed or 0)
        lengths = draw_lengths(parse_lengths(asked.input_tokens), parse_lengths(asked.output_tokens), seed)
    return open_trace(
        trace, format=asked.trace_format, skip_bad=asked.skip_bad, sort=asked.sort, part=asked.part, lengths=lengths,
        arrivals_only=arrivals_only, survey=survey, table=Asked(asked.columns or {}, asked.time_unit),
        where=parse_where(asked.where),
    )  # fmt: skip
