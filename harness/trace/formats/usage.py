"""Token counts as APIs state them: what was read, whole, and what was written.

==============================================  ======================================================================
OpenAI: ``prompt_tokens``, ``completion_tokens``  cached and reasoning tokens are **inside** (Chat, Completions; LiteLLM
                                                too, whatever the model)
OpenAI Responses: ``input_tokens`` with          the same; ``input_tokens_details.cached_tokens`` is inside
``input_tokens_details``
Anthropic: ``input_tokens`` with                 what was written to the cache and read from it stands **beside**
``cache_creation_input_tokens``,                 ``input_tokens``: the prompt is the sum of the three
``cache_read_input_tokens``
==============================================  ======================================================================

Source: OpenAI API reference, ``usage`` of Chat Completions and Responses; Anthropic API reference, Messages, ``usage``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from harness.trace.formats.values import token_count

_READ, _WRITTEN = "cache_read_input_tokens", "cache_creation_input_tokens"
_DETAILS = ("prompt_tokens_details", "input_tokens_details")


class Usage(NamedTuple):
    """Tokens of one call; None: not stated."""

    input_tokens: int | None
    """The whole prompt, cached tokens included."""
    output_tokens: int | None
    cached_tokens: int | None
    """Of the input, those read from a prompt cache."""


def usage_of(usage: Any) -> Usage:
    """The counts of a ``usage`` object; all None when it is none. Raises `RowError` for a count that is no count."""
    if not isinstance(usage, dict):
        return Usage(None, None, None)
    inside = _count(usage, "prompt_tokens")
    into = _count(usage, "input_tokens") if inside is None else inside
    out = _count(usage, "completion_tokens")
    out = _count(usage, "output_tokens") if out is None else out
    read, written = _count(usage, _READ), _count(usage, _WRITTEN)
    if inside is None and into is not None and (read or written):
        into += (read or 0) + (written or 0)
    return Usage(into, out, _cached(usage) if read is None else read)


def _cached(usage: Mapping[str, Any]) -> int | None:
    details: Mapping[str, Any] = next((usage[name] for name in _DETAILS if isinstance(usage.get(name), dict)), {})
    return _count(details, "cached_tokens")


def _count(usage: Mapping[str, Any], name: str) -> int | None:
    return token_count(name, usage.get(name))
