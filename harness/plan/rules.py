"""What no plan can be, whatever the trace: options that exclude each other, and numbers without a meaning."""

from __future__ import annotations

import math

from harness.errors import UsageError
from harness.plan.arrivals import check_process
from harness.plan.file import PlanSpec, Windows

RESCALES = ("compress", "thin", "superpose")


def check_spec(spec: PlanSpec) -> None:
    """Refuse what no trace could make possible. Raises `UsageError`."""
    for name, value in (
        ("speed", spec.speed), ("rate", spec.rate), ("duration", spec.duration_s), ("warm-up", spec.warmup_s),
        ("cancel time", spec.cancel_after_s), ("growth", spec.grow),
    ):  # fmt: skip
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value:g}, must be a number above 0")
    for name, count in (
        ("limit", spec.limit), ("max output tokens", spec.max_output_tokens), ("warm-up", spec.warmup_requests)
    ):  # fmt: skip
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}, must be at least 1")
    if spec.sessions not in ("trace", "wait"):
        raise UsageError(f"sessions {spec.sessions!r}: valid: trace, wait")
    if spec.conversation not in ("recorded", "live"):
        raise UsageError(f"conversation {spec.conversation!r}: valid: recorded, live")
    if spec.conversation == "live" and spec.sessions != "wait":
        raise UsageError("a live conversation needs turns that wait for the answer before them: sessions wait")
    if not 0 <= spec.cancel_share <= 1 or (spec.cancel_share > 0 and spec.cancel_after_s is None):
        raise UsageError(f"cancel share {spec.cancel_share:g}: must be 0 to 1, with a time to hang up after")
    if spec.warmup_s is not None and spec.warmup_requests is not None:
        raise UsageError("warm-up by time and by requests exclude each other: give one")
    _check_times(spec)
    _check_rescale(spec)
    if spec.windows is not None:
        _check_windows(spec, spec.windows)


def _check_rescale(spec: PlanSpec) -> None:
    """Thinning and superposing need the trace's own times, and one word on how far."""
    if spec.rescale not in RESCALES:
        raise UsageError(f"rescale {spec.rescale!r}: valid: {', '.join(RESCALES)}")
    if not (regrown(spec) or spec.spread):
        return
    what = "spreading arrivals" if not regrown(spec) else "growth" if spec.grow is not None else spec.rescale
    if spec.closed or spec.drawn:
        raise UsageError(f"{what} is about the trace's own times, which a closed loop and drawn arrivals do not use")
    if not regrown(spec):
        return
    if spec.grow is not None and (spec.rate is not None or spec.rescale != "compress"):
        raise UsageError("a growth says how much more is sent, so it excludes --rate and --rescale; give one")
    if spec.grow is None and spec.rate is None:
        raise UsageError(f"{spec.rescale} needs the request rate to reach (--rate), or say --grow")
    if spec.repeat:
        raise UsageError(f"{what} and repeating the trace exclude each other")


def _check_windows(spec: PlanSpec, windows: Windows) -> None:
    if windows.count < 1 or windows.draw < 0:
        raise UsageError(f"{windows.count} windows of draw {windows.draw}: at least 1 window, and draws count from 0")
    if regrown(spec):
        raise UsageError("windows are cut from the trace as it is: drop the growth or --rescale")
    if not spec.closed and not spec.drawn and spec.duration_s is None:
        raise UsageError("windows are cut by time: give a duration")


def regrown(spec: PlanSpec) -> bool:
    """Another demand is asked for, not another clock."""
    return spec.grow is not None or spec.rescale != "compress"


def _check_times(spec: PlanSpec) -> None:
    """What decides the times must be one thing."""
    given = [
        name
        for name, on in (
            ("closed loop", spec.closed), ("speed", spec.speed is not None), ("rate", spec.rate is not None),
            ("stages", bool(spec.stages)),
        )
        if on
    ]  # fmt: skip
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: each decides when requests are sent; give one")
    if spec.closed:
        if spec.arrivals != "trace":
            raise UsageError(f"a closed loop has no arrivals: drop {spec.arrivals} arrivals, or the concurrency")
        if spec.duration_s is not None or spec.warmup_s is not None:
            what = "duration" if spec.duration_s is not None else "warm-up time"
            raise UsageError(f"a closed loop has no planned times to cut by: give the {what} to the run instead")
    if spec.drawn:
        check_process(spec.arrivals, spec.burstiness)
        if spec.speed is not None or not (spec.stages or spec.rate is not None):
            raise UsageError(f"{spec.arrivals} arrivals need a request rate (--rate or --stages), and no speed")
        if spec.arrivals == "gamma" and spec.burstiness is None:
            raise UsageError("gamma arrivals need a burstiness: 1 is Poisson, 0.25 has twice its spread")
    elif spec.burstiness is not None or spec.stages:
        what = "burstiness" if spec.burstiness is not None else "stages"
        raise UsageError(f"{what} needs arrivals that are drawn: add --arrivals poisson, constant or gamma")
    if spec.stages and spec.duration_s is not None:
        raise UsageError("stages have their own durations: drop the duration")
    if spec.repeat and spec.limit is None and spec.duration_s is None and not spec.stages:
        raise UsageError("repeating the trace needs an end: a limit, a duration or stages")
