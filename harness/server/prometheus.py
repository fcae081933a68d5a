"""Prometheus text, as servers show it at ``/metrics``: names, labels and values of the series that are asked for.

Both forms are read: the text format 0.0.4 and OpenMetrics 1.0, which ends in ``# EOF`` and may add an exemplar to a
sample. A line that is neither is left out, and costs no other line. Timestamps and exemplars are read over.

Source: Prometheus "Exposition formats"; OpenMetrics 1.0; quoted names as of Prometheus 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_STRING = r'"(?:[^"\\]|\\.)*+"'
_NAME = re.compile(rf"[ \t]*(?:([a-zA-Z_:][\w:]*)|\{{[ \t]*({_STRING})[ \t]*[,}}])")
_LABELS = re.compile(rf"[ \t]*\{{((?:[^\"}}]|{_STRING})*+)\}}")
_LABEL = re.compile(rf"([a-zA-Z_][\w]*|{_STRING})[ \t]*=[ \t]*({_STRING})")
_REST = re.compile(r"[ \t]*(\S+)(?:[ \t]+[-+.\deE]+)?[ \t]*(?:#[ \t].*)?$")
_ESCAPED = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: a series and its value, which may be infinite or not a number."""

    name: str
    labels: dict[str, str]
    value: float


def read_samples(text: str, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[Sample]:
    """The samples of one page, in order, of the series whose name is ``wanted``."""
    for line in text.split("\n"):
        if line.startswith("# EOF"):
            return
        name = _NAME.match(line)
        if name is None:
            continue
        bare, quoted = name.groups()
        called = bare or _unquoted(quoted)
        if wanted(called) and (sample := _sample(called, line, name.end() if bare else 0)) is not None:
            yield sample


def _sample(name: str, line: str, at: int) -> Sample | None:
    labels = _LABELS.match(line, at)
    rest = _REST.match(line.rstrip("\r"), at if labels is None else labels.end())
    try:
        value = float(rest[1]) if rest is not None else None
    except ValueError:
        value = None
    if value is None:
        return None
    found = _LABEL.findall(labels[1]) if labels is not None else []
    return Sample(name, {_unquoted(key): _unquoted(said) for key, said in found}, value)


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text[1:-1])


def total(values: Iterable[float]) -> float | None:
    """Their sum; null when any of them is no number, or there is none."""
    found = list(values)
    return sum(found) if found and all(map(math.isfinite, found)) else None


def mean(values: Iterable[float]) -> float | None:
    """The same of their mean."""
    found = list(values)
    summed = total(found)
    return None if summed is None else summed / len(found)
