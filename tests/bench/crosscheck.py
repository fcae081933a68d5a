"""Our figures beside those of vLLM's own client, on the same server and the same plan: `crosscheck`, or
``python tests/bench/crosscheck.py PLAN URL [REPEATS]``.

Both clients are run several times in alternated order. Repeats of one client show how much the server itself varies;
two clients agree on a figure when their means differ by no more than that explains (Welch's t interval, 95 %), or by
less than a server's figures ever mean (`FLOOR`).

Where vLLM's client defines a figure in another way, its own stamps are used by our definition as far as they go
(`without_role_chunk`), so that what is left to differ is how the clients measure.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bench.vllm_bench import check_can_run, run_vllm_bench  # noqa: E402

from harness.analysis.arrays import Floats  # noqa: E402
from harness.analysis.rows.read import read_run  # noqa: E402
from harness.analysis.stats.autocorrelation import student_t  # noqa: E402
from harness.analysis.summary import Summary, summarise  # noqa: E402
from harness.errors import UsageError  # noqa: E402
from harness.plan.file import read_plan_columns, read_plan_info  # noqa: E402
from harness.record.manifest import MANIFEST, read_manifest  # noqa: E402

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


def crosscheck(plan: Path, base_url: str, out: Path, *, repeats: int = 3, concurrency: int | None = None) -> CrossCheck:
    """The same plan with our client and with vLLM's, in turn, on one server that is there; runs and results in ``out``.

    Our client goes once before, uncounted: it leaves the server's prefix cache as every later run finds it. Raises
    `UsageError` for a plan that vLLM's client cannot send.
    """
    check_can_run()
    first, _ = _ours(plan, base_url, out / "first", concurrency)
    manifest = read_manifest(first)
    endpoint = manifest.spec.endpoint
    notes = beyond_vllm(plan, endpoint)
    ours, theirs, completed = [], [], []
    for k in range(repeats):
        for side in ("harness", "vllm") if k % 2 == 0 else ("vllm", "harness"):  # neither always comes after the other
            if side == "harness":
                _, summary = _ours(plan, base_url, out / f"harness-{k}", concurrency)
            else:
                result = run_vllm_bench(
                    plan, out / f"vllm-{k}.json", base_url=base_url, model=manifest.model, concurrency=concurrency,
                    extra_body=manifest.spec.extra_body, api_key=os.environ.get("HARNESS_API_KEY"), endpoint=endpoint,
                )  # fmt: skip
        if endpoint == "chat":
            result, note = without_role_chunk(result)
            notes += [note] if k == 0 else []
        ours.append(our_figures(summary))
        theirs.append(their_figures(result))
        completed.append((summary.requests.succeeded, int(result.get("completed", 0))))
        if summary.verdict != "VALID":
            notes.append(f"our run {k + 1} is {summary.verdict}: {'; '.join(summary.reasons)}")
    return compare(ours, theirs, completed, notes)


def _ours(plan: Path, base_url: str, out: Path, concurrency: int | None) -> tuple[Path, Summary]:
    """Run the plan with our client; its run directory and summary."""
    slots = ["--concurrency", str(concurrency)] if concurrency else []
    argv = [sys.executable, "-m", "harness", "run", str(plan), "--base-url", base_url, "--out", str(out), *slots]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600)
    found = [file.parent for file in out.glob(f"*/{MANIFEST}")]
    if not found:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")
    return found[0], summarise(read_run(found[0]))


def beyond_vllm(plan: Path, endpoint: str) -> list[str]:
    """What of this plan vLLM's client does not do. Raises `UsageError` where the two could not ask for the same."""
    if read_plan_info(plan).conversation == "live":
        raise UsageError(
            f"{plan} is a live conversation: its prompts follow from the answers of each run, so no two clients send "
            "the same; plan it with --conversation recorded"
        )
    columns = read_plan_columns(plan, ["output_tokens", "after", "cancel_after_ns", "timeout_ns"])
    if endpoint == "chat" and (missing := columns["output_tokens"].null_count):
        raise UsageError(
            f"{plan}: {missing} requests do not say how many tokens to generate, which vLLM's client must be told: use "
            "a trace with output_tokens ('harness trace convert --tokenizer FILE' counts recorded answers)"
        )
    said = {
        "after": "wait for the turn before them", "cancel_after_ns": "hang up",
        "timeout_ns": "have a time limit of their own",
    }  # fmt: skip
    counted = {name: len(columns) - columns[name].null_count for name in said}
    return [f"{n} requests {said[name]}, which vLLM's client does not do" for name, n in counted.items() if n]


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


def main() -> None:
    """Compare on the command line; the figures as JSON."""
    plan, url, *repeats = sys.argv[1:]
    out = Path(tempfile.mkdtemp(prefix="harness-crosscheck-"))
    found = crosscheck(Path(plan), url, out, repeats=int(repeats[0]) if repeats else 3)
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


if __name__ == "__main__":
    main()
