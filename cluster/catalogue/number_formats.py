"""Number formats of weights that are smaller than a model's arithmetic, as checkpoints of each kind state them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
"""A model's config.json: whatever its authors wrote."""

BLACKWELL = frozenset({"B200", "B300", "GB200", "GB300", "RTX-PRO-6000"})
"""Compute capability 10 and above (source: vLLM's page on INT8 W8A8, which it has not there)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """A number format of weights that is smaller than the model's arithmetic."""

    bits: float
    """Of one quantised weight with its share of scales and zero points."""
    block: int = 1
    """Weights share a scale in blocks of this many: a part of a split matrix has to hold whole blocks."""
    experts_only: bool = False
    """Attention stays in 16 bits too; else only embeddings and output head do."""
    not_on: frozenset[str] = frozenset()
    """Accelerators for which vLLM has no kernel of it."""
    config: Config
    """``quantization_config`` as the checkpoints of this kind have it."""


def _compressed(kind: str, strategy: str, inputs: str) -> Config:
    """A ``compressed-tensors`` configuration of all linear layers but the output head, 8 bits."""
    number: dict[str, object] = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": strategy, "dynamic": False},
        "input_activations": {**number, "strategy": inputs, "dynamic": inputs == "token"},
    }
    return {
        "quant_method": "compressed-tensors", "format": f"{kind}-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip


def _grouped(group: int) -> Config:
    """The same for weights of 4 bits, whose groups of a row share a scale; activations stay as they are."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip


_AWQ: Config = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
QUANTIZATIONS: dict[str, Quantization] = {
    "fp8": Quantization(bits=8, config=_compressed("float", "tensor", "tensor")),
    "fp8-block": Quantization(bits=8, block=128, config=_BLOCK),
    "int8": Quantization(bits=8, not_on=BLACKWELL, config=_compressed("int", "channel", "token")),
    # 4 bits, and for each 64 weights a 16-bit scale.
    "int4": Quantization(bits=4 + 16 / 64, block=64, config=_grouped(64)),
    # 4 bits, and for each 128 weights a 16-bit scale and a 4-bit zero point.
    "awq": Quantization(bits=4 + 20 / 128, block=128, config=_AWQ),
    # 4 bits, and an 8-bit scale for each 32 weights.
    "mxfp4": Quantization(
        bits=4 + 8 / 32, experts_only=True, config={"quant_method": "mxfp4", "modules_to_not_convert": _PLAIN}
    ),
}
FORMATS = {"int-quantized": "int8", "pack-quantized": "int4", "float-quantized": "fp8"}
"""Formats of compressed-tensors and what they hold."""
