"""What a reader of the results must know of a plan, in words: of its trace, of when it is sent, of what is sent."""

from __future__ import annotations

import numpy as np

from harness.plan.arrivals import Times
from harness.plan.chat import Chat
from harness.plan.file import PlanInfo
from harness.plan.spec import PlanSpec
from harness.trace.formats.record import safe
from harness.trace.io import Trace
from harness.trace.survey import Survey

_LISTED = 8


def notes(
    trace: Trace, spec: PlanSpec, info: PlanInfo, found: Survey, scheduled: Times | None, hang_ups: int,
    chat: Chat | None,
) -> list[str]:  # fmt: skip
    """``info``: all but its notes; ``hang_ups``: requests whose clients were drawn to hang up."""
    said = [*trace.notes]
    if scheduled is not None:
        said += _times(spec, found, scheduled)
    elif found.ended_early:
        said.append(_stopped(found))
    said += _windows(spec, info)
    if info.spread_s is not None:
        said.append(
            f"arrivals are spread evenly, by a seeded draw, within the {info.spread_s:g} s steps of their clock"
        )
    elif spec.spread:
        said.append("nothing to spread: the trace's clock shows no coarse step")
    elif trace.grid_s is not None and scheduled is not None and not spec.drawn:
        said.append("--spread lays arrivals evenly within those steps")
    said += _rescaling(spec, info, found, scheduled)
    said += _requests(spec, info, found, hang_ups)
    return [*said, *_prompts(spec, found, chat)] if found.content.lengths_only else said


def _stopped(found: Survey) -> str:
    return f"reading stopped after {found.requests} usable rows (limit or duration)"


def _times(spec: PlanSpec, found: Survey, scheduled: Times) -> list[str]:
    said, last_s = [], int(scheduled[-1]) / 1e9
    if spec.drawn and not (spec.limit is not None and spec.stages):
        drawn, until_s = len(scheduled), spec.duration_s or last_s
        expected = sum(s.requests for s in spec.stages) if spec.stages else (spec.rate or 0.0) * until_s
        if abs(drawn - expected) > max(1.0, 0.05 * expected):
            said.append(
                f"{drawn} arrivals were drawn in a time for {expected:.0f}: that is chance; more requests come closer "
                "to it"
            )
    if found.ended_early:
        said.append(_stopped(found))
    elif spec.windows is None and spec.duration_s is not None and last_s < 0.95 * spec.duration_s:
        said.append(f"the trace ends at {last_s:.1f} s of the {spec.duration_s:g} s asked for")
    return said


def _windows(spec: PlanSpec, info: PlanInfo) -> list[str]:
    if spec.windows is None:
        return []
    count = len(info.windows)
    where = "on its busiest stretch" if info.busiest else "from different parts of it" if count > 1 else "of it"
    what = f"{count} windows" if count > 1 else "one window"
    said = [
        f"the plan joins {what} {where}, not the trace's first rows: {info.trace_share:.2%} of its {info.rows_kept} "
        "rows"
    ]
    if count < spec.windows.count:
        said.append(f"one window instead of {spec.windows.count}: the plan is as long as the trace")
    return said


def _rescaling(spec: PlanSpec, info: PlanInfo, found: Survey, scheduled: Times | None) -> list[str]:
    before, planned = found.stats.arrivals, info.planned
    if info.rescale is None or planned is None or before is None or scheduled is None:
        return []
    speed = info.speed or 1.0
    if info.rescale == "compress":
        how = f"{speed:.4g} times as fast" if speed > 1 else f"{1 / speed:.4g} times slower"
        said = [
            f"sessions begin on a clock that runs {how}; within a session turns keep the trace's own pace"
            if spec.windows is not None and spec.sessions == "wait"
            else f"time compression: the trace's clock runs {how}, and gaps, bursts and the pace of sessions with it; "
            "--rescale thin or superpose are fewer or more users on the same clock"
        ]
    else:
        said = _growth(info, found, scheduled)
    figures = [
        ("requests/s", before.rate, planned.rate),
        *((f"variance/mean at {w}", before.dispersion[w], planned.dispersion[w]) for w in before.dispersion),
        ("worst minute/mean", before.worst_minute, planned.worst_minute),
        ("gap cv", before.gap_cv, planned.gap_cv),
    ]
    shape = ", ".join(f"{name} {a:.3g} -> {b:.3g}" for name, a, b in figures if a is not None and b is not None)
    clock = "" if speed == 1.0 or info.grow is None else f" (its clock {speed:g} times as fast)"
    return [*said, f"shape, trace -> plan{clock}: {shape}"] if shape else said


def _growth(info: PlanInfo, found: Survey, scheduled: Times) -> list[str]:
    assert info.grow is not None
    n, rows = info.requests, found.requests
    how = "thinned: whole sessions are drawn" if info.grow < 1 else "superposed: copies, each a little later"
    said = [f"demand is {info.grow:.4g} times the trace's on the same clock ({how}): {rows} rows, {n} requests"]
    if not info.cut and abs(n / (info.grow * rows) - 1) > 0.05:
        said.append(f"{info.grow * rows:.0f} requests were expected: that is the chance of the draw")
    last = int(found.arrivals[-1])  # the trace has ended when its last gap has
    end_ns = last + last // max(rows - 1, 1) + round((info.spread_s or 0.0) * 1e9) + 1
    speed = info.speed or 1.0
    after = np.count_nonzero(scheduled * speed >= end_ns)
    if after:
        said.append(f"{after} turns of shifted sessions come after the trace's end")
    if info.grow > 1:
        made_up = found.content.lengths_only == rows
        said.append(
            "copies share no prefix with each other" if made_up
            else "copies repeat texts word for word, so a prefix cache knows them"
        )  # fmt: skip
    return said


def _requests(spec: PlanSpec, info: PlanInfo, found: Survey, hang_ups: int) -> list[str]:
    said = []
    if info.requests > found.requests and (spec.repeat or spec.windows is not None):
        texts = found.requests - found.content.lengths_only
        said.append(
            f"the trace's {found.requests} rows are sent {info.requests / found.requests:.3g} times over; "
            + ("texts repeat word for word, so a prefix cache knows them" if texts else "prompts are new each time")
        )
    if hang_ups and spec.cancel:
        said.append(f"{hang_ups} of {info.requests} clients hang up {spec.cancel[1]:g} s after they sent")
    if found.hang_ups:
        said.append(f"{found.hang_ups} rows of the trace record a client that hung up: it does so again")
    if found.timeouts:
        said.append(
            f"{found.timeouts} rows of the trace bring a time limit of their own, which counts instead of the run's"
        )
    if found.adapters:
        names = safe(", ".join(found.adapters[:_LISTED]), 500)
        said.append(f"rows ask for their own model: {names}{' and more' if len(found.adapters) > _LISTED else ''}")
    if len(found.models) > 1:
        listed = ", ".join(
            f"{'(not said)' if share.model is None else safe(share.model, 60)} {share.rows / found.requests:.0%}"
            for share in found.models[:_LISTED]
        )
        more = f" and {len(found.models) - _LISTED} more" if len(found.models) > _LISTED else ""
        said.append(
            f"the trace mixes the traffic of {len(found.models)} models: {listed}{more}. All of it goes to the model "
            "under test; --where model=NAME plans that of one"
        )
    if found.open_ended:
        said.append(
            f"{found.open_ended} rows do not say how many tokens to generate: the server decides "
            "(vLLM's completions end after 16 tokens)"
        )
    return said


def _prompts(spec: PlanSpec, found: Survey, chat: Chat | None) -> list[str]:
    """How made-up prompts follow from one another, and what a chat template does to them."""
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
    if chat is None:
        return said if not spec.as_text else [
            *said, "no chat template lies beside the tokenizer: what the server's adds comes on top of the planned "
            "input lengths; if the model's folder has one, give that (--tokenizer FOLDER)",
        ]  # fmt: skip
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
