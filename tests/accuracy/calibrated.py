"""The sections of docs/ACCURACY.md on calibrations: own runs, a stranger's run, and numbers that are known."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from harness.cluster.hardware.calibrating import KERNELS
from tests.accuracy.own_runs import SECOND, foretell, kept, models, qwen_fit, qwen_off, slots
from tests.accuracy.recovery import FOUND, TRUTH


def sections() -> str:
    """All of them."""
    return OWN.format(own=_own(), qwen=_qwen(), recovery=_recovery())


def _own() -> str:
    lines, told, worst = [], [], []
    for model in models():
        found, loads = foretell(model, SECOND)
        numbers = ", ".join(
            f"`{name}` {value:.3g} ({100 * found.errors[name]:.1f} %)" if name in found.errors else f"`{name}` not told"
            for name, value in found.values.items()
        )
        told.append(f"- {model}: {numbers}; condition number {found.condition:.0f}")
        lines += [
            f"| {model} | {one.load} | {one.requests} | {one.fitted_to} | {one.measured[0]:,.0f} | "
            f"{one.measured[1]:.1f} | {one.measured[2]:.1f} | {_signed(one.off)} |"
            for one in loads
        ]
        for second in slots(model)[1:]:
            others = [one.off for one in foretell(model, second)[1] if one.fitted_to != "itself"]
            most = " | ".join(f"{100 * value:.1f}" for value in np.abs(others).max(axis=0))
            worst.append(f"| {model} | 1 and {second} in flight | {most} |")
    facts, _ = kept()[0]
    inputs, outputs = (
        np.concatenate([getattr(load, name) for _, load in kept()]).mean() for name in ("input_tokens", "output_tokens")
    )  # fmt: skip
    return (
        f"vLLM {facts['vllm']} on two cores ({facts['cpu']}), which the load shares; prompts of {inputs:.0f}\n"
        f"tokens and answers of {outputs:.0f} on average, none from a cache. Numbers and their standard errors:\n\n"
        + "\n".join(told)
        + "\n\nMeasured figures, and signed errors in %:\n\n"
        "| model | load | requests | fitted to | TTFT p50, ms | TPOT p50, ms | tokens/s | TTFT | TPOT | cost |\n"
        + "|---" * 10 + "|\n" + "\n".join(lines)
        + "\n\nWhich second load is fitted matters: a step is not quite linear. Largest errors of the others, %:\n\n"
        "| model | fitted to | TTFT | TPOT | cost |\n" + "|---" * 5 + "|\n" + "\n".join(worst)
    )  # fmt: skip


def _qwen() -> str:
    found = qwen_fit(KERNELS)
    lines = [f"| tables and constants | {_signed(qwen_off(None))} |"]
    label = f"**one factor, {found.values['kernels']:.2f} ({100 * found.errors['kernels']:.1f} %)**"
    lines.append(f"| {label} | {_signed(qwen_off(found.values))} |")
    other = qwen_fit(KERNELS[:1] + KERNELS[2:], mixed=1.195)
    lines.append(f"| one factor, beside `mixed` 1.195 of other machines | {_signed(qwen_off(other.values))} |")
    return "\n".join(lines)


def _recovery() -> str:
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    loads = list(dict.fromkeys(tuple(one["loads"]) for one in found))
    lines = ["| in flight | " + " | ".join(f"`{name}`" for name in TRUTH) + " |", "|---" * (1 + len(TRUTH)) + "|"]
    for each in loads:
        mine = {one["number"]: one for one in found if tuple(one["loads"]) == each}
        cells = " | ".join(f"{mine[name]['within_2']:.0%}" for name in TRUTH)
        lines.append(f"| {', '.join(map(str, each))} | {cells} |")
    return f"Of {found[0]['seeds']} seeds:\n\n" + "\n".join(lines)


def _signed(values: Sequence[float]) -> str:
    return " | ".join(f"{100 * value:+.1f}" for value in values)


OWN = """## Calibrated on own runs

`harness calibrate-model` fits the step of an engine to runs of it by simulating them. Below, the linear step of a CPU
was fitted to two closed loops of each model, and foretells the other loads. Cost is that of an output token at that
load, so its inverse throughput.

{own}

### A stranger's run, from its first 20 s

Qwen3-32B on two RTX PRO 6000 over PCIe, vLLM 0.19, 300 requests that come faster than they are served
(tests/golden/README.md). Fitted are the times to first token of the 128 requests that had one within 20 s. Signed
errors in % over the whole run:

| | TTFT mean | p50 | p90 | p99 | TPOT mean | p50 | p90 | p99 | duration |
|---|---|---|---|---|---|---|---|---|---|
{qwen}

In those 20 s all steps but the last few read prompts. So one number is told, what those steps take: a second factor,
for them apart from steps that only decode, is not, and neither is the host's time for each sequence; the fit says so
and leaves them out. With the constant for mixed steps of other machines (1.195; here it is 1.0) the same 20 s put too
little on steps that only decode, and every figure is 10 to 15 % low: TPOT first, and the queue follows.

### Numbers that are known

The share of fits in which a number is found within 2 standard errors of the truth (95 % would be so; loads as in
tests/accuracy/recovery.py, steps with 5 % of noise). {recovery}
"""
