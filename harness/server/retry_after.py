"""``Retry-After``: when a server that is overloaded wants to be asked again.

Source: RFC 9110 section 10.2.3 (seconds, or a date).
"""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime

_SECONDS = re.compile(r"\d{1,9}(?:\.\d{1,9})?")


def retry_after_s(said: str | None, now_unix_s: float | None = None) -> float | None:
    """Seconds from now, 0 for a date that has passed; null when nothing was said that can be read.

    Fractions are no part of the standard, but some gateways send them.
    """
    said = (said or "").strip()
    if _SECONDS.fullmatch(said):
        return float(said)
    try:
        when = parsedate_to_datetime(said).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, when - (time.time() if now_unix_s is None else now_unix_s))
