"""Prometheus text format 0.0.4, written: families of samples and histograms with vLLM's own buckets.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/; vLLM, vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.analysis.arrays import Floats

PREFIX = "harness_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric: its name without `PREFIX`, what it is, and its samples: labels, value and, in a histogram, the end of
    the name.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    samples: Sequence[tuple[Labels, float] | tuple[Labels, float, str]]


_SECONDS: Mapping[str, tuple[str, str, tuple[float, ...]]] = {
    "ttft": (
        "time_to_first_token_seconds", "Time to first token, from the planned time; a sample of requests.",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640,
         2560),
    ),
    "tpot": (
        "request_time_per_output_token_seconds", "Time per output token after the first; a sample of requests.",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    ),
    "e2e": (
        "e2e_request_latency_seconds", "From the planned time to the end of the answer; a sample of requests.",
        (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
    ),
}  # fmt: skip


class Histogram:
    """Samples of a latency, "ttft", "tpot" or "e2e", counted into vLLM's buckets."""

    def __init__(self, metric: str) -> None:
        self._name, self._help, self._edges = _SECONDS[metric]
        self._counts = np.zeros(len(self._edges) + 1)
        self._sum_s = 0.0

    def add(self, values_s: Floats) -> None:
        """Count these; a value on an edge lies below it."""
        self._counts += np.bincount(np.searchsorted(self._edges, values_s), minlength=len(self._counts))
        self._sum_s += float(values_s.sum())

    def family(self) -> Family:
        """As it is now."""
        upto = np.cumsum(self._counts)
        edges = [*(f"{edge:g}" for edge in self._edges), "+Inf"]
        buckets = [({"le": edge}, float(n), "_bucket") for edge, n in zip(edges, upto, strict=True)]
        return Family(
            self._name, "histogram", self._help,
            [*buckets, ({}, self._sum_s, "_sum"), ({}, float(upto[-1]), "_count")],
        )  # fmt: skip


def exposition(families: Iterable[Family], labels: Labels) -> str:
    """The whole page; ``labels`` are on every sample. Families without a sample are left out."""
    lines: list[str] = []
    for family in families:
        name = PREFIX + family.name
        if family.samples:
            lines += [f"# HELP {name} {_escaped(family.help)}", f"# TYPE {name} {family.kind}"]
        for own, value, *end in family.samples:
            said = ",".join(f'{key}="{_escaped(text, quote=True)}"' for key, text in {**labels, **own}.items())
            lines.append(f"{name}{''.join(end)}{{{said}}} {value:.15g}")
    return "\n".join([*lines, ""])


def _escaped(text: str, quote: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text
