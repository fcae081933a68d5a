"""Load-test LLM serving on a production trace and turn the result into a price per million tokens.

The flow is files between steps: trace -> plan -> run -> rows -> report. Start with ``ARCHITECTURE.md``.
"""

from __future__ import annotations

__version__ = "0.1.0"
