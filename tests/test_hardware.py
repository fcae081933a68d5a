from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from cluster.catalogue.models import architecture, get_model
from cluster.catalogue.tiers import get_tier, list_tiers
from cluster.hardware.bound import bound_step, shape_of
from cluster.hardware.chips import chip_of, chips
from cluster.hardware.engine import engine_for
from cluster.simulator.step_time import Chunk
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
    first_s, more_s, _ = step.decode_run(7, 7000)
    assert first_s + 12 * more_s == pytest.approx(step((), 7, 7000 + 12 * 7), rel=1e-12)


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
