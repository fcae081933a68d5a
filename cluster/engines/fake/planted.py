"""Planted answers: what the fake server says to prompts that it knows, so that the truth of an audit is known."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

DIED = 70
"""Exit status of a server that was told to die."""


class Planted:
    """Answers by prompt, and after how many requests of a load the server dies (None: never)."""

    def __init__(self, file: str | None, die_after: int | None) -> None:
        lines = Path(file).read_text().splitlines() if file else []
        rows = [json.loads(line) for line in lines if line.strip()]
        self._answers: dict[str, list[str]] = {row["prompt"]: row["answers"] for row in rows}
        self._logprobs: dict[str, float] = {row["prompt"]: row["logprob"] for row in rows if "logprob" in row}
        self._asked: dict[str, int] = {}
        self._left = die_after

    def count_request(self) -> None:
        """One more request of a load; the process ends at once when it was the last that it lives for."""
        if self._left is None:
            return
        if self._left <= 0:
            os._exit(DIED)
        self._left -= 1

    def answer(self, body: Mapping[str, object], most: int, *, load: bool) -> tuple[list[str], bool] | None:
        """(pieces of the answer to a prompt, one a token; whether it ended by itself); None where none is planted.

        The k-th time that a ``load`` sends a prompt it gets the k-th answer, then always the last. At most ``most``
        pieces; with ``ignore_eos`` exactly so many. ``messages`` are known by the content of the last.
        """
        prompt = _prompt(body)
        if not isinstance(prompt, str) or (answers := self._answers.get(prompt)) is None:
            return None
        k = self._asked.get(prompt, 0)
        if load:
            self._asked[prompt] = k + 1
        pieces = re.findall(r"\s*\S+", answers[min(k, len(answers) - 1)]) or [" "]
        if body.get("ignore_eos"):
            return [*pieces, *[" t"] * most][:most], False
        return pieces[:most], len(pieces) <= most

    def logprob(self, body: Mapping[str, object]) -> float | None:
        """Of each token of the answer to a prompt, where that is planted and asked for (``logprobs``)."""
        prompt = _prompt(body)
        asked = body.get("logprobs") not in (None, False)
        return self._logprobs.get(prompt) if asked and isinstance(prompt, str) else None


class RateLimit:
    """So many requests of a load in any second (None: any number); one too many is to come back in a second, and is
    forbidden should it come sooner.
    """

    def __init__(self, most: int | None) -> None:
        self._most, self._came, self._back = most, deque[float](), dict[object, float]()

    def refused(self, body: Mapping[str, object], now_s: float) -> tuple[int, str, str] | None:
        """Status, words and headers of a refusal; None where there is none."""
        if self._most is None:
            return None
        if now_s < self._back.pop(_prompt(body), now_s):
            return 403, "came back before Retry-After", ""
        while self._came and self._came[0] <= now_s - 1:
            self._came.popleft()
        if len(self._came) < self._most:
            self._came.append(now_s)
            return None
        self._back[_prompt(body)] = now_s + 1
        return 429, "too many requests", "Retry-After: 1\r\n"


def _prompt(body: Mapping[str, object]) -> object:
    messages = body.get("messages")
    return messages[-1]["content"] if isinstance(messages, Sequence) and messages else body.get("prompt")
