"""What one load worker can carry on this machine: calibrate."""

from __future__ import annotations

from cluster.calibrate import calibrate as measure
from harness.calibration import write_calibration
from harness.cli.hot_path import hot_path
from harness.cli.options import (
    JSON_OPTION,
)
from harness.cli.output import print_json, print_table, say
from harness.cli.verb import command
from harness.errors import EXIT_VALID
from harness.paths import cache_dir


@command(short_help="Measure what the load generator can carry on this machine.")
@JSON_OPTION
def calibrate(format_: str) -> int:
    """Measure what one load worker on this machine can carry, in under a minute.

    Drives a server whose timing is exactly known: requests and streamed events a second, how late requests are sent,
    and how far TTFT and ITL are from the truth at half of the ceiling. The result is kept in the cache; runs are then
    given as many load workers as their plan needs, and a plan that this machine cannot carry is said before it starts.
    """
    found = measure(say, hot_path=hot_path())
    path = write_calibration(cache_dir(), found)
    if format_ == "json":
        print_json(found)
        return EXIT_VALID
    least = {True: "at least ", False: ""}
    print_table(
        ("one load worker here", "figure", "how"),
        [
            ("events/s", f"{least[found.events_at_least]}{found.events_per_s:,.0f}",
             f"streams of 100 tokens/s, {found.events_cpu_share:.0%} of a core"),
            ("requests/s", f"{least[found.requests_at_least]}{found.requests_per_s:,.0f}", "closed loop, 4 tokens"),
            ("lag p50 / p99", f"{found.lag_p50_s * 1e3:.2f} / {found.lag_p99_s * 1e3:.2f} ms", "Poisson, 500 req/s"),
            ("TTFT error p50 / p99", f"{found.ttft_error_p50_s * 1e3:+.2f} / {found.ttft_error_p99_s * 1e3:+.2f} ms",
             f"at {found.timing_events_per_s:,.0f} events/s, less the server's own"),
            ("ITL error p50 / p99", f"{found.itl_error_p50_s * 1e3:+.2f} / {found.itl_error_p99_s * 1e3:+.2f} ms",
             "there, less the server's own"),
            ("CPU per event", f"{found.cpu_us_per_event:.1f} us", "there"),
        ],
    )  # fmt: skip
    for note in found.notes:
        print(f"note: {note}")
    if found.events_at_least or found.requests_at_least:
        print('"at least": the known-truth server, not the worker, was the limit, or no limit was met')
    print(f"{path} ({found.took_s:.0f} s)")
    return EXIT_VALID
