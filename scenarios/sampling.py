"""Which answers are kept whole, so that they can be counted when the load is over (`harness.answers`)."""

from __future__ import annotations

from functools import partial

from harness.answers import SAMPLE, Said
from harness.results import Result
from scenarios.client.capture import Answered
from scenarios.client.completion import Answer


class Sampler:
    """Every answer at first, then every other, every fourth: at most ``most``, evenly spread however many there are."""

    def __init__(self, most: int = SAMPLE) -> None:
        self._most, self._seen, self._stride = max(1, most), 0, 1
        self._kept: dict[int, Said] = {}

    def next(self) -> Answered | None:
        """For the next request: who wants its answer, if anybody does."""
        n = self._seen
        self._seen += 1
        return None if n % self._stride else partial(self._take, n)

    def _take(self, n: int, result: Result, answer: Answer) -> None:
        if result.error is not None or n % self._stride:
            return
        self._kept[n] = Said(
            request_id=result.request_id, text=answer.parts, reasoning=answer.reasoning, blanks=answer.blanks,
            ids=len(answer.token_ids), other=answer.other,
        )  # fmt: skip
        if len(self._kept) > self._most:
            self._stride *= 2
            self._kept = {k: said for k, said in self._kept.items() if not k % self._stride}

    def said(self) -> list[Said]:
        """What was kept, in the order of the requests."""
        return [self._kept[n] for n in sorted(self._kept)]
