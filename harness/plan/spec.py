"""What a plan is to be: the planning options of a command line, settled, with what excludes each other in them.

Seeds: one number gives a plan again, bit for bit. Its lower 32 bits decide the load: arrivals, lengths, what is sampled
and who hangs up. Made-up prompts depend on all of it. A seed that was not given is drawn above those bits, so that two
visits to one server send the same load with prompts that its prefix cache has not seen.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, fields
from typing import Literal

from harness.errors import UsageError
from harness.options import PlanOptions
from harness.plan.arrivals import check_burstiness

_LOAD_BITS = 32
_DRAWN_BITS = 20
"""With the others 52: a number that every JSON reader keeps whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec(PlanOptions):
    """The options of a plan with nothing left open. The trace decides everything else: equal specs make equal plans."""

    closed: bool
    arrivals: Literal["trace", "constant", "poisson", "gamma"] = "trace"
    seed: int = 0
    as_text: bool = False
    bare: bool = False
    """For a simulator: without prompts, but those made up where requests share a part of theirs; with the trace's own
    lengths, also of texts."""

    @property
    def drawn(self) -> bool:
        return not self.closed and self.arrivals != "trace"

    @property
    def regrown(self) -> bool:
        return self.grow is not None or self.rescale != "compress"


def asked_plan(asked: PlanOptions, *, closed: bool) -> PlanSpec:
    """The plan that ``asked`` (the options of ``harness plan``) means. In a closed loop times are the run's."""
    given = {f.name: getattr(asked, f.name) for f in fields(PlanOptions)} | {
        "arrivals": asked.arrivals or ("poisson" if asked.stages else "trace"),
        "sessions": "wait" if asked.waits else "trace",
        "seed": asked.seed or 0,
    }
    if closed:
        given |= {"duration_s": None, "warmup": None if asked.warmup_s is not None else asked.warmup}
    return PlanSpec(**given, closed=closed)


def drawn_seed() -> int:
    """A seed for whom none was stated: the load of seed 0, and prompts of its own."""
    return (1 + secrets.randbelow(2**_DRAWN_BITS - 1)) << _LOAD_BITS


def load_seed(seed: int) -> int:
    """What of a seed decides the load; all of a smaller or negative one."""
    return seed if seed < 2**_LOAD_BITS else seed & (2**_LOAD_BITS - 1)


def with_load(seed: int, load: int) -> int:
    """``seed`` with another load (of 32 bits at most), and its prompts kept apart from those of other seeds."""
    return load if seed < 2**_LOAD_BITS else seed - load_seed(seed) + load


def check_spec(spec: PlanSpec) -> None:
    """Refuse what no trace could make possible: options that exclude each other, numbers without a meaning.

    Raises `UsageError`.
    """
    share, after_s = spec.cancel or (0.0, None)
    for name, value in (
        ("speed", spec.speed), ("rate", spec.rate), ("duration", spec.duration_s), ("warm-up", spec.warmup_s),
        ("cancel time", after_s), ("growth", spec.grow),
    ):  # fmt: skip
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value:g}, must be a number above 0")
    for name, count in (("limit", spec.limit), ("warm-up", None if spec.warmup_s else spec.warmup)):
        if count is not None and count < 1:
            raise UsageError(f"{name} is {count}, must be at least 1")
    for problem, found in _problems(spec):
        if found:
            raise UsageError(problem)
    if not 0 <= share <= 1:
        raise UsageError(f"cancel share {share:g}: must be 0 to 1")
    if spec.drawn:
        check_burstiness(spec.arrivals, spec.burstiness)


def _problems(spec: PlanSpec) -> list[tuple[str, object]]:
    """(what to say, whether it is so) of options that exclude or need each other; the first that is so is said."""
    decides = {"closed loop": spec.closed, "speed": spec.speed, "rate": spec.rate, "stages": spec.stages}
    given = [name for name, value in decides.items() if value]
    changed = "growth" if spec.grow else spec.rescale if spec.regrown else "spreading arrivals"
    own = not spec.closed and not spec.drawn
    return [
        ("a live conversation needs turns that wait for the answer before them: sessions wait",
         spec.conversation == "live" and spec.sessions != "wait"),
        (f"{' and '.join(given)} exclude each other: each decides when requests are sent; give one", len(given) > 1),
        (f"a closed loop has no arrivals: drop {spec.arrivals} arrivals, or the concurrency",
         spec.closed and spec.arrivals != "trace"),
        ("a closed loop has no planned times to cut by: give the duration or warm-up time to the run instead",
         spec.closed and (spec.duration_s or spec.warmup_s)),
        (f"{spec.arrivals} arrivals need a request rate (--rate or --stages), and no speed",
         spec.drawn and (spec.speed or not (spec.stages or spec.rate))),
        ("gamma arrivals need a burstiness: 1 is Poisson, 0.25 has twice its spread",
         spec.drawn and spec.arrivals == "gamma" and spec.burstiness is None),
        ("burstiness and stages need arrivals that are drawn: add --arrivals poisson, constant or gamma",
         not spec.drawn and (spec.burstiness is not None or spec.stages)),
        ("stages have their own durations: drop the duration", spec.stages and spec.duration_s),
        ("repeating the trace needs an end: a limit, a duration or stages",
         spec.repeat and not (spec.limit or spec.duration_s or spec.stages)),
        (f"{changed} is about the trace's own times, which a closed loop and drawn arrivals do not use",
         (spec.regrown or spec.spread) and not own),
        ("a growth says how much more is sent, so it excludes --rate and --rescale; give one",
         spec.grow and (spec.rate or spec.rescale != "compress")),
        (f"{spec.rescale} needs the request rate to reach (--rate), or say --grow",
         spec.regrown and not (spec.grow or spec.rate)),
        (f"{changed} and repeating the trace exclude each other", spec.regrown and spec.repeat),
        ("windows: at least 1 window, and draws count from 0",
         spec.windows and (spec.windows.count < 1 or spec.windows.draw < 0)),
        ("windows are cut from the trace as it is: drop the growth or --rescale", spec.windows and spec.regrown),
        ("windows are cut by time: give a duration", spec.windows and own and not spec.duration_s),
    ]  # fmt: skip
