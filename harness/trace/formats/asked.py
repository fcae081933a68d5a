"""What the user says of a trace whose columns or times nothing describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Role = Literal["arrival", "input", "output", "session", "model", "cached"]
"""What a column of a table can be."""
ROLES: tuple[Role, ...] = get_args(Role)
TimeUnit = Literal["s", "ms", "us", "ns"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user says of a table."""

    columns: Mapping[Role, str] = field(default_factory=dict)
    unit: TimeUnit | None = None
