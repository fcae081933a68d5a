"""docs/TIERS.md: what models can do on every tier, by simulation: ``python -m tests.accuracy.tiers``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import list_tiers
from harness.cluster.hardware.advice import Demand, Offer, demand_of, offers
from harness.cluster.simulator.scheduler import VLLM
from harness.slo import criteria
from harness.trace.io import open_trace

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "TIERS.md"
TRACE = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"
SLO, ATTAIN = {"ttft": 2.0, "tpot": 0.1}, 0.95
MODELS = {
    "mistral-7b-instruct-v0.3": "Mistral 7B, bf16",
    "mistral-7b-instruct-v0.3-fp8": "Mistral 7B, fp8",
    "mistral-7b-instruct-v0.2-awq": "Mistral 7B, INT4 (AWQ)",
    "llama-2-13b-chat": "Llama 2 13B, 16 bits",
    "llama-2-13b-chat-fp8": "Llama 2 13B, fp8",
    "llama-2-13b-chat-awq": "Llama 2 13B, INT4 (AWQ)",
    "qwen3-235b-a22b": "Qwen3 235B-A22B, bf16: the size of a flagship",
    "llama-3.1-70b-instruct-fp8": "Llama 3.1 70B, fp8: beside the distilled model",
    "deepseek-r1-distill-llama-8b": "DeepSeek-R1-Distill-Llama-8B, bf16: distilled",
}
HEAD = """# What models can do on every tier: simulated

Written by `python -m tests.accuracy.tiers`. Nothing here was measured: vLLM {vllm}'s scheduler in virtual time, with
step times from the evidence that each line names (docs/ACCURACY.md says how far that goes). Capacity is the highest
rate at which {attain:.0%} of requests have their first token within {ttft:g} s and later ones every {tpot:g} ms on
average, on the Azure conversation trace ({inputs:.0f} tokens in and {outputs:.0f} out on average), repeated, faster.
USD are those of a full instance at that rate for 1M output tokens, prompts included, at the catalogue's dated prices;
the range is the model's own error in 9 of 10 cases. *kernels*: NVIDIA's measured kernels; *scaled*: those of a chip
with the same die; *bound*: the roofline of the data sheet, so the cost is at least that and takes no part in any order.
Splits: accelerators of a replica x replicas.
"""


def evidence(offer: Offer) -> str:
    """Of a line, in a word or two."""
    facts = offer.engine.facts
    if offer.is_bound:
        return "bound"
    unheld = {"L40S", "RTX-PRO-6000", "A100-40GB", "GH200"}
    words = ["scaled" if "scaled" in facts else "kernels"]
    words += ["unvalidated chip"] if offer.engine.chip in unheld else []
    words += ["PCIe uncalibrated"] if "uncalibrated" in facts else []
    return ", ".join(words)


def cost(offer: Offer) -> str:
    """USD per 1M output tokens, with what it may be."""
    usd = offer.usd_per_1m_output
    if offer.is_bound:
        return f"at least {usd:.3g}"
    return f"{usd:.3g} ({usd * offer.error[0]:.3g} to {usd * offer.error[1]:.3g})"


def table(model: str, title: str, demand: Demand) -> list[str]:
    """The lines of one model."""
    found = list(_table(model, title, demand))
    print(title, file=sys.stderr)
    return found


def _table(model: str, title: str, demand: Demand) -> Iterator[str]:
    lines: list[Offer] = []
    misfits = 0
    tiers = [tier for tier in list_tiers() if tier.accelerator]
    for found in offers([get_model(model)], tiers, demand, criteria(SLO, ATTAIN)):
        if isinstance(found, Offer):
            lines.append(found)
        else:
            misfits += 1
    yield f"\n## {title}\n"
    if lines and lines[0].served < 1:
        yield f"{1 - lines[0].served:.1%} of the trace's requests do not fit into its context and are left out.\n"
    yield "| tier | chip | USD/h | split | requests/s | USD per 1M output | evidence |"
    yield "|---|---|---|---|---|---|---|"
    for one in sorted(lines, key=lambda one: (one.is_bound, one.usd_per_1m_output)):
        split = f"{one.engine.tensor_parallel} x {one.replicas}"
        yield (
            f"| {one.tier.name} | {one.engine.chip} | {one.tier.usd_per_hour:g} | {split} | {one.requests_per_s:.3g} | "
            f"{cost(one)} | {evidence(one)} |"
        )
    if misfits:
        yield f"\n{misfits} other tiers cannot hold it, or keep the SLO at no rate."


def main() -> None:
    """Write the page, a model at a time."""
    demand = demand_of(open_trace(TRACE))
    inputs, outputs = demand.input_tokens.mean(), demand.output_tokens.mean()
    text = HEAD.format(
        vllm=VLLM, attain=ATTAIN, ttft=SLO["ttft"], tpot=SLO["tpot"] * 1000, inputs=inputs, outputs=outputs
    )  # fmt: skip
    with ProcessPoolExecutor(3) as pool:
        for lines in pool.map(table, MODELS.keys(), MODELS.values(), repeat(demand)):
            text += "\n".join(lines) + "\n"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
