"""Step times from NVIDIA's measured kernels (`KernelStep`), on the chips for which tables/NOTICE says there are some.

A step that only decodes is one CUDA graph of the next size; one that reads prompts is the kernels for all its tokens,
attention for each chunk and for the decoding sequences, and the output head. Five constants stand for what no table
has; `docs/ACCURACY.md` says how far they go, on chips and models that they were not fitted to.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from harness.cluster.hardware.bound import BoundStep
from harness.cluster.simulator.step_time import Chunk

FOLDER = Path(__file__).with_name("tables")
Floats = npt.NDArray[np.float64]

TOKENS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
    16384, 32768,
)  # fmt: skip
NEW = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DONE = (0, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LENGTH = (1, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 32768, 65536, 131072)
GRID = {"tokens": TOKENS, "new": NEW, "done": DONE, "sequences": SEQUENCES, "length": LENGTH}

Row = tuple[float, ...]
_LENGTH = np.array(LENGTH, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """What parts of a step take, s, on the grid above."""

    read_s: Row
    """By tokens of a step that reads prompts: all but attention and output head."""
    decode_s: Row
    """By tokens of a step that only decodes: all but attention."""
    logits_s: Row
    """Output head, by sequences that get a token."""
    read_link_s: Row
    """The part of ``read_s`` that is communication between chips."""
    decode_link_s: Row
    read_attention_s: tuple[Row, ...]
    """Of a chunk, by its new tokens and those read before."""
    decode_attention_s: tuple[Row, ...]
    """By sequences and their mean length."""
    layers: int

    def to_array(self) -> Floats:
        """One row of a file: all but ``layers``."""
        parts = (
            self.read_s, self.decode_s, self.logits_s, self.read_link_s, self.decode_link_s, self.read_attention_s,
            self.decode_attention_s,
        )  # fmt: skip
        return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in parts])

    @staticmethod
    def of_array(values: npt.ArrayLike, layers: int) -> Tables:
        """The inverse of `to_array`."""
        flat = np.asarray(values, dtype=np.float64)
        n, edge = len(TOKENS), 5 * len(TOKENS)
        rows = [tuple(flat[k * n : (k + 1) * n].tolist()) for k in range(5)]
        read = flat[edge : edge + len(NEW) * len(DONE)].reshape(len(NEW), len(DONE))
        decode = flat[edge + read.size :].reshape(len(SEQUENCES), len(LENGTH))
        return Tables(
            read_s=rows[0], decode_s=rows[1], logits_s=rows[2], read_link_s=rows[3], decode_link_s=rows[4],
            read_attention_s=tuple(map(tuple, read.tolist())), decode_attention_s=tuple(map(tuple, decode.tolist())),
            layers=layers,
        )  # fmt: skip


def floor(least: BoundStep) -> Floats:
    """The roofline of every point of `Tables.to_array`; 0 for communication."""
    tokens = np.array(TOKENS, dtype=np.float64)
    layers = np.maximum(least.weights_s, tokens * least.token_s)
    head = np.maximum(least.head_s, tokens * least.logits_s)
    new, done = np.array(NEW, dtype=np.float64)[:, None], np.array(DONE, dtype=np.float64)
    pairs = new * done + new * (new + 1) / 2
    context = np.outer(SEQUENCES, LENGTH).astype(np.float64)
    return np.concatenate([
        layers, layers + head, head, np.zeros(2 * len(tokens)),
        np.maximum(done * least.context_s, pairs * least.pair_s).ravel(),
        (context * max(least.context_s, least.pair_s)).ravel(),
    ])  # fmt: skip


def scaled(tables: Tables, measured: BoundStep, wanted: BoundStep) -> Tables:
    """Tables of a sister chip, which is so much faster or slower at each point as its roofline is."""
    here, there = floor(measured), floor(wanted)
    ratio = np.divide(there, here, out=np.ones_like(here), where=here > 0)
    return Tables.of_array(tables.to_array() * ratio, tables.layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What the kernels leave out, fitted to silicon by ``python -m tests.accuracy``."""

    mixed: float = 1.195
    """A step that reads prompts takes so many times its kernels."""
    launch_s: float = 0.731e-3
    """Of each layer, at least, in a step outside CUDA graphs: its launches."""
    arrival_s: float = 3.19e-3
    """Until the scheduler sees a request: HTTP, processes."""
    arrival_per_token_s: float = 7.85e-6
    """On top of that for each token of its prompt: tokenizer, copies."""
    host_s: float = 0.604e-3
    """Of each step, between its kernels and the next one's."""


@dataclass(slots=True)
class KernelStep:
    """Seconds of a step by tables and constants."""

    tables: Tables
    graphs: Sequence[int]
    """Sizes of the CUDA graphs (`vllm_limits.graph_sizes`)."""
    constants: Constants = field(default_factory=Constants)
    kernels: float = 1.0
    """Factor for all that the tables say (fitted to own runs)."""
    sequence_s: float = 0.0
    """Work of the host for each sequence of a step, on top of ``constants.host_s`` (fitted to own runs)."""
    _decode: dict[int, tuple[float, Row]] = field(default_factory=dict)
    """By sequences: seconds but for the attention, and the attention by mean length."""

    def __call__(self, chunks: Sequence[Chunk], decoding: int, context: int) -> float:
        """Seconds of this step."""
        t, c = self.tables, self.constants
        if not chunks:
            fixed_s, row = self._decoding(decoding)
            return fixed_s + _at(LENGTH, row, context / decoding)
        tokens, alone_s = decoding, t.read_attention_s[0][0]
        attention_s = alone_s * (1 - len(chunks))
        for new, done in chunks:
            tokens += new
            attention_s += _at2(NEW, DONE, t.read_attention_s, new, done)
        step_s = _at(TOKENS, t.read_s, tokens) + max(attention_s, alone_s)
        step_s += _at(TOKENS, t.logits_s, decoding + len(chunks))
        if decoding:
            step_s += _at2(SEQUENCES, LENGTH, t.decode_attention_s, decoding, context / decoding)
        step_s *= c.mixed * self.kernels
        if tokens > self.graphs[-1]:
            step_s = max(step_s, c.launch_s * t.layers)
        return step_s + c.host_s + self.sequence_s * (decoding + len(chunks))

    def decode_s(self, decoding: int, contexts: npt.NDArray[np.int64]) -> Floats:
        """Seconds of steps that only decode, the context of each given (`ManySteps`): as one by one."""
        fixed_s, row = self._decoding(decoding)
        mean = contexts / decoding
        axis, values = _LENGTH, np.array(row)
        k = np.clip(np.searchsorted(axis, mean, side="right") - 1, 0, len(axis) - 2)
        share = np.maximum(0.0, (mean - axis[k]) / (axis[k + 1] - axis[k]))
        return np.asarray(fixed_s + (values[k] + (values[k + 1] - values[k]) * share))

    def _decoding(self, decoding: int) -> tuple[float, Row]:
        known = self._decode.get(decoding)
        if known is None:
            t = self.tables
            size = self.graphs[bisect_left(self.graphs, decoding)] if decoding <= self.graphs[-1] else decoding
            fixed_s = _at(TOKENS, t.decode_s, size) * self.kernels
            host_s = self.constants.host_s + self.sequence_s * decoding
            k = _cell(SEQUENCES, decoding)
            share = (decoding - SEQUENCES[k]) / (SEQUENCES[k + 1] - SEQUENCES[k])
            low, high = t.decode_attention_s[k], t.decode_attention_s[k + 1]
            row = tuple(self.kernels * (a + share * (b - a)) for a, b in zip(low, high, strict=True))
            known = self._decode[decoding] = (fixed_s + host_s, row)
        return known


def _cell(axis: Sequence[int], value: float) -> int:
    """Index of the axis point below ``value`` whose line is followed; beyond the last one that of the last cell."""
    return max(0, min(bisect_right(axis, value) - 1, len(axis) - 2))


def _at(axis: Sequence[int], row: Row, value: float) -> float:
    k = _cell(axis, value)
    return row[k] + (row[k + 1] - row[k]) * max(0.0, (value - axis[k]) / (axis[k + 1] - axis[k]))


def _at2(first: Sequence[int], second: Sequence[int], rows: Sequence[Row], a: float, b: float) -> float:
    k = _cell(first, a)
    share = max(0.0, (a - first[k]) / (first[k + 1] - first[k]))
    low, high = _at(second, rows[k], b), _at(second, rows[k + 1], b)
    return low + share * (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of one configuration's tables."""

    tables: Tables | None
    """None: refused, or not in the package."""
    refused: str | None
    source: str
    """Package and version."""
    silicon_share: float
    """Of the time in the tables, how much the package says comes from measurements alone; the rest is interpolated
    from measurements of other shapes or estimated."""


def key_of(architecture: str, quantization: str | None, tensor_parallel: int, kv: str = "auto") -> str:
    """Name of a configuration's row in the tables of a chip."""
    return f"{architecture} {quantization or 'bf16'} tp{tensor_parallel}" + ("" if kv == "auto" else f" kv-{kv}")


@cache
def entries(system: str, folder: Path = FOLDER) -> dict[str, Entry]:
    """Every configuration of a chip in NVIDIA's naming, by `key_of`; empty for one that has no tables."""
    if not (folder / f"{system}.npz").exists():
        return {}
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    source = f"{index['package']} {index['version']}"
    with np.load(folder / f"{system}.npz") as file:
        values = file["values"]
    found = {}
    for key, facts in index["systems"][system].items():
        tables = None if facts["row"] is None else Tables.of_array(values[facts["row"]], facts["layers"])
        found[key] = Entry(
            tables=tables, refused=facts.get("refused"), source=f"{source}, vLLM {facts.get('vllm')}",
            silicon_share=facts.get("silicon", 0.0),
        )  # fmt: skip
    return found
