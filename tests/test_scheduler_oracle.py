"""The simulator's scheduler is vLLM's: a small draw of `tests.vllm_oracle`, wherever vLLM is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from harness.cluster.simulator.scheduler import VLLM


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: pip install -e .[cpu]")
def test_the_scheduler_is_that_of_vllm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_oracle", "--draws", "24"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["vllm"] == VLLM, "another vLLM than the simulator was proved against: hold it against this one"
    assert found["identical"] == found["workloads"] == 24
    assert min(found["asynchronous"], found["with both"]) >= 8 and found["asynchronous"] <= 16
    assert found["limits that differ"] == 0
