"""What an accelerator can do at most, and which one a tier has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from harness.cluster.catalogue import read_catalogue
from harness.errors import UsageError, unknown_name
from harness.record.manifest import Tier

CHIPS = Path(__file__).with_name("chips.toml")

FORMS = {
    "lambda-h100-pcie": "H100-PCIe",
    "azure-nc40ads-h100-v5": "H100-NVL",
    "azure-nc80adis-h100-v5": "H100-NVL",
    "azure-nc24ads-a100-v4": "A100-PCIe",
}
"""Tiers whose accelerator is not the form (SXM) that its name stands for. Source: the providers' pages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Figures of a data sheet, dense."""

    name: str
    memory_gb_per_s: float
    bf16_tflops: float
    fp8_tflops: float | None = None
    """None: no units for it; weights in 8 bits are computed with in 16."""
    fp4_tflops: float | None = None
    link_gb_per_s: float
    """To the neighbours, one direction."""
    compute_capability: float
    source: str
    kernels: str | None = None
    """The system's name in NVIDIA's tables; None: it is not in them."""
    sister: str | None = None
    """A chip of the same die that is in the tables, whose figures are scaled by both data sheets."""

    def tflops(self, bits: float) -> float:
        """Most operations with weights of so many bits, 10^12/s."""
        if bits <= 4.5 and self.fp4_tflops is not None:
            return self.fp4_tflops
        if bits <= 8 and self.fp8_tflops is not None:
            return self.fp8_tflops
        return self.bf16_tflops


@cache
def chips() -> dict[str, Chip]:
    """Every chip by name."""
    return read_catalogue(CHIPS, Chip)


def chip_of(tier: Tier) -> Chip:
    """The chip of a tier. Raises `UsageError` for a tier without accelerators or with one that has no sheet here."""
    if tier.accelerator is None:
        raise UsageError(f"tier {tier.name} has no accelerator, and CPUs are not simulated: measure it, or fit a run")
    name = FORMS.get(tier.name, tier.accelerator)
    if name == "A100" and (tier.accelerator_memory_gib or 80) <= 40:
        name = "A100-40GB"
    if name not in chips():
        raise unknown_name(f"tier {tier.name}: chip", name, chips())
    return chips()[name]
