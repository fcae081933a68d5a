"""Which hot path there is: the compiled one, where it could be built, or the same in Python."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING or os.environ.get("HARNESS_INTERPRETED"):
    from scenarios.reading import Kept, Pattern, Reader
else:
    try:
        from scenarios._reading import Kept, Pattern, Reader
    except ImportError:  # there was no C compiler when this was installed
        from scenarios.reading import Kept, Pattern, Reader

COMPILED = Reader.__module__ == "scenarios._reading"
"""False also where the variable HARNESS_INTERPRETED says to do without."""

__all__ = ["COMPILED", "Kept", "Pattern", "Reader"]
