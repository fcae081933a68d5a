"""What a model's ``config.json`` says about memory: KV cache per token, size of the weights, how far it can be split.

Everything here is a pure function of a configuration under Hugging Face's own keys, so it works for the catalogue's
models (`ARCHITECTURES`, cluster/catalogue/architectures.toml), for a folder on disk, and before anything is fetched.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import UsageError, unknown_name

ARCHITECTURES = Path(__file__).with_name("architectures.toml")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number; "auto" and anything unknown count as 2, what nearly every checkpoint holds."""

BLACKWELL = frozenset({"B200", "B300", "GB200", "GB300", "RTX-PRO-6000"})
"""Compute capability 10 and above (source: vLLM's page on INT8 W8A8, which it has not there)."""

Config = Mapping[str, Any]
"""A model's config.json: whatever its authors wrote."""


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


def _compressed(kind: str, form: str, strategy: str, inputs: dict[str, object]) -> Config:
    """A ``compressed-tensors`` configuration of all linear layers but the output head, 8 bits."""
    number: dict[str, object] = {"num_bits": 8, "type": kind, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": strategy, "dynamic": False},
                "input_activations": {**number, **inputs},
            }
        },
    }


QUANTIZATIONS: dict[str, Quantization] = {
    "fp8": Quantization(
        bits=8, config=_compressed("float", "float-quantized", "tensor", {"strategy": "tensor", "dynamic": False})
    ),
    "fp8-block": Quantization(
        bits=8,
        block=128,
        config={"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "int8": Quantization(
        bits=8,
        not_on=BLACKWELL,
        config=_compressed("int", "int-quantized", "channel", {"strategy": "token", "dynamic": True}),
    ),
    # 4 bits, and for each 128 weights a 16-bit scale and a 4-bit zero point.
    "awq": Quantization(
        bits=4 + 20 / 128,
        block=128,
        config={"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    ),
    # 4 bits, and an 8-bit scale for each 32 weights.
    "mxfp4": Quantization(
        bits=4 + 8 / 32,
        experts_only=True,
        config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        },
    ),
}  # fmt: skip


@cache
def architectures() -> Mapping[str, Config]:
    """The shipped configurations by name."""
    return tomllib.loads(ARCHITECTURES.read_text(encoding="utf-8"))


def architecture(name: str) -> Config:
    """The shipped configuration of this name. Raises `UsageError` naming the nearest ones when there is none."""
    known = architectures()
    if name not in known:
        raise unknown_name("architecture", name, known)
    return dict(known[name])


def text_config(config: Config) -> Config:
    """The language part of a configuration: multimodal models keep it in a table of its own."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def is_transformer(config: Config) -> bool:
    """Whether the configuration has the keys that the functions here need."""
    keys = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "intermediate_size")
    return all(isinstance(config.get(key), int) and config[key] > 0 for key in keys)


def kv_bytes_per_token(config: Config, dtype_bytes: float = 2, tensor_parallel: int = 1) -> int:
    """KV cache of one token in every layer, bytes on each of ``tensor_parallel`` accelerators.

    Grouped heads are split, at least one on each; latent attention (DeepSeek) keeps one vector for all heads, whole
    on each. Layers that see only a window count in full: this is the growth before the window is full; see `kv_bytes`.

    Raises `UsageError` when the configuration does not say what is needed.
    """
    return int(_integer(config, "num_hidden_layers") * _layer_bytes(config, dtype_bytes, tensor_parallel))


def kv_bytes(config: Config, tokens: int, dtype_bytes: float = 2, tensor_parallel: int = 1) -> int:
    """KV cache of one request of ``tokens`` tokens, bytes on each accelerator; layers with a window keep only that."""
    layers = _integer(config, "num_hidden_layers")
    window = config.get("sliding_window")
    windowed = _windowed_layers(config, layers) if isinstance(window, int) else 0
    kept = (layers - windowed) * tokens + windowed * min(tokens, window or 0)
    return int(kept * _layer_bytes(config, dtype_bytes, tensor_parallel))


def weight_bytes(config: Config, parameters: int, dtype_bytes: float, quantization: str | None) -> int:
    """Size of the weights, bytes: quantised layers in their bits, the rest (embeddings, output head) in the dtype."""
    if quantization is None:
        return int(parameters * dtype_bytes)
    kind = QUANTIZATIONS[quantization]
    tables = 1 if config.get("tie_word_embeddings") else 2
    hidden = _integer(config, "hidden_size")
    plain = tables * _integer(config, "vocab_size") * hidden
    if kind.experts_only:
        heads = 2 * _integer(config, "num_attention_heads") + 2 * _integer(config, "num_key_value_heads")
        plain += _integer(config, "num_hidden_layers") * hidden * _head_dim(config) * heads
    return int(plain * dtype_bytes + (parameters - plain) * kind.bits / 8)


def tensor_parallel_sizes(config: Config, quantization: str | None, most: int) -> list[int]:
    """Numbers of accelerators, up to ``most``, over which the model can be split; 1 always is one.

    Attention heads have to divide evenly, key-value heads evenly or be repeated evenly, and the parts of the
    feed-forward layers have to hold whole quantisation blocks.
    """
    heads = _integer(config, "num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    width = config.get("moe_intermediate_size") or _integer(config, "intermediate_size")
    block = QUANTIZATIONS[quantization].block if quantization else 1
    return [
        n
        for n in range(1, most + 1)
        if n == 1 or (heads % n == 0 and (groups % n == 0 or n % groups == 0) and width % (n * block) == 0)
    ]


def _layer_bytes(config: Config, dtype_bytes: float, tensor_parallel: int) -> float:
    if config.get("kv_lora_rank"):
        return (_integer(config, "kv_lora_rank") + _integer(config, "qk_rope_head_dim")) * dtype_bytes
    groups = config.get("num_key_value_heads") or _integer(config, "num_attention_heads")
    return 2 * max(1, -(-groups // tensor_parallel)) * _head_dim(config) * dtype_bytes


def _windowed_layers(config: Config, layers: int) -> int:
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind == "sliding_attention" for kind in kinds)
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, int) and pattern > 0:
        return layers - layers // pattern  # every pattern-th layer sees everything
    return 0 if config.get("use_sliding_window") is False else layers


def _head_dim(config: Config) -> int:
    if isinstance(config.get("head_dim"), int):
        return _integer(config, "head_dim")
    return _integer(config, "hidden_size") // _integer(config, "num_attention_heads")


def _integer(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UsageError(f"config.json: {key} is {value!r}, so the memory this model needs is not known")
    return value
