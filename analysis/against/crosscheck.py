"""Our figures beside those of vLLM's own client, on the same server and the same plan.

Both clients are run several times in alternated order. Repeats of one client show how much the server itself varies;
two clients agree on a figure when their means differ by no more than that explains (Welch's t interval, 95 %), or by
less than a server's figures ever mean (`FLOOR`).

Where vLLM's client defines a figure in another way, its own stamps are used by our definition as far as they go
(`without_role_chunk`), so that what is left to differ is how the clients measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.arrays import Floats
from analysis.likeness import student_t
from analysis.summary import Summary

Figures = dict[str, float]

FLOOR = 0.005
"""Means closer than this share are called equal however quiet the repeats were."""

TELLS = 0.1
"""Repeats whose noise is wider than this share of the figure cannot tell whether the clients agree on it."""

FIGURES: dict[str, tuple[str, str]] = {
    "service_ttft_mean": ("ms", "mean_ttft_ms"),
    "service_ttft_p50": ("ms", "median_ttft_ms"),
    "service_ttft_p90": ("ms", "p90_ttft_ms"),
    "tpot_mean": ("ms", "mean_tpot_ms"),
    "tpot_p50": ("ms", "median_tpot_ms"),
    "itl_mean": ("ms", "mean_itl_ms"),
    "itl_p50": ("ms", "median_itl_ms"),
    "itl_p90": ("ms", "p90_itl_ms"),
    "itl_p99": ("ms", "p99_itl_ms"),
    "request_throughput": ("req/s", "request_throughput"),
    "output_token_throughput": ("tokens/s", "output_throughput"),
}
"""What is compared: our name -> unit, and vLLM's name in its result file."""

REASONS = {
    "service_ttft": (
        "vLLM's clock starts before its HTTP library has built the request and found a connection, and stops after the "
        "event was decoded; ours starts at the send and stops at the read"
    ),
    "tpot": (
        "vLLM stamps a token when its event loop comes to decode it, ours when the bytes were read; for the last token "
        "of many streams at once that differs by the time to decode the others"
    ),
    "itl": (
        "vLLM stamps a token when its event loop comes to decode it: gaps between tokens that waited together are seen "
        "as short, and the gap before them as long. It counts a gap for each chunk, ours one for each token in it"
    ),
    "request_throughput": (
        "vLLM divides by the time from its first task to the last one gathered, ours by the time from the first "
        "planned send to the last end"
    ),
    "output_token_throughput": "as request_throughput; vLLM counts tokens of completed requests only, as we do",
}
"""Why a figure can differ although both clients are right, by its first words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure of both clients over the repeats, in ``unit``."""

    name: str
    unit: str
    ours: float
    theirs: float
    difference: float
    """Ours less theirs."""
    noise: float
    """Half width of the 95 % interval of the difference, from the repeats."""
    low: float
    high: float
    """That interval."""
    verdict: str
    """agree, differ, or noisy: the repeats vary too much to tell."""
    why: str | None
    """Null unless they differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossCheck:
    """The whole comparison. ``notes``: what makes the two not comparable."""

    schema: str
    repeats: int
    completed: list[tuple[int, int]]
    """Successful requests of each repeat, ours and theirs."""
    figures: list[Compared]
    agree: bool
    """No figure differs, at least one could be told, and both completed the same requests."""
    notes: list[str]


def our_figures(summary: Summary) -> Figures:
    """The compared figures of one of our runs, as its report has them; without those it could not measure."""
    found: Figures = {}
    for name, (unit, _) in FIGURES.items():
        if unit == "ms":
            metric, _, part = name.rpartition("_")
            value = getattr(getattr(summary.metrics, metric), part).value
            value = None if value is None else value * 1e3
        else:
            value = getattr(summary.rates, name).value
        if value is not None:
            found[name] = value
    return found


def their_figures(result: Mapping[str, object]) -> Figures:
    """The compared figures of one result file of ``vllm bench serve``."""
    found: Figures = {}
    for name, (_, key) in FIGURES.items():
        value = result.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def without_role_chunk(result: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The figures of a detailed result file on a chat endpoint with the first *token* as the first token, and a note.

    vLLM's chat client takes the first chunk, which names the role and holds no text, for the first token: TTFT ends
    there, and each answer has one gap more, next to nothing. From its own stamps that gap can be taken out again, where
    chunks show it: most answers have as many gaps as tokens, instead of one less. Else ``result`` is left as it is.

    Source: vLLM ``benchmarks/lib/endpoint_request_func.py`` (``async_request_openai_chat_completions``),
    ``benchmarks/serve.py`` (``calculate_metrics``).
    """
    answers = [a for a in zip(result["ttfts"], result["itls"], result["output_lens"], strict=True) if a[2]]
    shown = sum(len(gaps) == tokens for _, gaps, tokens in answers)
    if not answers or shown <= len(answers) / 2:
        return dict(result), (
            "vLLM's chat client counts every chunk, also one that only names the role or only ends the answer; its "
            "stamps do not show which these are, so its TTFT, TPOT and ITL are as it printed them"
        )
    ttft = np.array([first + sum(gaps[:1]) for first, gaps, _ in answers])
    tpot = np.array([sum(gaps[1:]) / (tokens - 1) for _, gaps, tokens in answers if tokens > 1])
    itl = np.array([gap for _, gaps, _ in answers for gap in gaps[1:]])
    found: dict[str, Any] = dict(result)
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        if len(values):
            found[f"mean_{name}_ms"] = float(values.mean()) * 1e3
            found[f"median_{name}_ms"] = float(np.median(values)) * 1e3
            found |= {f"p{p}_{name}_ms": float(np.percentile(values, p)) * 1e3 for p in (90, 99)}
    return found, (
        "vLLM's chat client takes the chunk that names the role for the first token; the figures here are its own "
        f"stamps without it (it printed a mean ITL of {result['mean_itl_ms']:.3f} ms and a mean TTFT of "
        f"{result['mean_ttft_ms']:.3f} ms)"
    )


def compare(
    ours: Sequence[Figures], theirs: Sequence[Figures], completed: Sequence[tuple[int, int]], notes: Sequence[str] = ()
) -> CrossCheck:
    """Both clients' repeats side by side. Figures that some repeat lacks are left out and noted."""
    said = list(notes)
    if any(a != b for a, b in completed):
        said.append("the clients did not complete the same number of requests: see the errors of both")
    figures = []
    for name, (unit, _) in FIGURES.items():
        if not all(name in repeat for repeat in (*ours, *theirs)):
            said.append(f"{name}: not known to both")
            continue
        a, b = (np.array([repeat[name] for repeat in side]) for side in (ours, theirs))
        difference, noise = float(a.mean() - b.mean()), _noise(a, b)
        size = abs(float(b.mean()))
        verdict = "agree" if noise <= TELLS * size else "noisy"
        if abs(difference) > max(noise, FLOOR * size):
            verdict = "differ"
        why = next(text for start, text in REASONS.items() if name.startswith(start)) if verdict == "differ" else None
        figures.append(
            Compared(
                name=name, unit=unit, ours=float(a.mean()), theirs=float(b.mean()), difference=difference, noise=noise,
                low=difference - noise, high=difference + noise, verdict=verdict, why=why,
            )
        )  # fmt: skip
    return CrossCheck(
        schema="harness.crosscheck/1",
        repeats=len(ours),
        completed=list(completed),
        figures=figures,
        agree=any(f.verdict == "agree" for f in figures)
        and not any(f.verdict == "differ" for f in figures)
        and not any(x != y for x, y in completed),
        notes=said,
    )


def _noise(a: Floats, b: Floats) -> float:
    """Half width of Welch's 95 % interval for the difference of means; infinite below two repeats.

    Source: Welch, Biometrika 34, 1947.
    """
    if min(len(a), len(b)) < 2:
        return math.inf
    parts = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
    if sum(parts) == 0:
        return 0.0
    degrees = sum(parts) ** 2 / sum(p**2 / (len(x) - 1) for p, x in zip(parts, (a, b), strict=True))
    return student_t(max(1, math.floor(degrees))) * math.sqrt(sum(parts))
