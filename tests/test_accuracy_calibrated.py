"""What calibrations foretell: the sections of docs/ACCURACY.md on them."""

from __future__ import annotations

import numpy as np

from harness.cluster.catalogue.models import get_model
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.engines.simulated import measured_engine
from harness.cluster.hardware.calibrating import KERNELS
from tests.accuracy.own_runs import qwen_fit, qwen_off


def test_one_factor_from_the_first_seconds_of_a_strangers_run_brings_every_figure_within_5_percent() -> None:
    found = qwen_fit(KERNELS)
    assert set(found.not_told) == {"mixed", "sequence_s"}, "those seconds hold hardly a step that only decodes"
    assert found.errors["kernels"] < 0.05
    assert np.abs(qwen_off(found.values)).max() < 0.03
    assert np.abs(qwen_off(None)).min() > 0.15, "without it"


def test_steps_on_a_cpu_are_not_planned_ahead() -> None:
    """vLLM 0.32 ``CpuPlatform.check_and_update_config``: "async scheduling is not required on CPU"."""
    limits = measured_engine(get_model("smollm2-135m"), get_tier("aws-m7a.large"), ()).limits
    assert not limits.async_scheduling and limits.block_size == 128
