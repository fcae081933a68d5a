"""Can the servers' own token counts be true? Usage against the text of a sample of answers (`harness.answers`).

One rule: usage less the reasoning it declares is compared with the visible text. What is declared as reasoning is paid
for whether it was streamed or not. The text is counted, in this order, by token ids that came with it, by the model's
tokenizer, or by chunks where these are single tokens. Without any of these there are bounds only: a word is a token at
least, a byte at most one.

Answers are pooled. Text encoded again differs from what was emitted by a few tokens, in either direction, so one answer
proves little; over a sample that cancels, while wrong books add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.check import Check, check, limit
from analysis.load import Run
from harness.answers import Counted, Text

TOLERANCE = 0.1
"""Share of an answer's tokens by which usage and text may differ,"""
TOLERANCE_TOKENS = 3.0
"""or so many tokens, where that is more: a start, a stop, a special token without text."""
SINGLE_BOUND = 0.05
"""Chunks are single tokens when at most this share of them has more than one piece of text."""

How = Literal["token ids", "the tokenizer", "chunks", "bytes"]
_WORDS: dict[How, str] = {
    "token ids": "the token ids streamed", "the tokenizer": "the tokenizer", "chunks": "chunks of one token each",
    "bytes": "bytes",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the sample: what the server counted, and what we did."""

    usage: float
    reasoning: float
    """Declared; 0 when it is not."""
    counted: Counted


def usage_text(run: Run) -> Check:
    """Output tokens that the servers counted are in the text of the answers, and the text is in the count."""
    name, bound = "usage_text", f"within {TOLERANCE:.0%} of the text, or {TOLERANCE_TOKENS:.0f} tokens an answer"
    extra = run.manifest.spec.extra_body
    if any(extra.get(several) not in (None, 1) for several in ("n", "best_of")):
        return check(name, None, "several answers a request (n, best_of)", bound, "nothing to do")
    answers = [one for one in sampled(run) if not one.counted.other]
    if not answers:
        return check(name, None, "no answer with text and a count was kept", bound, "nothing to do")
    how = _how(answers)
    excess, allowed = judge(answers, how)
    observed = f"usage {sum(a.usage for a in answers):,.0f} output tokens"
    if declared := sum(a.reasoning for a in answers):
        observed += f", {declared:,.0f} of them declared as reasoning"
    ends = [span(a, how) for a in answers]
    low, high = (sum(end[k] for end in ends) for k in (0, 1))
    text = {"chunks": f"{high:,.0f}", "bytes": f"{low:,.0f} to {high:,.0f}"}.get(how, f"{low:,.0f}")
    observed += f"; by {_WORDS[how]} {text} (reasoning included), {len(answers)} answers"
    if abs(excess) > allowed:
        return check(name, False, observed, bound, _advice(excess, how))
    if how == "bytes":
        why = "not checked: several tokens in a chunk, and no tokenizer to count the text with; " + observed
        return limit(name, False, why, bound, "give the model's tokenizer (--tokenizer FOLDER)")
    return check(name, True, observed, bound, "")


def _advice(excess: float, how: How) -> str:
    wrong = "usage counts output that was not sent and is not declared as reasoning" if excess > 0 else (
        "usage leaves out output that was sent"
    )  # fmt: skip
    other = "; or --tokenizer is not the served model's" if how == "the tokenizer" else ""
    return f"{wrong}, so no cost per token is right: see what counts tokens between you and the engine{other}"


def sampled(run: Run) -> list[Answer]:
    """The answers of the sample that are measured successes with usage."""
    counted = {one.request_id: one for one in run.manifest.answers}
    ids = np.array([*counted], dtype=np.int64)
    found = []
    for _, part in run.rows.blocks():
        known = np.flatnonzero(np.isin(part.request_id, ids) & part.success & np.isfinite(part.output_tokens))
        reasoning = np.nan_to_num(part.reasoning_tokens)
        found += [
            Answer(float(part.output_tokens[i]), float(reasoning[i]), counted[int(part.request_id[i])]) for i in known
        ]
    return found


def _how(answers: Sequence[Answer]) -> How:
    """By what the whole sample can be counted."""
    counted = [a.counted for a in answers]
    texts = [text for one in counted for text in (one.text, one.reasoning)]
    if all(one.ids for one in counted):
        return "token ids"
    if all(text.tokens is not None for text in texts):
        return "the tokenizer"
    chunks = sum(text.chunks for text in texts)
    single = sum(text.crowded for text in texts) <= SINGLE_BOUND * chunks
    return "chunks" if single else "bytes"


def span(answer: Answer, how: How) -> tuple[float, float]:
    """Fewest and most output tokens that this answer can have, declared reasoning among them, by our own count.

    Declared reasoning that was streamed as well is in its text and counts once. A chunk without text may be a token.
    """
    one, declared = answer.counted, answer.reasoning

    def both(of_text: float, of_reasoning: float) -> float:
        return of_text + max(of_reasoning, declared)

    if how == "token ids":
        return float(one.ids), one.ids + declared
    least = both(one.text.words, one.reasoning.words)
    if how == "the tokenizer":
        tokens = both(_tokens(one.text), _tokens(one.reasoning))
        return tokens, tokens + one.blanks
    if how == "chunks":
        return least, both(one.text.pieces, one.reasoning.pieces) + one.blanks
    return least, both(one.text.bytes, one.reasoning.bytes) + one.blanks


def _tokens(text: Text) -> float:
    assert text.tokens is not None
    return float(text.tokens)


def judge(answers: Sequence[Answer], how: How) -> tuple[float, float]:
    """Usage beyond what the answers can have (below it: negative), summed, and by how much it may be beyond."""
    total = allowed = 0.0
    for answer in answers:
        low, high = span(answer, how)
        nearest = min(max(answer.usage, low), high)
        total += answer.usage - nearest
        allowed += max(TOLERANCE_TOKENS, TOLERANCE * nearest)
    return total, allowed
