"""docs/ACCURACY.md and cluster/hardware/errors.json from what was simulated."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tests.accuracy.calibrated import sections
from tests.accuracy.fit import Floats
from tests.accuracy.open_loop import Compared
from tests.accuracy.rows import HERE, Row

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "cluster" / "hardware" / "errors.json"
PAGE = ROOT / "docs" / "ACCURACY.md"
METRICS = ("TTFT", "TPOT", "cost")
CHIPS = {"b200_sxm": "B200", "b300_sxm": "B300", "h100_sxm": "H100", "h200_sxm": "H200"}
Summary = dict[str, tuple[float, float]]


def errors(kept: Sequence[Row], answers: Floats) -> Floats:
    """Relative errors of TTFT, TPOT and cost, [row, 3]; cost: end to end, so USD per token at that concurrency."""
    return _three(kept, answers) / _three(kept, np.array([[r.ttft_ms, r.tpot_ms] for r in kept])) - 1


def _three(kept: Sequence[Row], values: Floats) -> Floats:
    return np.column_stack([values, values[:, 0] + values[:, 1] * np.array([r.outputs - 1 for r in kept])])


def summary(found: Floats) -> Summary:
    """Median and p90 of the absolute error in %, by metric."""
    size = np.abs(found) * 100
    return {
        name: (round(float(np.median(size[:, k])), 1), round(float(np.quantile(size[:, k], 0.9)), 1))
        for k, name in enumerate(METRICS)
    }


def write(
    kept: Sequence[Row], answers: Mapping[str, Floats], refused: Sequence[Row], others: Floats,
    open_loop: Sequence[Compared], over_bound: Sequence[tuple[str, str, int, float, float]],
) -> None:  # fmt: skip
    """Write both."""
    found = {name: errors(kept, values) for name, values in answers.items()}
    found["package"] = errors(kept, _package(kept))
    compared = [one for one in open_loop if one.simulated is not None]
    strangers = np.array([np.divide(one.simulated, one.measured) - 1 for one in compared if one.simulated])[
        :, [2, 1, 0]
    ]
    below = strangers[[not one.saturated for one in compared]]
    beyond = strangers[[one.saturated for one in compared]]
    figures = {
        "rows": len(kept), "all": {name: summary(values) for name, values in found.items()},
        "chips": _groups(kept, found["model_left_out"], lambda row: CHIPS[row.chip]),
        "strangers": summary(strangers), "strangers_below_saturation": summary(below),
        "strangers_beyond": summary(beyond),
    }  # fmt: skip
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    index = json.loads((HERE / "index.json").read_text(encoding="utf-8"))
    left_out = ", ".join(f"{count} of {name}" for name, count in index["left_out"].items())
    constants = json.loads((HERE / "constants.json").read_text(encoding="utf-8"))
    nearest = min(over_bound, key=lambda one: one[3])
    text = INTRODUCTION.format(
        rows=len(kept), refused=len(refused), sha256=index["sha256"], left_out=left_out,
        constants=", ".join(f"`{name}` {value:.3g}" for name, value in constants.items()),
        calibrated=sections(),
        all="\n".join(f"| {LABELS[name]} | {_cells(values)} |" for name, values in found.items()),
        supported="\n".join(_lines(kept, found["chip_left_out"], found["model_left_out"])),
        others="\n".join(_lines(refused, errors(refused, others), None)),
        strangers="\n".join(_strangers(compared, strangers)), below=_cells(below),
        beyond=_cells(beyond), whole=_cells(strangers),
        kept_out="\n".join(f"- {one}" for one in sorted({f"{c.config}: {c.why}" for c in open_loop if c.why})),
        bound=f"{len(over_bound)} runs on {', '.join(sorted({one[1] for one in over_bound}))}; the nearest, "
        f"{nearest[0].split('/')[-1]} on {nearest[1]} at {nearest[2]} request/s, took {nearest[3]:.2f} times as long",
    )  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")


def _package(kept: Sequence[Row]) -> Floats:
    return np.array([[r.package_ttft_ms, r.package_tpot_ms] for r in kept])


def _cells(found: Floats) -> str:
    return " | ".join(f"{median:.1f} / {p90:.1f}" for median, p90 in summary(found).values())


def _groups(kept: Sequence[Row], found: Floats, group: Callable[[Row], str]) -> dict[str, Summary]:
    names = np.array([group(row) for row in kept])
    return {name: summary(found[names == name]) for name in sorted(set(names))}


def _lines(kept: Sequence[Row], found: Floats, second: Floats | None) -> list[str]:
    own, lines = errors(kept, _package(kept)), []
    labels = [
        f"| {CHIPS[r.chip]} | {r.model.split('/')[-1]} {r.precision}" + (f": {r.refused}" if r.refused else "")
        for r in kept
    ]
    for label in sorted(set(labels)):
        mine = np.array([one == label for one in labels])
        more = "" if second is None else f" {_cells(second[mine])} |"
        lines.append(f"{label} | {mine.sum()} | {_cells(found[mine])} |{more} {_cells(own[mine])} |")
    return lines


def _strangers(compared: Sequence[Compared], found: Floats) -> list[str]:
    return [
        f"| {one.hardware} | {one.model.split('/')[-1]} {one.precision} | {one.rate:g} | {one.measured[0]:.3g} | "
        + " | ".join(f"{100 * value:+.0f}" for value in (row[2], row[1], row[0]))
        + " |"
        for one, row in zip(compared, found, strict=True)
    ]


LABELS = {
    "in_sample": "in sample", "chip_left_out": "**chip left out**", "model_left_out": "**model left out**",
    "prototype": "the constants of the first prototype, in sample",
    "package": "aiconfigurator-core's own estimate (its constants were set with these rows)",
}  # fmt: skip
INTRODUCTION = """# How far simulated figures are from silicon

Written by `python -m tests.accuracy` (ten minutes; `python -m tests.accuracy page` without fitting anew). Every figure
is median / 90th percentile of the absolute error in %. Cost is that of a token at the row's concurrency, so the error
of a request's whole time.

## Closed loops of InferenceX, {rows} rows that the simulator supports

vLLM 0.11 to 0.19 on B200, B300, H100 and H200; the kernels are of vLLM 0.24. Rows in fp4 are NVFP4, which the simulator
can do and the catalogue does not have yet. Fitted: {constants}.

| | TTFT | TPOT | cost |
|---|---|---|---|
{all}

By chip and model; each pair of columns is what constants fitted without it make of it.

| chip | model | rows | chip out: TTFT | TPOT | cost | model out: TTFT | TPOT | cost | package: TTFT | TPOT | cost |
|---|---|---|---|---|---|---|---|---|---|---|---|
{supported}

Refused by the simulator, {refused} rows (no price is given; the errors are what one would have had):

| chip | model | rows | TTFT | TPOT | cost | package: TTFT | TPOT | cost |
|---|---|---|---|---|---|---|---|---|
{others}

Source: `systems/silicon_sample.csv` of aiconfigurator-core 0.12.0 (Apache-2.0, SHA-256 {sha256}), which holds dumps of
SemiAnalysis InferenceX. Left out: {left_out}. TTFT is a mean that holds the burst in which all slots begin.

## Open loops of strangers, nothing fitted

pChitral/vllm-cost-meter (MIT, commit 3f308c0; arXiv:2606.11690): vLLM 0.19, Poisson arrivals, 512 tokens in, 256 out.
Below saturation the given rate decides what a token costs, so the simulator can hardly miss it.

| | TTFT | TPOT | cost |
|---|---|---|---|
| all rates | {whole} |
| up to 0.8 of the most served | {below} |
| beyond that | {beyond} |

Signed errors in %. Near and beyond saturation TTFT and TPOT are those of a queue; no claim is made about them.

| chip | model | requests/s | measured USD per 1M output | cost | TPOT | TTFT |
|---|---|---|---|---|---|---|
{strangers}

Hardware is what the source names: H100 SXM and A100 PCIe, both of 80 GB. At saturation the simulated cost of Llama
3.1 8B on the H100 is 32 % too low: a step of 500 sequences took 60 ms, of which the kernels explain half. Work of the
host for each sequence would explain the rest; on the machines of InferenceX there is none of it to be seen, so it is
not fitted. Prices are stamped with the error beyond saturation.

Not simulated:

{kept_out}

## The roofline against chips without kernels

IOG-Foundation/llm-inference-benchmarks (Apache-2.0, commit 4990a80), vLLM 0.8.5: {bound} for a token as the roofline.

{calibrated}
## What nobody has held against silicon

L40S and RTX PRO 6000 (kernels, but no rows), A100 40 GB and GH200 (scaled from a sister chip), all of L4, A10 and A10G
(roofline alone), splits over PCIe but for Mixtral on two A100. Prices there are stamped so. The median errors above may
not worsen by more than a point from one version to the next (tests/test_accuracy.py).
"""
