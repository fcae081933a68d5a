"""A trace opened with the reading options of the command line, the same for every verb that reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.plan.seeds import load_seed
from harness.trace.formats.asked import Asked
from harness.trace.io import Trace, open_trace
from harness.trace.selection import parse_where

Files = Path | Sequence[Path]
"""What the command line calls a trace: a file, or several."""


def open_asked(trace: Files, options: dict[str, Any], *, arrivals_only: bool = False, survey: bool = False) -> Trace:
    """The trace with the options ``trace_format``, ``skip_bad``, ``sort``, ``part``, ``columns``, ``time_unit``,
    ``where``, ``input_tokens``, ``output_tokens`` and ``seed``; those not there are not asked for.

    The two lengths are distributions (`harness.trace.distributions`) for logs that have arrivals only, drawn from the
    seed. ``arrivals_only``: such logs are read without lengths too; ``survey``: whatever there is is to be described.

    Raises what `open_trace` does, and `UsageError` for one of the two lengths without the other.
    """
    lengths = None
    stated = [options.get("input_tokens"), options.get("output_tokens")]
    if any(stated):
        from harness.trace.distributions import draw_lengths, parse_lengths

        if not all(stated):
            raise UsageError("--input-tokens and --output-tokens go together")
        seed = load_seed(options.get("seed") or 0)
        lengths = draw_lengths(parse_lengths(str(stated[0])), parse_lengths(str(stated[1])), seed)
    return open_trace(
        trace,
        format=options.get("trace_format"),
        skip_bad=bool(options.get("skip_bad")),
        sort=bool(options.get("sort")),
        part=options.get("part"),
        lengths=lengths,
        arrivals_only=arrivals_only,
        survey=survey,
        table=Asked(options.get("columns") or {}, options.get("time_unit")),
        where=parse_where(options.get("where") or ()),
    )
