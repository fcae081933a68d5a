"""What others wrote, read within bounds: any file may be a pipe, endless, or nested ten thousand levels deep."""

from __future__ import annotations

import msgspec

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises for bytes that are not what was asked for; RecursionError is JSON nested too deep."""
