"""What calibrations foretell: the sections of docs/ACCURACY.md on them."""

from __future__ import annotations

import json

import numpy as np

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.simulated import measured_engine
from harness.cluster.hardware.calibrating import KERNELS
from tests.accuracy.calibrated import sections
from tests.accuracy.own_runs import SECOND, foretell, models, qwen_fit, qwen_off
from tests.accuracy.page import PAGE
from tests.accuracy.recovery import FOUND, TRUTH


def test_one_factor_from_the_first_seconds_of_a_strangers_run_brings_every_figure_within_5_percent() -> None:
    found = qwen_fit(KERNELS)
    assert set(found.not_told) == {"mixed", "sequence_s"}, "those seconds hold hardly a step that only decodes"
    assert found.errors["kernels"] < 0.05
    assert np.abs(qwen_off(found.values)).max() < 0.03
    assert np.abs(qwen_off(None)).min() > 0.15, "without it"


def test_two_loads_of_own_runs_foretell_the_others() -> None:
    assert models()
    for model in models():
        found, loads = foretell(model, SECOND)
        assert found.condition < 30
        others = [one for one in loads if one.fitted_to != "itself"]
        assert len(others) >= 2
        for one in others:
            ttft, tpot, cost = np.abs(one.off)
            assert cost < 0.10 and tpot < 0.10 and ttft < 0.20, one


def test_known_numbers_are_found_within_their_standard_errors() -> None:
    found = json.loads(FOUND.read_text(encoding="utf-8"))
    assert {one["number"] for one in found} == TRUTH.keys()
    for one in found:
        assert one["seeds"] >= 40 and one["told"] == one["seeds"], one
        assert one["within_2"] >= 0.85 and abs(one["mean"]) < 0.7 and one["spread"] < 1.3, one


def test_steps_on_a_cpu_are_not_planned_ahead() -> None:
    """vLLM 0.32 ``CpuPlatform.check_and_update_config``: "async scheduling is not required on CPU"."""
    limits = measured_engine(get_model("smollm2-135m"), get_tier("aws-m7a.large"), ()).limits
    assert not limits.async_scheduling and limits.block_size == 128


def test_the_page_shows_them() -> None:
    assert sections() in PAGE.read_text(encoding="utf-8")
