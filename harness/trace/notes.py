"""How a plan's requests were timed, and what a reader of its results must know of that, in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.plan.arrivals import Times
from harness.plan.chat import Chat
from harness.plan.file import PlanSpec
from harness.trace.edit import Arrangement
from harness.trace.formats.record import safe
from harness.trace.io import Trace
from harness.trace.spool import blocks
from harness.trace.stats import ArrivalStats
from harness.trace.survey import ADAPTERS_LISTED, Survey
from harness.trace.windows import Joined


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """What was read, and when what of it is to be sent."""

    survey: Survey
    scheduled: Times | None = None
    """null in a closed loop."""
    speed: float = 1.0
    """Factor on the trace's clock."""
    arrangement: Arrangement | None = None
    grow: float | None = None
    rescale: str | None = None
    spread_s: float | None = None
    cut: bool = False
    windows: Joined | None = None
    own_pace: bool = False
    """Turns come as long after their session's first as in the trace, whatever the clock."""


def _draw_note(spec: PlanSpec, scheduled: Times) -> list[str]:
    """What a short draw did to the rate that was asked for."""
    if spec.limit is not None and spec.stages:
        return []
    until_s = spec.duration_s or int(scheduled[-1]) / 1e9
    expected = sum(s.requests for s in spec.stages) if spec.stages else (spec.rate or 0.0) * until_s
    n = len(scheduled)
    if abs(n - expected) <= max(1.0, 0.05 * expected):
        return []
    return [f"{n} arrivals were drawn in a time for {expected:.0f}: that is chance; more requests come closer to it"]


def notes(
    trace: Trace, spec: PlanSpec, timed: Timed, planned: ArrivalStats | None, cancelled: npt.NDArray[np.bool_]
) -> list[str]:
    """What a reader of the results must know: of the trace, of when it is sent, of what is sent."""
    return [
        *trace.notes,
        *_times(spec, timed),
        *_windows(spec, timed),
        *_spreading(trace, spec, timed),
        *_rescaling(timed, planned),
        *_requests(spec, timed.survey, cancelled),
    ]


def _times(spec: PlanSpec, timed: Timed) -> list[str]:
    found, scheduled = timed.survey, timed.scheduled
    said = _draw_note(spec, scheduled) if spec.drawn and scheduled is not None else []
    if found.ended_early:
        said.append(f"reading stopped after {found.requests} usable rows (limit or duration)")
    elif (
        scheduled is not None
        and spec.windows is None
        and spec.duration_s is not None
        and scheduled[-1] < 0.95e9 * spec.duration_s
    ):
        said.append(f"the trace ends at {int(scheduled[-1]) / 1e9:.1f} s of the {spec.duration_s:g} s asked for")
    return said


def _windows(spec: PlanSpec, timed: Timed) -> list[str]:
    """Which part of the trace is sent."""
    if timed.windows is None or spec.windows is None:
        return []
    found, rows = timed.windows.windows, timed.survey.requests
    where = "on its busiest stretch" if spec.windows.busiest else "from different parts of it"
    what = f"{len(found)} windows {where}" if len(found) > 1 else f"one window {where}" if spec.windows.busiest else (
        "one window of it"
    )  # fmt: skip
    said = [f"the plan joins {what}, not the trace's first rows: {timed.windows.trace_share:.2%} of its {rows} rows"]
    if len(found) < spec.windows.count:
        said.append(f"one window instead of {spec.windows.count}: the plan is as long as the trace")
    return said


def _spreading(trace: Trace, spec: PlanSpec, timed: Timed) -> list[str]:
    if timed.spread_s is not None:
        return [f"arrivals are spread evenly, by a seeded draw, within the {timed.spread_s:g} s steps of their clock"]
    if spec.spread:
        return ["nothing to spread: the trace's clock shows no coarse step"]
    own_times = timed.scheduled is not None and not spec.drawn
    return ["--spread lays arrivals evenly within those steps"] if trace.grid_s is not None and own_times else []


def _rescaling(timed: Timed, planned: ArrivalStats | None) -> list[str]:
    """What another clock or demand did to the shape."""
    before = timed.survey.stats.arrivals
    if timed.rescale is None or planned is None or before is None:
        return []
    if timed.rescale == "compress":
        how = f"{timed.speed:.4g} times as fast" if timed.speed > 1 else f"{1 / timed.speed:.4g} times slower"
        said = [
            f"sessions begin on a clock that runs {how}; within a session turns keep the trace's own pace"
            if timed.own_pace
            else f"time compression: the trace's clock runs {how}, and gaps, bursts and the pace of sessions with it; "
            "--rescale thin or superpose are fewer or more users on the same clock"
        ]
    else:
        said = _growth(timed, planned)
    shape = [
        f"{name} {a:.3g} -> {b:.3g}"
        for name, a, b in (
            ("requests/s", before.rate, planned.rate),
            *((f"variance/mean at {w}", before.dispersion[w], planned.dispersion[w]) for w in before.dispersion),
            ("worst minute/mean", before.worst_minute, planned.worst_minute),
            ("gap cv", before.gap_cv, planned.gap_cv),
        )
        if a is not None and b is not None
    ]
    clock = "" if timed.speed == 1.0 or timed.grow is None else f" (its clock {timed.speed:g} times as fast)"
    return [*said, f"shape, trace -> plan{clock}: {', '.join(shape)}"] if shape else said


def _growth(timed: Timed, planned: ArrivalStats) -> list[str]:
    """How demand was changed, and what became of the number of requests."""
    assert timed.grow is not None
    n, rows = planned.requests, timed.survey.requests
    how = "thinned: whole sessions are drawn" if timed.grow < 1 else "superposed: copies, each a little later"
    said = [f"demand is {timed.grow:.4g} times the trace's on the same clock ({how}): {rows} rows, {n} requests"]
    if not timed.cut and abs(n / (timed.grow * rows) - 1) > 0.05:
        said.append(f"{timed.grow * rows:.0f} requests were expected: that is the chance of the draw")
    if timed.scheduled is not None and (after := _after_the_end(timed.scheduled, timed)):
        said.append(f"{after} turns of shifted sessions come after the trace's end")
    if timed.grow > 1:
        made_up = timed.survey.content.lengths_only == rows
        said.append(
            "copies share no prefix with each other" if made_up
            else "copies repeat texts word for word, so a prefix cache knows them"
        )  # fmt: skip
    return said


def _after_the_end(scheduled: Times, timed: Timed) -> int:
    """Requests planned after the trace and its last gap have ended."""
    times = timed.survey.arrivals
    end_ns = int(times[-1]) + int(times[-1]) // max(len(times) - 1, 1) + round((timed.spread_s or 0.0) * 1e9) + 1
    return sum(int(np.count_nonzero(scheduled[part] * timed.speed >= end_ns)) for part in blocks(len(scheduled)))


def _requests(spec: PlanSpec, found: Survey, cancelled: npt.NDArray[np.bool_]) -> list[str]:
    n = len(cancelled)
    said = []
    if n > found.requests and (spec.repeat or spec.windows is not None):
        texts = found.requests - found.content.lengths_only
        said.append(
            f"the trace's {found.requests} rows are sent {n / found.requests:.3g} times over; "
            + ("texts repeat word for word, so a prefix cache knows them" if texts else "prompts are new each time")
        )
    if spec.max_output_tokens is not None and found.longest_output > spec.max_output_tokens:
        said.append(
            f"output lengths capped at {spec.max_output_tokens} tokens, the longest is {found.longest_output}: "
            "the load is lighter than the trace's"
        )
    if cancelled.any():
        said.append(f"{int(cancelled.sum())} of {n} clients hang up {spec.cancel_after_s:g} s after they sent")
    if found.hang_ups:
        said.append(f"{found.hang_ups} rows of the trace record a client that hung up: it does so again")
    if found.timeouts:
        said.append(
            f"{found.timeouts} rows of the trace bring a time limit of their own, which counts instead of the run's"
        )
    if found.adapters:
        more = " and more" if len(found.adapters) > ADAPTERS_LISTED else ""
        names = safe(", ".join(found.adapters[:ADAPTERS_LISTED]), 500)
        said.append(f"rows ask for their own model: {names}{more}")
    if len(found.models) > 1:
        listed = ", ".join(
            f"{'(not said)' if share.model is None else safe(share.model, 60)} {share.rows / found.requests:.0%}"
            for share in found.models[:ADAPTERS_LISTED]
        )
        more = f" and {len(found.models) - ADAPTERS_LISTED} more" if len(found.models) > ADAPTERS_LISTED else ""
        said.append(
            f"the trace mixes the traffic of {len(found.models)} models: {listed}{more}. All of it goes to the model "
            "under test; --where model=NAME plans that of one"
        )
    if found.open_ended and spec.max_output_tokens is None:
        said.append(
            f"{found.open_ended} rows do not say how many tokens to generate: the server decides "
            "(vLLM's completions end after 16 tokens)"
        )
    return said


def prompt_notes(spec: PlanSpec, found: Survey, chat: Chat | None) -> list[str]:
    """What made-up prompts are: how they follow from one another, and what a chat template does to them."""
    if not found.content.lengths_only:
        return []
    said = []
    prefix = found.stats.prefix
    if prefix is not None and prefix.continued_turns is not None:
        said.append(
            f"{prefix.continued_turns} turns continue their session: each prompt begins with the one before it and a "
            f"made-up answer of the recorded length; an unlimited cache would find {prefix.hit_rate_tokens:.1%} of "
            f"input tokens, in blocks of {'/'.join(map(str, prefix.block_tokens))}"
        )
        if prefix.independent_turns:
            said.append(
                f"{prefix.independent_turns} later turns of sessions are shorter than what came before them: no "
                "continuation, so their prompts share nothing with it"
            )
    if chat is None and spec.as_text:
        said.append(
            "no chat template lies beside the tokenizer: what the server's adds comes on top of the planned input "
            "lengths; if the model's folder has one, give that (--tokenizer FOLDER)"
        )
    if chat is None:
        return said
    if chat.room and prefix is not None and prefix.continued_turns:
        said.append(
            f"as a chat, a turn has {chat.room} tokens of the template besides: one that leaves less for them is not "
            "continued"
        )
    if chat.room is None:
        said.append(
            "this chat template adds no constant number of tokens to a message: each prompt is one user message of the "
            "exact length, and a session's message grows"
        )
    short = sum(rows for tokens, rows in found.input_lengths.items() if tokens < chat.shortest)
    if short:
        said.append(
            f"{short} rows ask for less than the {chat.shortest} tokens that the chat template and one word have: they "
            "are sent that long"
        )
    return said
