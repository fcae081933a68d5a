from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from harness.cluster.catalogue.models import architecture, get_model
from harness.cluster.catalogue.tiers import get_tier, list_tiers
from harness.cluster.hardware.bound import bound_step, shape_of
from harness.cluster.hardware.chips import Chip, chip_of, chips
from harness.cluster.hardware.engine import engine_for
from harness.cluster.hardware.kernels import DONE, LENGTH, NEW, SEQUENCES, TOKENS, Entry, KernelStep, entries
from harness.cluster.simulator.step_time import Chunk
from harness.errors import UsageError


def test_every_accelerator_of_the_catalogue_has_a_sheet() -> None:
    found = {tier.name: chip_of(tier).name for tier in list_tiers() if tier.accelerator}
    assert found["aws-p4d.24xlarge"] == "A100-40GB"
    assert found["aws-p4de.24xlarge"] == "A100"
    assert found["lambda-h100-pcie"] == "H100-PCIe"
    with pytest.raises(UsageError, match="has no accelerator"):
        chip_of(get_tier("aws-m7a.large"))


@pytest.mark.parametrize(
    ("name", "parameters", "used"),
    [
        ("mistral-7b-v0.3", 7_248_023_552, None), ("llama-2-13b", 13_015_864_320, None),
        ("llama-3.1-70b", 70_553_706_496, None), ("qwen3-30b-a3b", 30_532_122_624, 3.35e9),
        ("gpt-oss-120b", 116_829_156_672, 5.1e9 + 201_088 * 2880), ("deepseek-v3", 671_026_419_200, 37e9),
        ("kimi-k2", 1_026_408_232_448, 32e9),
    ],
)  # fmt: skip
def test_shapes_have_the_parameters_that_the_models_publish(name: str, parameters: int, used: float | None) -> None:
    shape, config = shape_of(architecture(name)), architecture(name)
    worked = shape.attention + shape.feed_forward + shape.head
    embeddings = config["hidden_size"] * config["vocab_size"]
    assert worked + embeddings == pytest.approx(used or parameters, rel=0.08 if used else 0.001)


def test_the_bound_is_what_hand_and_sheet_say() -> None:
    step = bound_step(architecture("llama-2-13b"), chips()["A100"])
    weights = 40 * (4 * 5120**2 + 3 * 5120 * 13824) * 2
    read_s = (weights + 32000 * 5120 * 2 + 40 * 2 * 5120 * 2 * 32 * 1000) / 2039e9
    assert step((), 32, 32 * 1000) == pytest.approx(read_s, rel=1e-6)
    flops = weights * 8192 + 4 * 40 * 5120 * 8192 * 8193 / 2
    assert step([Chunk(8192, 0)], 0, 0) == pytest.approx(flops / 312e12 + 32000 * 5120 * 2 / 2039e9, rel=1e-6)


def test_the_bound_grows_with_work_and_a_run_of_decodes_is_its_steps() -> None:
    step = bound_step(architecture("llama-3.1-8b"), chips()["H100"], quantization="fp8")
    for sizes in pairwise(2**k for k in range(14)):
        assert step((), sizes[0], 1000 * sizes[0]) < step((), sizes[1], 1000 * sizes[1])
        assert step([Chunk(sizes[0], 0)], 1, 10) <= step([Chunk(sizes[1], 0)], 1, 10)
        assert step((), 8, 8 * sizes[0]) < step((), 8, 8 * sizes[1])
    contexts = 7000 + 7 * np.arange(100)
    assert step.decode_s(7, contexts).tolist() == [step((), 7, context) for context in contexts.tolist()]


def test_an_engine_has_the_limits_of_its_device_and_the_memory_left_beside_the_weights() -> None:
    engine = engine_for(get_model("llama-3.1-8b-instruct"), get_tier("lambda-h100"), source="bound")
    assert (engine.limits.max_num_batched_tokens, engine.limits.max_num_seqs) == (8192, 1024)
    assert engine.limits.kv_blocks is not None
    cache_gib = engine.limits.kv_blocks * 16 * 131_072 / 2**30
    assert 80 * 0.92 - 8_030_261_248 * 2 / 2**30 - cache_gib == pytest.approx(2.5, abs=0.5)  # runtime and peak
    assert engine.limits.async_scheduling and engine.source == "bound"
    small = replace(get_model("llama-3.1-70b-instruct"), tensor_parallel_size=1)
    with pytest.raises(UsageError, match="does not fit"):
        engine_for(small, get_tier("lambda-h100"))
    with pytest.raises(UsageError, match="has 1 accelerators, not 2"):
        engine_for(get_model("llama-3.1-8b-instruct"), get_tier("lambda-h100"), tensor_parallel=2)


def _all_tables() -> list[tuple[Chip, str, Entry]]:
    measured = [chip for chip in chips().values() if chip.kernels]
    return [(chip, key, entry) for chip in measured for key, entry in entries(str(chip.kernels)).items()]


def test_no_point_of_any_table_is_faster_than_the_roofline_or_falls_with_more_work() -> None:
    checked = 0
    for chip, key, entry in _all_tables():
        tables, (name, form, parts) = entry.tables, key.split()
        if tables is None:
            continue
        quantization = None if form == "bf16" else form
        least = bound_step(architecture(name), chip, quantization=quantization, tensor_parallel=int(parts[2:]))
        tokens = np.array(TOKENS)
        layers = np.maximum(least.weights_s, tokens * least.token_s)
        head = np.maximum(least.head_s, tokens * least.logits_s)
        assert (np.array(tables.read_s) >= layers).all(), (chip.name, key)
        assert (np.array(tables.decode_s) >= layers + head).all(), (chip.name, key)
        assert (np.array(tables.logits_s) >= head).all(), (chip.name, key)
        for k, new in enumerate(NEW):
            bare = [max(done * least.context_s, (new * done + new * (new + 1) // 2) * least.pair_s) for done in DONE]
            assert (np.array(tables.read_attention_s[k]) >= bare).all(), (chip.name, key, new)
        for k, sequences in enumerate(SEQUENCES):
            bare = [sequences * size * max(least.context_s, least.pair_s) for size in LENGTH]
            assert (np.array(tables.decode_attention_s[k]) >= bare).all(), (chip.name, key, sequences)
        for row in (tables.read_s, tables.decode_s, tables.logits_s):
            assert (np.diff(row) >= 0).all(), (chip.name, key)
        for rows in (np.array(tables.read_attention_s), np.array(tables.decode_attention_s)):
            assert (np.diff(rows, axis=0) >= 0).all() and (np.diff(rows, axis=1) >= 0).all(), (chip.name, key)
        checked += 1
    assert checked > 400


def test_a_quantised_step_slower_than_the_plain_one_is_refused_and_four_bits_are_never_measured() -> None:
    kept = [(chip, key, entry) for chip, key, entry in _all_tables() if entry.tables is not None]
    assert not [key for _, key, _ in kept if key.split()[1] not in ("bf16", "fp8", "fp8-block")]
    refused = entries("rtx_pro_6000_server")["qwen3-8b fp8-block tp1"]
    assert refused.tables is None and "x those in 16 bits" in str(refused.refused)
    graphs = [1, 2, 4, *range(8, 520, 8)]
    for chip, key, entry in kept:
        name, form, parts = key.split()
        plain = entries(str(chip.kernels)).get(f"{name} bf16 {parts}")
        if form == "bf16" or plain is None or entry.tables is None or plain.tables is None:
            continue
        one, other = KernelStep(entry.tables, graphs), KernelStep(plain.tables, graphs)
        for work in (((), 8, 8 * 1024), ((), 128, 128 * 1024), ([Chunk(2048, 0)], 0, 0), ([Chunk(8192, 0)], 0, 0)):
            assert one(*work) <= 1.1 * other(*work), (chip.name, key, work)
    for name in ("llama-3.1-8b-instruct-awq", "llama-3.1-8b-instruct-int8"):
        engine = engine_for(get_model(name), get_tier("lambda-h100"))
        assert engine.source == "bound" and "no kernels" in engine.facts["not_kernels"]
        with pytest.raises(UsageError, match="no kernels"):
            engine_for(get_model(name), get_tier("lambda-h100"), source="kernels")


@pytest.mark.parametrize("model", ["mistral-7b-instruct-v0.3", "llama-2-13b-chat-fp8", "qwen3-30b-a3b"])
def test_a_step_by_kernels_grows_with_work_and_many_are_as_one_by_one(model: str) -> None:
    engine = engine_for(get_model(model), get_tier("lambda-h100x2"), source="kernels")
    bound = engine_for(get_model(model), get_tier("lambda-h100x2"), source="bound")
    step, least = engine.step_time, bound.step_time
    assert isinstance(step, KernelStep)
    assert engine.facts["tables"].startswith("aiconfigurator-core 0.12.0")
    for few, many in pairwise((1, 2, 3, 7, 8, 9, 30, 100, 256, 257, 511, 600, 1000)):
        assert least((), few, few * 700) < step((), few, few * 700) <= step((), many, many * 700)
        assert step((), 8, 8 * few) <= step((), 8, 8 * many)
        assert least([Chunk(few, 0)], 5, 100) < step([Chunk(few, 0)], 5, 100) <= step([Chunk(many, 0)], 5, 100)
        assert step([Chunk(64, few)], 5, 100) <= step([Chunk(64, many)], 5, 100)
        assert step([Chunk(64, 0)], few, 9 * few) <= step([Chunk(64, 0)], many, 9 * many)
    contexts = 7 * np.arange(1, 3000)
    assert step.decode_s(7, contexts).tolist() == [step((), 7, context) for context in contexts.tolist()]


def test_layers_with_a_window_are_refused_and_several_cards_over_pcie_are_stamped() -> None:
    with pytest.raises(UsageError, match="sliding window"):
        engine_for(get_model("gpt-oss-20b"), get_tier("lambda-h100"))
    assert "PCIe" in engine_for(get_model("qwen3-32b"), get_tier("aws-g6e.12xlarge")).facts["uncalibrated"]
