"""The limits that vLLM's API server chooses for a device when nobody says them, and the sizes of its CUDA graphs.

Source: vLLM 0.32 ``EngineArgs.get_batch_defaults`` and ``VllmConfig._set_cudagraph_sizes``, which tests/vllm_oracle.py
asks beside these. Not here: tensor units, speculative decoding, and whatever a user sets.
"""

from __future__ import annotations

from harness.cluster.simulator.scheduler import Limits

GIB = 1 << 30


def gpu_limits(memory_bytes: int, name: str) -> Limits:
    """Of a GPU with so much memory in all; ``name`` as the driver says it, since an A100 is held to less."""
    if memory_bytes >= 160 * GIB:
        return _limits(tokens=16_384, seqs=1024)
    if memory_bytes >= 70 * GIB and "a100" not in name.lower():
        return _limits(tokens=8192, seqs=1024)
    return _limits(tokens=2048, seqs=256)


def cpu_limits(world_size: int = 1) -> Limits:
    """Of a server on a CPU; ``world_size``: its tensor parallel times its pipeline parallel size."""
    return _limits(tokens=2048 * world_size, seqs=128 * world_size)


def _limits(*, tokens: int, seqs: int) -> Limits:
    return Limits(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, prefix_cache=True, async_scheduling=True
    )  # fmt: skip


def graph_sizes(limits: Limits, *, compute_capability: int) -> list[int]:
    """Tokens of the steps for which vLLM keeps a CUDA graph, ascending.

    A step of fewer tokens is padded to the next of these, one of more runs without a graph. ``compute_capability``: the
    major number, 9 for Hopper, 10 for B200 and its like. Needs ``max_num_batched_tokens``.
    """
    tokens = limits.max_num_batched_tokens
    assert tokens is not None
    seqs = limits.max_num_seqs
    most = min(2 * seqs, 1024 if compute_capability == 10 else 512)
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, most + 1, 16)]
    # the largest step and the largest that only decodes have graphs of their own
    sizes += [own for own in (tokens, seqs) if own <= most]
    return sorted({size for size in sizes if size <= min(most, tokens)})
