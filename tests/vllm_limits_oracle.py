"""The limits of `cluster.simulator.vllm_limits` against vLLM's own, which is told what device it is on."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import vllm.platforms
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine import arg_utils
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from harness.cluster.simulator.scheduler import Limits
from harness.cluster.simulator.vllm_limits import GIB, cpu_limits, gpu_limits, graph_sizes

DEVICES = {
    "NVIDIA A10G": 24, "NVIDIA L4": 24, "NVIDIA L40S": 48, "NVIDIA A100-SXM4-40GB": 40, "NVIDIA A100-SXM4-80GB": 80,
    "NVIDIA RTX PRO 6000": 96, "NVIDIA H100 80GB HBM3": 80, "NVIDIA H200": 141, "NVIDIA B200": 180, "edge": 70,
    "below the edge": 69, "next edge": 160, "below the next": 159,
}  # fmt: skip
"""Names with memory, GiB."""


def limits_differ() -> list[str]:
    """Where the limits and graph sizes of `vllm_limits` are not vLLM's own."""
    wrong = []
    for cpu, name, size in [(False, *one) for one in DEVICES.items()] + [(True, "cpu", k) for k in (1, 2)]:
        said = cpu_limits(size) if cpu else gpu_limits(size * GIB, name)
        platform = SimpleNamespace(
            get_device_total_memory=lambda size=size: size * GIB, get_device_name=lambda name=name: name,
            is_tpu=lambda: False, is_cpu=lambda cpu=cpu: cpu,
        )  # fmt: skip
        with mock.patch.object(arg_utils, "current_platform", platform):
            tokens, seqs = EngineArgs.get_batch_defaults(size if cpu else 1)
        context = UsageContext.OPENAI_API_SERVER
        if (said.max_num_batched_tokens, said.max_num_seqs) != (tokens[context], seqs[context]):
            wrong.append(f"{name}: {said}, vLLM {tokens[context]} tokens, {seqs[context]} sequences")
        for capability in (9, 10):
            for seqs_said in (said.max_num_seqs, 1, 3, 100, 300):
                limits = Limits(max_num_seqs=seqs_said, max_num_batched_tokens=said.max_num_batched_tokens)
                if (sizes := graph_sizes(limits, compute_capability=capability)) != _graph_sizes(limits, capability):
                    wrong.append(f"graphs of {limits} on {capability}.x: {sizes}")
    return wrong


def _graph_sizes(limits: Limits, capability: int) -> list[int]:
    """What vLLM says."""
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, max_cudagraph_capture_size=None, cudagraph_capture_sizes=None,
        post_init_cudagraph_sizes=lambda: None,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False), compilation_config=compilation, uniform_decode_query_len=1,
        scheduler_config=limits, speculative_config=None, performance_mode="balanced",
    )  # fmt: skip
    with mock.patch.object(vllm.platforms, "current_platform", SimpleNamespace(
        is_device_capability_family=lambda family: family == 10 * capability
    )):  # fmt: skip
        VllmConfig._set_cudagraph_sizes(config)
    return list(compilation.cudagraph_capture_sizes)
