"""From measured loads to a calibration: what is sought, what is refused, and how well it foretells a load left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from harness.cluster.hardware.calibration import ComparedLoad, Figures, Kind, with_numbers
from harness.cluster.hardware.engine import HardwareEngine
from harness.cluster.hardware.fit import MOST_CONDITION, MOST_ERROR, Fit, Floats, Load, Number, fit, serve
from harness.cluster.hardware.kernels import KernelStep
from harness.errors import UsageError

GENERATIONS = 10
"""Requests of a load for each of its slots, at least: fewer are one burst and its tail."""
FEWEST_REQUESTS = 20
SMALL_S = 1e-6
"""Where the search for a number begins that the runs give no hint of."""

KERNELS = (
    Number(name="kernels", start=1.0, otherwise=1.0, needed=True),
    Number(name="mixed", start=1.0, otherwise=1.0),
    Number(name="sequence_s", start=1e-5, otherwise=0.0),
)
"""``mixed``: of steps that read prompts. Where no other steps were seen one factor stands for all."""
ADVICE = {
    "kernels": "a closed loop of 1 with answers of 50 tokens and more",
    "mixed": "several in flight with prompts of 500 tokens and more",
    "sequence_s": "several dozens in flight",
    "base_s": "a closed loop of 1 with answers of 50 tokens and more",
    "per_sequence_s": "more in flight",
    "per_prompt_token_s": "prompts of different lengths",
    "per_context_token_s": "longer prompts and answers",
    "arrival_s": "short prompts at one in flight",
}
"""What tells each number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What was found."""

    kind: Kind
    found: Fit
    loads: list[ComparedLoad]
    engine: HardwareEngine


def level(load: Load) -> str:
    """What loads have in common that are repeats of each other."""
    return f"{load.concurrency} in flight" if load.concurrency is not None else f"{_rate(load):.3g} requests/s"


def _rate(load: Load) -> float:
    return (len(load) - 1) / max(1e-9, float(load.sent_s.max() - load.sent_s.min()))


def check_loads(loads: Sequence[Load]) -> None:
    """Raise `UsageError` for loads that cannot tell a step time, with what to run."""
    for load in loads:
        fewest = max(FEWEST_REQUESTS, GENERATIONS * (load.concurrency or 1))
        if len(load) < fewest:
            raise UsageError(f"{load.name}: {len(load)} requests of {level(load)} are too few: run {fewest} or more")
        if not np.isfinite(load.decode_s).any():
            raise UsageError(f"{load.name}: no answer of two tokens and more was streamed, so no step was timed")
    closed = {load.concurrency for load in loads if load.concurrency is not None}
    if 1 not in closed:
        raise UsageError(
            "no run of one request at a time, and only there nobody waits for anybody: add one with --concurrency 1"
        )
    if len({level(load) for load in loads}) < 2:
        raise UsageError(
            "all runs are of one load, which does not tell what a step takes by itself from what each request adds: "
            "add one with --concurrency 8, or as many as are usual"
        )


def calibrate(loads: Sequence[Load], engine: HardwareEngine, usd_per_hour: float | None) -> Calibrated:
    """Fit to all loads, and leave each level out where the others suffice.

    ``engine``: as it would be without a calibration; where its step time is not `KernelStep`, nothing is known of it.
    Raises `UsageError` for loads that do not tell what is needed.
    """
    check_loads(loads)
    kind: Kind = "kernels" if isinstance(engine.step_time, KernelStep) else "linear"
    numbers = KERNELS if kind == "kernels" else linear_numbers(loads)
    build = partial(with_numbers, engine, kind)
    found = fit(loads, build, numbers)
    if found.condition > MOST_CONDITION:
        raise UsageError(
            f"the runs are too much alike to tell the parts of a step apart (condition number {found.condition:.0f}, "
            f"at most {MOST_CONDITION:.0f}): add more in flight, and prompts and answers of other lengths"
        )
    for one in numbers:
        if one.needed and not found.errors[one.name] <= MOST_ERROR:
            raise UsageError(
                f"the runs do not tell {one.name} (standard error {found.errors[one.name]:.0%} of it): add one of "
                f"{ADVICE[one.name]}"
            )
    levels = {level(load): load.concurrency for load in loads}
    compared = []
    for name, slots in levels.items():
        mine, others = [[load for load in loads if (level(load) == name) == same] for same in (True, False)]
        left_out = None
        if slots != 1 and len(levels) > 2:
            left_out = build(fit(others, build, numbers).values)
        compared.append(
            ComparedLoad(
                load=name, runs=[load.name for load in mine], requests=sum(map(len, mine)),
                measured=measured_figures(mine, usd_per_hour),
                uncalibrated=simulated_figures(mine, engine, usd_per_hour) if kind == "kernels" else None,
                fitted=simulated_figures(mine, build(found.values), usd_per_hour),
                held_out=None if left_out is None else simulated_figures(mine, left_out, usd_per_hour),
            )
        )  # fmt: skip
    return Calibrated(kind=kind, found=found, loads=compared, engine=build(found.values))


def linear_numbers(loads: Sequence[Load]) -> list[Number]:
    """Those of a linear step, from where the loads of one in flight put them."""
    alone = [load for load in loads if load.concurrency == 1] or loads
    gaps = np.concatenate([load.decode_s / np.maximum(load.output_tokens - 1, 1) for load in alone])
    first = np.concatenate([load.ttft_s for load in alone])
    lengths = np.concatenate([load.input_tokens for load in alone])
    step_s = max(SMALL_S, float(np.nanmedian(gaps)))
    read_s = max(SMALL_S, float(np.nanmedian((first - step_s) / np.maximum(lengths, 1))))
    start = {
        "base_s": 0.8 * step_s, "per_sequence_s": 0.1 * step_s, "per_prompt_token_s": read_s,
        "per_context_token_s": 0.05 * step_s / max(1.0, float(lengths.mean())), "arrival_s": 0.1 * step_s,
    }  # fmt: skip
    needed = ("base_s", "per_prompt_token_s")
    return [Number(name=name, start=at, otherwise=0.0, needed=name in needed) for name, at in start.items()]


def measured_figures(loads: Sequence[Load], usd_per_hour: float | None) -> Figures:
    """What was measured of the repeats of one load."""
    took_s = [float(np.nanmax(load.finished_s) - np.nanmin(load.sent_s)) for load in loads]
    return _figures(loads, [load.ttft_s for load in loads], [load.decode_s for load in loads], took_s, usd_per_hour)


def simulated_figures(loads: Sequence[Load], engine: HardwareEngine, usd_per_hour: float | None) -> Figures:
    """What a simulated engine makes of them: of the same requests the same figures."""
    served = [serve(load, engine) for load in loads]
    first = [
        np.where(np.isfinite(load.ttft_s), one.ttft_s, np.nan) for load, one in zip(loads, served, strict=True)
    ]  # fmt: skip
    later = [
        np.where(np.isfinite(load.decode_s), one.decode_s, np.nan) for load, one in zip(loads, served, strict=True)
    ]  # fmt: skip
    took_s = [float(one.finished_s.max() - one.due_s.min()) for one in served]
    return _figures(loads, first, later, took_s, usd_per_hour)


def _figures(
    loads: Sequence[Load], ttft_s: Sequence[Floats], decode_s: Sequence[Floats], took_s: Sequence[float],
    usd_per_hour: float | None,
) -> Figures:  # fmt: skip
    gaps = [later / np.maximum(load.output_tokens - 1, 1) for load, later in zip(loads, decode_s, strict=True)]
    tokens_per_s = sum(int(load.output_tokens.sum()) for load in loads) / sum(took_s)
    replicas = loads[0].replicas
    return Figures(
        ttft_p50_s=float(np.nanmedian(np.concatenate(ttft_s))), tpot_p50_s=float(np.nanmedian(np.concatenate(gaps))),
        output_tokens_per_s=tokens_per_s,
        usd_per_1m_output=None if usd_per_hour is None else usd_per_hour * replicas / 3600 / tokens_per_s * 1e6,
    )  # fmt: skip


def advice(not_told: Mapping[str, float | None]) -> list[str]:
    """A line for each number that the runs do not tell."""

    def why(error: float | None) -> str:
        if error is None:
            return "other numbers do the same to them"
        return f"standard error {error:.0%} of it" if error < 10 else "it makes no difference to them"

    return [
        f"{name}: not told by these runs ({why(one)}); {ADVICE[name]} would tell it" for name, one in not_told.items()
    ]
