"""Was the workload that was served the one that was planned? Lengths of answers and of prompts, as the server counted.

Answers of other lengths than the trace's are a workload that a server chose to serve. Its latencies and its price were
measured, so the run is VALID with a limit: they say less about the trace. Prompts of other lengths are a wrong plan.
"""

from __future__ import annotations

import numpy as np

from analysis.arrays import Floats
from analysis.check import Check, check, limit
from analysis.metrics import MISMATCH_BOUND
from analysis.rows.read import Rows, Run

BOS_TOKENS = 2
TEMPLATE_TOKENS = 512
"""A server's chat template adds no more to a prompt; one that does sends a prompt of its own."""
CUT_BOUND = 0.1
"""Share of the planned tokens that a template of fewer tokens than the plan thought may take."""
RECORDED_BOUND = 2.0
"""Two tokenizers count the same text within this factor."""


def output_tokens(run: Run) -> Check:
    """Successful requests generated as many tokens as the plan asked for.

    A limit whoever started the server: what was served was served. Most APIs cannot be told to go on after an end of
    sequence (``ignore_eos`` is vLLM's), and one that can and does not still did this much work for its bill. Answers
    shorter than what was asked for as a cap are what was asked for.
    """
    asked, got = _both(run.rows, "output_tokens")
    bound = f"at most {MISMATCH_BOUND:.0%} of answers differ"
    if not len(got):
        return limit("output_tokens", None, "no request has both a plan and a count", bound, "nothing to do")
    how, share = run.manifest.spec.output_lengths, float(np.mean(asked != got))
    longer = float(np.mean(got > asked))
    if how == "free" or (how == "cap" and longer <= MISMATCH_BOUND):
        words = "lengths left to the server" if how == "free" else "planned lengths are caps"
        observed = f"{words}: {served_lengths(run) or 'as planned'}"
        return limit("output_tokens", None if how == "free" else True, observed, "none beyond its cap", "nothing to do")
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
        return limit(name, None, "no text of the trace with a count beside it", bound, "nothing to do")
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
        return check("input_tokens", None, "live conversation, no planned length", bound, "nothing to do")
    total, share = float(asked.sum()), float(np.mean(asked != got))
    observed = (
        f"live conversation: {share:.1%} of {len(got)} differ, {float(got.sum()):,.0f} tokens for {total:,.0f} asked "
        f"({float(got.sum()) / total - 1:+.1%})"
    )
    return check("input_tokens", None, observed, bound, "nothing to do")


def _mismatch(name: str, asked: Floats, got: Floats, advice: str) -> Check:
    bound = f"at most {MISMATCH_BOUND:.0%} of requests differ"
    if not len(got):
        return check(name, None, "no request has both a plan and a count", bound, "nothing to do")
    share = float(np.mean(asked != got))
    return check(name, share <= MISMATCH_BOUND, f"{share:.1%} of {len(got)} differ", bound, advice)
