"""The roofline: what a step takes at least, by the model's architecture and the chip's data sheet (`BoundStep`).

Weights are read once a step, and each token is multiplied with those that work on it; whichever takes longer at the
sheet's figures is counted, for the layers, the attention and the output head one after the other. Launches,
communication, softmax, norms and all that the host does count nothing. Of experts only those of one token are read, as
if all tokens of a step chose the same.
Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from harness.cluster.catalogue.models import kv_bytes_per_token
from harness.cluster.catalogue.number_formats import QUANTIZATIONS, Config
from harness.cluster.hardware.chips import Chip
from harness.cluster.simulator.step_time import Chunk
from harness.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of an architecture decides its speed. Numbers of weights, in all layers."""

    layers: int
    attention: int
    """Projections of the attention; with latent attention those of its factors."""
    feed_forward: int
    """That work on one token."""
    head: int
    """Of the output."""
    heads_width: int
    """Query heads x their width: what each token and each context token are multiplied with, twice."""
    window: int | None


def shape_of(config: Config) -> Shape:
    """The shape of a transformer. Raises `UsageError` for one whose configuration does not say what is needed."""
    try:
        return _shape(config)
    except (KeyError, TypeError) as e:
        raise UsageError(f"config.json: {e} is missing or not a number, so the model's speed is not known") from e


def _shape(config: Config) -> Shape:
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    if rank := config.get("kv_lora_rank"):
        rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
        query = config.get("q_lora_rank") or hidden
        attention = hidden * (rank + rope) + query * heads * (nope + rope) + heads * rank * (nope + value)
        attention += (hidden * query if query != hidden else 0) + heads * value * hidden
        width = heads * (nope + rope + value) // 2
    else:
        width = heads * (config.get("head_dim") or hidden // heads)
        groups = config.get("num_key_value_heads") or heads
        attention = hidden * (2 * width + 2 * width * groups // heads)
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    wide = 3 * hidden * config["intermediate_size"]
    if experts:
        one = 3 * hidden * (config.get("moe_intermediate_size") or config["intermediate_size"])
        used = config["num_experts_per_tok"] + (config.get("n_shared_experts") or 0)
        dense = config.get("first_k_dense_replace") or 0
        feed_forward = (layers - dense) * used * one + dense * wide
    else:
        feed_forward = layers * wide
    window = config.get("sliding_window") if config.get("use_sliding_window") is not False else None
    return Shape(
        layers=layers, attention=layers * attention, feed_forward=feed_forward, head=hidden * config["vocab_size"],
        heads_width=width, window=window,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class BoundStep:
    """Seconds that a step takes at least; linear in prompt tokens where the arithmetic binds."""

    weights_s: float
    """To read the layers' weights."""
    token_s: float
    """Arithmetic of the layers for one token."""
    head_s: float
    """To read the output head."""
    logits_s: float
    """Arithmetic of the head for one sequence."""
    context_s: float
    """To read the keys and values of one token."""
    pair_s: float
    """Arithmetic of one token with one of its context."""

    def __call__(self, chunks: Sequence[Chunk], decoding: int, context: int) -> float:
        """Seconds of this step."""
        tokens, read, pairs = decoding, context, context
        for new, done in chunks:
            tokens += new
            read += done
            pairs += new * done + new * (new + 1) // 2
        return (
            max(self.weights_s, tokens * self.token_s)
            + max(self.head_s, (decoding + len(chunks)) * self.logits_s)
            + max(read * self.context_s, pairs * self.pair_s)
        )

    def decode_s(self, decoding: int, contexts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Seconds of steps that only decode, the context of each given (`ManySteps`): as one by one."""
        fixed_s = max(self.weights_s, decoding * self.token_s) + max(self.head_s, decoding * self.logits_s)
        return np.asarray(fixed_s + np.maximum(contexts * self.context_s, contexts * self.pair_s))


def bound_step(
    config: Config, chip: Chip, *, quantization: str | None = None, tensor_parallel: int = 1, kv_bytes: float = 2
) -> BoundStep:  # fmt: skip
    """The roofline of a model on ``tensor_parallel`` of a chip. ``kv_bytes``: of one number in the KV cache.

    Weights are in 16 bits or those of ``quantization`` (one of `QUANTIZATIONS`); where only experts are quantised the
    attention stays in 16. A window is not counted, since a bound may be too low: layers that have one read nothing.
    """
    shape = shape_of(config)
    kind = None if quantization is None else QUANTIZATIONS[quantization]
    bits = 16.0 if kind is None else kind.bits
    plain = shape.attention if kind is not None and kind.experts_only else 0
    packed = shape.attention + shape.feed_forward - plain
    bandwidth, flops = chip.memory_gb_per_s * 1e9 * tensor_parallel, 1e12 * tensor_parallel
    seen = 0.0 if shape.window else 1.0
    return BoundStep(
        weights_s=(packed * bits / 8 + plain * 2) / bandwidth,
        token_s=2 * (packed / chip.tflops(bits) + plain / chip.bf16_tflops) / flops,
        head_s=shape.head * 2 / bandwidth,
        logits_s=2 * shape.head / (chip.bf16_tflops * flops),
        context_s=seen * kv_bytes_per_token(config, kv_bytes, tensor_parallel) / (chip.memory_gb_per_s * 1e9),
        pair_s=seen * 4 * shape.layers * shape.heads_width / (chip.tflops(8 * kv_bytes) * flops),
    )  # fmt: skip
