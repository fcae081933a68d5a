"""Can the servers' own token counts be true? Usage against the text of a sample of answers (`harness.record.answers`).

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

import msgspec
import numpy as np

from analysis.check import Check, check, limit
from analysis.rows.read import Run
from analysis.validity.lengths import TEMPLATE_TOKENS
from harness.record.answers import Counted, CountedPrompt, Text

TOLERANCE = 0.1
"""Share of a text's tokens by which usage and text may differ,"""
TOLERANCE_TOKENS = 3.0
"""or so many tokens, where that is more: a start, a stop, a special token without text."""
CUT_FROM, CUT_ALIKE, CUT_SPREAD = 64, 3, 1.25
"""Prompts were cut when so many have one count, the largest, of so many tokens or more, and sizes that differ."""
SINGLE_BOUND = 0.1
"""Chunks are single tokens when at most this share of them has more than one piece of text. In prose at least 6 of 10
tokens begin a piece, so those within a piece that nobody sees are fewer than the bound of the sum."""

How = Literal["token ids", "the tokenizer", "chunks", "bytes"]
_WORDS: dict[How, str] = {
    "token ids": "the token ids streamed", "the tokenizer": "the tokenizer", "chunks": "chunks of one token each",
    "bytes": "bytes",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedAnswer:
    """One answer of the sample: what the server counted, and what we did."""

    usage: float
    reasoning: float
    """Declared; 0 when it is not."""
    input: float
    """Prompt tokens that it counted; NaN when it did not."""
    counted: Counted


def usage_text(run: Run) -> Check:
    """Output tokens that the servers counted are in the text of the answers, and the text is in the count."""
    name, bound = "usage_text", f"within {TOLERANCE:.0%} of the text, or {TOLERANCE_TOKENS:.0f} tokens an answer"
    extra = run.manifest.spec.extra_body
    if any(extra.get(several) not in (None, 1) for several in ("n", "best_of")):
        observed = "several answers a request (n, best_of), whose tokens are counted together"
        return limit(name, False, observed, bound, "ask for one answer a request where tokens and prices matter")
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


def prompt_text(run: Run) -> Check:
    """Input tokens that the servers counted are in the prompts that were sent, and all of these were read.

    Of prompts whose length the plan does not know: text of the trace. A server may add what is the same for every
    prompt, its chat template. A byte is at most one token, a word at least one.
    """
    name, bound = "prompt_text", f"within {TOLERANCE:.0%} of the prompts, or {TOLERANCE_TOKENS:.0f} tokens a prompt"
    prompts = [(a.input, a.counted.prompt) for a in sampled(run) if a.counted.prompt and np.isfinite(a.input)]
    if not prompts:
        return check(name, None, "no prompt of unknown length with a count", bound, "nothing to do")
    total = sum(said for said, _ in prompts)
    observed = f"usage {total:,.0f} input tokens, {len(prompts)} prompts of {sum(p.bytes for _, p in prompts):,} bytes"
    added = len(msgspec.json.encode(run.manifest.spec.extra_body)) + TEMPLATE_TOKENS
    if total > sum(p.bytes + added for _, p in prompts):
        advice = "a token has a byte at least: usage counts prompts that were not sent, so no cost per token is right"
        return check(name, False, observed, "at most a token a byte", advice)
    cut = _cut(prompts)
    if cut is not None:
        advice = "the server reads only a part of long prompts: a longer context length there, or shorter prompts"
        return check(name, False, f"{observed}; {cut}", bound, advice)
    known = [(said, p, p.tokens) for said, p in prompts if p.tokens is not None]
    if len(known) < len(prompts):
        return check(name, True, observed, "at most a token a byte, at least one a word, none cut", "")
    allowed = sum(max(TOLERANCE_TOKENS, TOLERANCE * own) for _, _, own in known)
    beyond = [said - own for said, _, own in known]
    chat = any(p.messages for _, p, _ in known)
    same = float(np.median(beyond)) if chat else 0.0
    observed += f"; by the tokenizer {sum(own for _, _, own in known):,}"
    spread = sum(abs(more - same) for more in beyond)
    ok = spread <= allowed and -allowed / len(known) <= same <= TEMPLATE_TOKENS
    advice = "usage counts other prompts than were sent, or --tokenizer is not the served model's"
    return check(name, ok, observed, bound + (", the same for all aside" if chat else ""), advice)


def _cut(prompts: Sequence[tuple[float, CountedPrompt]]) -> str | None:
    """Which prompts were not read to their end; None: none, as far as can be seen.

    Those of fewer tokens than words; and where several have the very same count, which no other exceeds, while their
    texts differ in size.
    """
    fewer = [said for said, p in prompts if said < (1 - TOLERANCE) * p.words - TOLERANCE_TOKENS]
    if fewer:
        return f"{len(fewer)} have fewer tokens than words"
    longest = max(said for said, _ in prompts)
    sizes = [p.bytes for said, p in prompts if said == longest]
    if longest >= CUT_FROM and len(sizes) >= CUT_ALIKE and max(sizes) >= CUT_SPREAD * min(sizes):
        return (
            f"{len(sizes)} of {min(sizes):,} to {max(sizes):,} bytes all have {longest:,.0f} tokens, and none has more"
        )
    return None


def _advice(excess: float, how: How) -> str:
    wrong = "usage counts output that was not sent and is not declared as reasoning" if excess > 0 else (
        "usage leaves out output that was sent"
    )  # fmt: skip
    other = "; or --tokenizer is not the served model's" if how == "the tokenizer" else ""
    return f"{wrong}, so no cost per token is right: see what counts tokens between you and the engine{other}"


def sampled(run: Run) -> list[CountedAnswer]:
    """The answers of the sample that are measured successes with usage."""
    counted = {one.request_id: one for one in run.manifest.answers}
    if not counted:
        return []
    ids = np.array([*counted], dtype=np.int64)
    rows = run.rows
    known = np.flatnonzero(np.isin(rows.request_id, ids) & rows.success & np.isfinite(rows.output_tokens))
    reasoning = np.nan_to_num(rows.reasoning_tokens)
    return [
        CountedAnswer(
            usage=float(rows.output_tokens[i]), reasoning=float(reasoning[i]), input=float(rows.input_tokens[i]),
            counted=counted[int(rows.request_id[i])],
        )
        for i in known
    ]  # fmt: skip


def _how(answers: Sequence[CountedAnswer]) -> How:
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


def span(answer: CountedAnswer, how: How) -> tuple[float, float]:
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


def judge(answers: Sequence[CountedAnswer], how: How) -> tuple[float, float]:
    """Usage beyond what the answers can have (below it: negative), summed, and by how much it may be beyond."""
    total = allowed = 0.0
    for answer in answers:
        low, high = span(answer, how)
        nearest = min(max(answer.usage, low), high)
        total += answer.usage - nearest
        allowed += max(TOLERANCE_TOKENS, TOLERANCE * nearest)
    return total, allowed
