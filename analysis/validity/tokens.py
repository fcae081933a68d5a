"""Was the workload that was served the one that was planned, as the server counted it, and can those counts be true?

Answers of other lengths than the trace's are a workload that a server chose to serve. Its latencies and its price were
measured, so the run is VALID with a limit: they say less about the trace. Prompts of other lengths are a wrong plan.

Usage is held against the text of a sample of answers (`harness.record.answers`), less the reasoning it declares, which
is paid for whether it was streamed or not. The text is counted, in this order, by token ids that came with it, by the
model's tokenizer, or by chunks where these are single tokens. Without any of these there are bounds only: a word is a
token at least, a byte at most one. Answers are pooled: text encoded again differs from what was emitted by a few
tokens, in either direction, so one answer proves little; over a sample that cancels, while wrong books add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from harness.analysis import metrics
from harness.analysis.arrays import Floats
from harness.analysis.check import Check, check, limit
from harness.analysis.metrics import MISMATCH_BOUND
from harness.analysis.rows.read import Rows, Run
from harness.record.answers import Counted, CountedPrompt, Text

NOTHING = "nothing to do"
BOS_TOKENS = 2
TEMPLATE_TOKENS = 512
"""A server's chat template adds no more to a prompt; one that does sends a prompt of its own."""
CUT_BOUND = 0.1
"""Share of the planned tokens that a template of fewer tokens than the plan thought may take."""
RECORDED_BOUND = 2.0
"""Two tokenizers count the same text within this factor."""


def checks(run: Run) -> list[Check]:
    """All of these."""
    asked = (input_tokens, prompt_text, usage_text, output_tokens, answer_fields, recorded_tokens)
    return [*(one(run) for one in asked), *_delivery(run)]


def output_tokens(run: Run) -> Check:
    """Successful requests generated as many tokens as the plan asked for.

    A limit whoever started the server: what was served was served. Most APIs cannot be told to go on after an end of
    sequence (``ignore_eos`` is vLLM's), and one that can and does not still did this much work for its bill. Answers
    shorter than what was asked for as a cap are what was asked for.
    """
    asked, got = _both(run.rows, "output_tokens")
    bound = f"at most {MISMATCH_BOUND:.0%} of answers differ"
    if not len(got):
        return limit("output_tokens", None, "no request has both a plan and a count", bound, NOTHING)
    how, share = run.manifest.spec.output_lengths, float(np.mean(asked != got))
    longer = float(np.mean(got > asked))
    if how == "free" or (how == "cap" and longer <= MISMATCH_BOUND):
        words = "lengths left to the server" if how == "free" else "planned lengths are caps"
        observed = f"{words}: {served_lengths(run) or 'as planned'}"
        return limit("output_tokens", None if how == "free" else True, observed, "none beyond its cap", NOTHING)
    if share <= MISMATCH_BOUND:
        return limit("output_tokens", True, f"{share:.1%} of {len(got)} differ", bound, "")
    observed = f"served {served_lengths(run)}: {share - longer:.1%} of {len(got)} answers shorter than planned"
    advice = "latencies and price are those of the served answers, not of the trace: the server ends answers by itself"
    if longer:
        observed += f", {longer:.1%} longer"
        advice += ", and some run past max_tokens, or its usage counts what was not asked for"
    return limit("output_tokens", False, observed, bound, advice)


def served_lengths(run: Run) -> str | None:
    """Mean output tokens of an answer, served and planned, in words; None where 1 % of them differ or fewer."""
    asked, got = _both(run.rows, "output_tokens")
    if not len(got) or float(np.mean(asked != got)) <= MISMATCH_BOUND:
        return None
    return f"{float(got.mean()):.4g} output tokens a request for {float(asked.mean()):.4g} planned"


def answer_fields(run: Run) -> Check:
    """Every field of the answers that becomes a fact could be read, and is of the one choice that is timed. One that
    cannot be is null and costs no answer.
    """
    observed = f"{run.remarked} answers: {run.remark}" if run.remarked else "all could be read"
    advice = (
        "those facts are null here: the server or a gateway writes them in a way of its own, or was asked for n > 1"
    )
    return limit("answer_fields", not run.remarked, observed, "all of the types of the API, one choice", advice)


def recorded_tokens(run: Run) -> Check:
    """Prompts of the trace's own text have about as many tokens here as production counted of them.

    Tokenizers differ by less than half. More shows that the texts are not all that production sent (a system prompt,
    tools or images that nobody wrote down), or that they are more.
    """
    name, bound = "recorded_tokens", f"within a factor of {RECORDED_BOUND:g} of what production counted"
    plan = run.manifest.plan
    recorded = plan.source.text_tokens if plan.source is not None else None
    rows = run.rows
    got = rows.input_tokens[rows.success & np.isfinite(rows.input_tokens) & np.isnan(rows.planned_input_tokens)]
    if recorded is None or not len(got) or plan.conversation == "live":
        return limit(name, None, "no text of the trace with a count beside it", bound, NOTHING)
    mean = float(got.mean())
    observed = f"{mean:,.4g} input tokens a prompt of the trace's text, {recorded:,.4g} in production"
    advice = (
        "the texts are not the prompts that production counted, so the load is another: write them down whole, or "
        "replay by the lengths (harness trace anonymize takes the texts out)"
    )
    return limit(name, recorded / RECORDED_BOUND <= mean <= recorded * RECORDED_BOUND, observed, bound, advice)


def _both(rows: Rows, name: str) -> tuple[Floats, Floats]:
    """Planned and counted tokens of the successes that have both."""
    got, asked = getattr(rows, name), getattr(rows, f"planned_{name}")
    both = np.isfinite(got + asked) & rows.success
    return asked[both], got[both]


def input_tokens(run: Run) -> Check:
    """Successful requests had as many input tokens as the plan says; exact up to one constant offset, which is a start
    token or, where the plan did not know the server's chat template, that template.
    """
    chat = run.manifest.spec.endpoint == "chat"
    asked, got = _both(run.rows, "input_tokens")
    if run.manifest.plan.conversation == "live":
        return _live_input(asked, got)
    more = float(got[0] - asked[0]) if len(got) else 0.0
    constant = bool((got - asked == more).all())
    template = chat and len(got) > 0 and -CUT_BOUND * float(asked.mean()) <= more <= TEMPLATE_TOKENS
    if constant and more and (template or 0 < more <= BOS_TOKENS):
        what = "the server's chat template" if chat else "a start token the server adds"
        observed = f"every prompt has {more:+.0f} tokens against the plan ({what})"
        return check("input_tokens", True, observed, "as planned, or one constant offset", "")
    advice = "the plan's tokenizer is not the server's: build the plan with the served model's own"
    longest = float(got.max()) if len(got) else 0.0
    cut = (got == longest) & (asked > longest)
    if np.count_nonzero(cut) > MISMATCH_BOUND * len(got):
        advice = (
            f"the server cuts prompts at {longest:,.0f} tokens (a context length?): shorter prompts, or a longer one"
        )
    return _mismatch("input_tokens", asked, got, advice)


def _live_input(asked: Floats, got: Floats) -> Check:
    """Of a live conversation, whose turns are as long as the server's own answers make them: the difference, said."""
    bound = "not gated: a live conversation's input lengths follow from the answers"
    if not len(got):
        return check("input_tokens", None, "live conversation, no planned length", bound, NOTHING)
    total, share = float(asked.sum()), float(np.mean(asked != got))
    observed = (
        f"live conversation: {share:.1%} of {len(got)} differ, {float(got.sum()):,.0f} tokens for {total:,.0f} asked "
        f"({float(got.sum()) / total - 1:+.1%})"
    )
    return check("input_tokens", None, observed, bound, NOTHING)


def _mismatch(name: str, asked: Floats, got: Floats, advice: str) -> Check:
    bound = f"at most {MISMATCH_BOUND:.0%} of requests differ"
    if not len(got):
        return check(name, None, "no request has both a plan and a count", bound, NOTHING)
    share = float(np.mean(asked != got))
    return check(name, share <= MISMATCH_BOUND, f"{share:.1%} of {len(got)} differ", bound, advice)


# ----------------------------------------------------------------------------------------------- delivery of tokens

UNTOLD_BOUND = 0.01


def _delivery(run: Run) -> list[Check]:
    """Output arrived as it was made, and it is known how many tokens came between first chunk and last."""
    rows = run.rows
    streamed = rows.success & (rows.chunks >= 1) & (rows.output_tokens >= 2)
    clumped, one = metrics.clumped(rows), rows.chunks == 1
    lost = streamed & ~clumped & ~one & np.isnan(metrics.between(rows))
    clumps, single, all_lost = (int((streamed & which).sum()) for which in (clumped, one, lost))
    hidden = int((lost & (rows.reasoning_tokens > 0)).sum())
    unclear, n = all_lost - hidden, int(streamed.sum())
    in_clumps, known = (
        f"at most {UNTOLD_BOUND:.0%} of the answers in clumps",
        f"tpot known of all but {UNTOLD_BOUND:.0%} of the answers",
    )
    if not n:
        why = "no streamed answer of several tokens"
        return [limit("bulk_delivery", None, why, in_clumps, NOTHING), limit("chunk_tokens", None, why, known, NOTHING)]
    bulk = [f"{clumps} of {n} answers came in clumps of events with one time"] if clumps else []
    bulk += [f"{single} of {n} answers came in one event"] if single else []
    words = [f"{hidden} of {n} answers have reasoning tokens that may not have been streamed"] if hidden else []
    words += [f"{unclear} of {n} answers do not say how many tokens their chunks hold"] if unclear else []
    buffered = (
        "itl and tpot of these are not known and no limit on them is judged; ttft is when the first clump came. Switch "
        "buffering off between you and the engine (nginx: proxy_buffering off, or the header X-Accel-Buffering: no); a "
        "server that sends all at its end can only be judged by e2e"
    )
    advice = "tpot of these is not known, and no limit on it is judged"
    if unclear:
        advice += (
            "; vLLM and SGLang say it with --extra-body "
            '\'{"stream_options": {"include_usage": true, "continuous_usage_stats": true}}\''
        )
    most = UNTOLD_BOUND * n
    return [
        limit("bulk_delivery", clumps + single <= most, "; ".join(bulk) or "event by event", in_clumps, buffered),
        limit("chunk_tokens", all_lost <= most, "; ".join(words) or "known", known, advice),
    ]


# ---------------------------------------------------------------------------------------------- usage against text

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
        return check(name, None, "no answer with text and a count was kept", bound, NOTHING)
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
        return check(name, None, "no prompt of unknown length with a count", bound, NOTHING)
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
