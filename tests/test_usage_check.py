"""What a server counted against what it streamed: right books of odd streams pass, wrong books do not."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import StartServer, harness
from run_files import SPEC, good, write_run
from test_completion import completion, delta
from test_prompts import byte_level

from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.plan.tokenizers import _FastTokenizer as FastTokenizer
from harness.record.answers import Said, count_answers, count_prompts, take_said, write_said
from harness.record.manifest import RunDir, read_manifest, write_manifest
from harness.scenarios.client.completion import StreamedAnswer
from harness.scenarios.client.in_flight import AnswerSampler

WORDS = ["load", " of", " the", " server", ",", " answers", ".", "\n", " 7", " un", "known", " It", "'s"]
ANSWERS = 40


@cache
def tokenizer():
    return FastTokenizer(byte_level(), "words")


def chunks(n, each=1, seed=0):
    """``n`` tokens as text, ``each`` in a chunk."""
    rng = random.Random(seed)
    tokens = [rng.choice(WORDS) for _ in range(n)]
    return ["".join(tokens[at : at + each]) for at in range(0, n, each)]


def said(k, *, text=24, each=1, thought=0, **more):
    return Said(request_id=k, text=chunks(text, each, k), reasoning=chunks(thought, each, 99 + k), **more)


def checked(tmp_path, answers, usage, declared=None, *, spec=SPEC, tokens=None):
    """The check of a run whose every answer has this usage."""
    rows = [replace(good(k, tokens=24), output_tokens=usage, reasoning_tokens=declared) for k in range(len(answers))]
    run = read_run(write_run(tmp_path / "run", rows, spec=spec, answers=count_answers(answers, tokens)))
    summary = summarise(run)
    return next(c for c in summary.checks if c.name == "usage_text"), summary


@pytest.mark.parametrize(
    ("what", "usage", "declared", "ok"),
    [
        ({}, 24, None, True),
        ({}, 25, None, True),  # the stop token
        ({}, 48, None, False),  # doubled
        ({"text": 200}, 60, None, False),  # but every word is a token at least
        ({}, 48, 24, True),  # hidden reasoning, declared
        ({"thought": 24}, 48, 24, True),  # declared, and streamed as well: it counts once
        ({"thought": 24}, 48, None, True),  # streamed and not declared
        ({"thought": 24}, 48, 0, True),
        ({"thought": 4}, 48, 24, True),  # of declared reasoning only a summary is streamed
        ({}, 72, 24, False),  # declared, and then as much again
        ({"text": 6, "blanks": 18}, 24, None, True),  # tokens without text
        ({"text": 0}, 20, None, False),  # a usage that no text supports
        ({"text": 0}, 1, None, True),  # the model ended at once
        ({"text": 0, "other": True}, 20, None, None),  # tool calls
        ({"ids": 24}, 24, None, True),
        ({"ids": 24}, 48, None, False),
        ({"ids": 24}, 48, 24, True),
        ({"ids": 24, "each": 4}, 48, None, False),  # token ids count several tokens in a chunk, too
        ({"ids": 24}, 12, None, False),
    ],
)
def test_usage_is_held_against_chunks_of_one_token(tmp_path, what, usage, declared, ok):
    answers = [said(k, **what) for k in range(ANSWERS)]
    check, summary = checked(tmp_path, answers, usage, declared)
    assert (check.ok, check.gate) == (ok, True), check
    assert (summary.verdict == "INVALID") is (ok is False)
    assert (summary.cost.usd_per_1m_total.value is None) is (ok is False)


@pytest.mark.parametrize(("usage", "ok"), [(24, True), (26, True), (48, False), (12, False), (31, False)])
@pytest.mark.parametrize("each", [1, 4, 24])
def test_a_tokenizer_counts_whatever_the_chunks_hold(tmp_path, usage, each, ok):
    answers = [Said(request_id=k, text=["x y " * each] * (24 // each // 2 or 1)) for k in range(ANSWERS)]
    exact = len(tokenizer().encode(["".join(answers[0].text)])[0])
    check, _ = checked(tmp_path, answers, usage * exact // 24, tokens=tokenizer())
    assert check.ok is ok, check
    assert ("--tokenizer" in (check.advice or "")) is (not ok)


@pytest.mark.parametrize("usage", [24, 48])
def test_several_tokens_in_a_chunk_and_no_tokenizer_are_not_checked_and_said(tmp_path, usage):
    check, summary = checked(tmp_path, [said(k, each=3) for k in range(ANSWERS)], usage)
    assert (check.ok, check.gate, summary.verdict) == (False, False, "VALID")
    assert "not checked" in check.observed and "--tokenizer" in check.advice


@pytest.mark.parametrize("usage", [3, 2000])
def test_bounds_hold_without_any_count_of_tokens(tmp_path, usage):
    """More tokens than the text has bytes, and fewer than it has words."""
    check, summary = checked(tmp_path, [said(k, text=60, each=3) for k in range(ANSWERS)], usage)
    assert (check.ok, check.gate, summary.verdict) == (False, True, "INVALID")


def test_answers_are_pooled_for_text_encoded_again_is_off_by_a_few(tmp_path):
    """Each answer is off by 20 % in one direction or the other; then all in one."""
    tokens = tokenizer()
    answers = [Said(request_id=k, text=["x y " * 30]) for k in range(ANSWERS)]
    exact = len(tokens.encode(["x y " * 30])[0])
    rows = [replace(good(k, tokens=24), output_tokens=int(exact * (1.2 if k % 2 else 0.8))) for k in range(ANSWERS)]
    run = read_run(write_run(tmp_path / "run", rows, answers=count_answers(answers, tokens)))
    assert next(c for c in summarise(run).checks if c.name == "usage_text").ok
    assert checked(tmp_path / "all", answers, int(exact * 1.2), tokens=tokens)[0].ok is False


def prompts_of(tmp_path, texts, usage, *, chat=False, tokens=None, spec=SPEC):
    """The check of prompts of a run whose k-th prompt is ``texts[k]`` and counted as ``usage[k]``."""
    rows = [replace(good(k, tokens=4), input_tokens=n) for k, n in enumerate(usage)]
    plan = {
        k: {"input_tokens": None, "prompt_token_ids": None, "prompt_text": None if chat else text,
            "messages": json.dumps([{"role": "user", "content": text}]) if chat else None}
        for k, text in enumerate(texts)
    }  # fmt: skip
    path = write_run(tmp_path / "run", rows, spec=spec, plan=plan)
    prompts = count_prompts(path / "plan.arrow", range(len(texts)), tokens)
    manifest = read_manifest(path)
    manifest.answers = count_answers([said(k, text=4) for k in range(len(texts))], tokens, prompts)
    write_manifest(RunDir(path), manifest)
    summary = summarise(read_run(path))
    return next(c for c in summary.checks if c.name == "prompt_text"), summary


LONG = [" ".join(["some words"] * (30 + 10 * k)) for k in range(20)]
OWN = [2 * (30 + 10 * k) for k in range(20)]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("what", "usage", "ok"),
    [
        ("as sent", OWN, True),
        ("one start token", [n + 1 for n in OWN], True),
        ("a template", [n + 90 for n in OWN], True),
        ("100 times the bytes", [100 * len(text) for text in LONG], False),
        ("cut below its words", [min(n, 150) for n in OWN], False),
        ("half", [n // 2 for n in OWN], False),
    ],
)
def test_prompts_are_held_against_their_bytes_and_words(tmp_path, chat, what, usage, ok):
    check, summary = prompts_of(tmp_path, LONG, usage, chat=chat)
    assert check.ok is ok, (what, check)
    assert check.gate and (summary.cost.usd_per_1m_total.value is None) is (not ok)


def test_prompts_that_end_at_one_count_were_cut_there(tmp_path):
    """4 tokens a word, cut at 600 tokens: every prompt still has more tokens than words."""
    usage = [min(2 * n, 600) for n in OWN]
    check, _ = prompts_of(tmp_path, LONG, usage)
    assert check.ok is False and "all have 600 tokens" in check.observed
    assert prompts_of(tmp_path / "whole", LONG, [2 * n for n in OWN])[0].ok
    same = [LONG[3]] * 20
    assert prompts_of(tmp_path / "same", same, [2 * OWN[3]] * 20)[0].ok, "one prompt, sent again and again"


@pytest.mark.parametrize(("usage", "ok"), [(1.0, True), (1.05, True), (2.0, False), (0.7, False)])
def test_a_tokenizer_counts_prompts_too(tmp_path, usage, ok):
    own = [len(ids) for ids in tokenizer().encode(LONG)]
    check, _ = prompts_of(tmp_path, LONG, [int(usage * n) for n in own], tokens=tokenizer())
    assert check.ok is ok, check


def test_what_is_no_text_is_not_judged_by_its_bytes(tmp_path):
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]
    tool = [{"role": "assistant", "content": None, "tool_calls": []}]
    rows = [replace(good(k), input_tokens=9000) for k in range(2)]
    fields = {"input_tokens": None, "prompt_token_ids": None, "prompt_text": None}
    plan = {k: {**fields, "messages": json.dumps(messages)} for k, messages in enumerate((image, tool))}
    path = write_run(tmp_path / "run", rows, plan=plan)
    assert count_prompts(path / "plan.arrow", [0, 1]) == {}


@pytest.mark.parametrize(
    ("usage", "ok", "advice"),
    [
        ([1000] * 20, True, None),
        ([1080] * 20, True, None),  # a template
        ([100_000] * 20, False, "tokenizer"),
        ([512] * 20, False, "cuts prompts at 512"),
        ([1000] * 10 + [700] * 10, False, "tokenizer"),
    ],
)
def test_a_constant_difference_is_a_template_only_within_bounds(tmp_path, usage, ok, advice):
    rows = [replace(good(k), input_tokens=n) for k, n in enumerate(usage)]
    plan = {k: {"input_tokens": 1000} for k in range(20)}
    path = write_run(tmp_path / "run", rows, plan=plan, spec=replace(SPEC, endpoint="chat"))
    check = next(c for c in summarise(read_run(path)).checks if c.name == "input_tokens")
    assert check.ok is ok
    assert (advice or "") in (check.advice or "")


def test_several_answers_a_request_and_old_runs_are_not_judged(tmp_path):
    answers = [said(k) for k in range(ANSWERS)]
    for name in ("n", "best_of"):
        said_so = checked(tmp_path / name, answers, 48, spec=replace(SPEC, extra_body={name: 2}))[0]
        assert (said_so.ok, said_so.gate) == (False, False) and "counted together" in said_so.observed
    assert checked(tmp_path / "old", [], 48)[0].ok is None


@pytest.mark.parametrize(
    ("chunk", "crowded"),
    [
        ("word", 0), (" word", 0), ("(self", 0), ("_name", 0), ("'t", 0), (").\n", 0), (" 7", 0), ("\n\n", 0), ("é", 0),
        (" two words", 1), ("a b", 1), ("42", 1), ("我们", 1), ("end. ", 1), ("😀😀", 0), ("{}();x", 1),
    ],
)  # fmt: skip
def test_what_need_not_be_one_token(chunk, crowded):
    text = count_answers([Said(request_id=0, text=[chunk])])[0].text
    assert (text.crowded, text.bytes, text.tokens) == (crowded, len(chunk.encode()), None)


@pytest.mark.parametrize(("usage", "ok"), [(24, True), (48, False)])
def test_a_first_event_of_several_tokens_is_counted_by_its_pieces(tmp_path, usage, ok):
    """5 tokens in the first event and 19 that follow one by one: 1 of 20 chunks holds several."""
    answers = [Said(request_id=k, text=[" tok" * 5, *[" tok"] * 19]) for k in range(ANSWERS)]
    check, _ = checked(tmp_path, answers, usage)
    assert (check.ok, check.gate) == (ok, True), check


def test_broken_characters_are_not_counted_in_tokens():
    assert count_answers([Said(request_id=0, text=["a\ufffd"])], tokenizer())[0].text.tokens is None


def test_an_answer_keeps_its_chunks_apart():
    """Text, reasoning and tokens without text by themselves; a tool call is output that no text has."""
    role = delta(role="assistant", content="")
    told = completion(
        role, delta(reasoning_content="hm"), delta(content="a"), delta(content=""), delta(content=" b"), told=True
    ).answer
    assert (told.parts, told.reasoning, told.blanks, told.other) == (["a", " b"], ["hm"], 1, False)
    assert completion(role, delta(tool_calls=[{"index": 0}]), told=True).answer.other
    two = {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}
    assert completion(two, told=True).answer.other


def test_the_sample_is_spread_over_the_run_and_bounded():
    sampler = AnswerSampler(8)
    for k in range(1000):
        wanted = sampler.next()
        if wanted is not None:
            answer = StreamedAnswer()
            answer.parts.append(str(k))
            wanted(good(k), answer)
    kept = [one.request_id for one in sampler.said()]
    assert 4 <= len(kept) <= 8
    assert {b - a for a, b in pairwise(kept)} == {kept[1] - kept[0]}
    assert kept[-1] >= 750


def test_failed_answers_are_not_in_the_sample():
    sampler = AnswerSampler(8)
    sampler.next()(replace(good(0), error="cut"), StreamedAnswer())
    assert sampler.said() == []


def test_texts_travel_in_a_file_that_is_deleted(tmp_path):
    answers = [said(0), said(1, thought=3, blanks=2, ids=5, other=True)]
    file = tmp_path / "answers-0.jsonl"
    write_said(file, answers)
    with file.open("ab") as more:
        more.write(b'{"torn')
    assert take_said([file, tmp_path / "none"]) == answers
    assert not file.exists()


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [("double_usage", "INVALID"), ("hidden_reasoning", "VALID")],
)
def test_a_server_that_doubles_its_usage_is_found_out_and_one_that_declares_it_is_not(
    fake_server: StartServer, tmp_path: Path, fault: str, verdict: str
) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.002")
    trace = tmp_path / "trace.jsonl"
    rows = [{"arrival_s": 0.02 * k, "input_tokens": 20, "output_tokens": 20} for k in range(12)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = harness(
        "replay", trace, "--base-url", server.url, "--extra-body", json.dumps({"fault": fault}), "--no-counters",
        "--out", tmp_path / "runs", "--format", "json",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["verdict"] == verdict, report["reasons"]
    check = next(c for c in report["checks"] if c["name"] == "usage_text")
    assert check["ok"] is (verdict == "VALID"), check
    (run,) = (tmp_path / "runs").iterdir()
    manifest = read_manifest(run)
    assert len(manifest.answers) == 12
    assert not list(run.glob("answers-*")), "texts are not kept"
