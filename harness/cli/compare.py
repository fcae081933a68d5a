"""A against B, both measured already: compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from harness.cli.output import present, say
from harness.cli.select_runs import find_runs, judged, refused_exit, sides_of_sweep, sweep_at
from harness.cli.verb import EXIT_STATUS, command, format_option, html_option, takes
from harness.errors import EXIT_FAILURE, EXIT_NOT_DECIDED, EXIT_SLO_MISSED, EXIT_VALID, UsageError
from harness.options import JudgeOptions


@command(
    epilog=f"""\b
Examples:
  harness compare runs/20261121T234654Z-h100 runs/20261121T235904Z-l40s
  harness compare 'runs/*-before' 'runs/*-after' --fail-if 'cost > +5%' --fail-if 'ttft_p99 > +20ms'
  harness compare sweeps/20261122T021500Z-ab

\b
Figures: cost, throughput, goodput, attainment, error_rate, ttft_p50 _p95 _p99, tpot_p50 ..., e2e_p50 ...
From three pairs of runs on (repeats of each, paired by seed) figures are judged; fewer are shown. Make the
pairs in turns, A B B A: a sweep file with A and B, order = "abba" and repeats = 3. Cost and throughput of an
open loop are the load's own and not judged: compare capacity (harness capacity, harness price) instead.
A condition fails only when the whole 95 % interval of the change lies beyond the bound. An interval on
both sides of it is undecided and does not fail: more repeats would decide.

{EXIT_STATUS}""",
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option(
    "--fail-if", multiple=True, metavar="'FIGURE > +5%'", help="End with status 4 when B is that much worse; repeat."
)
@takes(JudgeOptions)
@html_option("the comparison")
@format_option("text", "md", "json")
def compare(a: str, b: str | None, fail_if: Sequence[str], format_: str, html: Path | None, asked: JudgeOptions) -> int:
    """A against B, each a run directory, a folder of repeats or a quoted pattern; or A alone, a sweep of two systems.

    Same trace, load, seed, SLO and evidence, or there is no comparison. Tier, price, model, engine and its arguments
    may differ and are named. Requests are paired by id, repeats by seed.
    """
    from analysis.compare import compare as paired
    from analysis.compare.paired import observe
    from analysis.report.decisions import comparison_sections

    gates = [paired.parse_gate(text) for text in fail_if]
    for text in filter(None, (a, b)):
        if (state := sweep_at(Path(text))) and state.spec.is_search:
            raise UsageError(
                f"{text}: a search for capacity chooses its own loads, so two of them have none in common; put them "
                "side by side with 'harness price A B', or compare two runs or sweeps of equal loads"
            )
    sides = sides_of_sweep(a) if b is None else (find_runs(a), find_runs(b))
    if {path.resolve() for path in sides[0]} & {path.resolve() for path in sides[1]}:
        raise UsageError(f"{a} and {b} share a run: a run is not compared with itself")
    side_a, side_b = (judged(side, observe, slo=asked.slo, attain=asked.attain) for side in sides)
    result = paired.compare(side_a, side_b, gates)
    present(result, comparison_sections(result), format_, html=html, verb="compare")
    if not result.comparable:
        both = refused_exit(one.summary.verdict for one in (*side_a, *side_b))
        return EXIT_NOT_DECIDED if both == EXIT_NOT_DECIDED else EXIT_FAILURE
    if result.failed:
        return EXIT_SLO_MISSED
    if result.unjudged:
        say(f"not judged: {'; '.join(result.unjudged)}")
        return EXIT_NOT_DECIDED
    return EXIT_VALID
