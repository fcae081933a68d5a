"""Two clients on one server: when they agree, when they do not, and when nobody can tell."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from bench.crosscheck import (
    FIGURES,
    REASONS,
    beyond_vllm,
    compare,
    crosscheck,
    our_figures,
    their_figures,
    without_role_chunk,
)
from conftest import StartServer, harness
from run_files import good, write_run
from test_plan import build, trace_of

from harness.analysis.rows.read import read_run
from harness.analysis.summary import summarise
from harness.errors import UsageError


def repeats(values, name="service_ttft_mean"):
    return [{name: v} for v in values]


def verdict(ours, theirs, completed=None):
    check = compare(repeats(ours), repeats(theirs), completed or [(9, 9)] * len(ours))
    return check, check.figures[0].verdict


def test_clients_agree_within_the_noise_of_repeats():
    check, said = verdict([50.0, 51.0, 52.0], [50.5, 51.5, 52.5])
    assert (said, check.agree, check.figures[0].why) == ("agree", True, None)
    # Welch's interval, by hand: s^2 = 1 on both sides, n = 3, t(4) = 2.776
    assert check.figures[0].noise == pytest.approx(2.776 * (2 / 3) ** 0.5, rel=0.01)
    assert check.figures[0].difference == pytest.approx(-0.5)
    assert (check.figures[0].low, check.figures[0].high) == pytest.approx((-0.5 - 2.266617, -0.5 + 2.266617), rel=0.01)


def test_a_difference_beyond_the_noise_is_said_with_its_reason():
    check, said = verdict([50.0, 50.1, 50.2], [55.0, 55.1, 55.2])
    assert (said, check.agree) == ("differ", False)
    assert check.figures[0].why == REASONS["service_ttft"]


def test_noisy_repeats_do_not_pass_for_agreement():
    check, said = verdict([20.0, 50.0, 90.0], [50.0, 80.0, 20.0])
    assert (said, check.agree) == ("noisy", False)


def test_a_hair_is_no_difference_however_quiet_the_repeats():
    assert verdict([50.0, 50.0, 50.0], [50.1, 50.1, 50.1])[1] == "agree"
    assert verdict([50.0, 50.0, 50.0], [50.5, 50.5, 50.5])[1] == "differ"


def test_clients_that_completed_different_requests_do_not_agree():
    check, said = verdict([50.0, 51.0, 52.0], [50.0, 51.0, 52.0], [(9, 9), (9, 8), (9, 9)])
    assert (said, check.agree) == ("agree", False)
    assert "same number" in check.notes[0]


def test_a_figure_that_one_side_lacks_is_left_out_and_said():
    check = compare([{"itl_p99": 1.0}] * 3, [{}] * 3, [(9, 9)] * 3)
    assert (check.figures, check.agree) == ([], False)
    assert "itl_p99: not known to both" in check.notes


def test_every_figure_has_a_reason_and_both_sides_read_it(tmp_path):
    for name in FIGURES:
        assert any(name.startswith(start) for start in REASONS)
    found = our_figures(summarise(read_run(write_run(tmp_path / "run", [good(i) for i in range(400)]))))
    assert set(found) == set(FIGURES)
    assert found["service_ttft_mean"] == pytest.approx(50)
    assert found["itl_p50"] == pytest.approx(10)
    result = {key: 7 for _, key in FIGURES.values()} | {"mean_itl_ms": float("nan")}
    assert set(their_figures(result)) == set(FIGURES) - {"itl_mean"}


def test_the_interval_narrows_with_repeats():
    """Five repeats see as a difference what three cannot tell from noise."""
    few, many = (verdict([50.0, 51.0, 52.0, 51.0, 50.0][:n], [48.6, 49.6, 50.6, 49.6, 48.6][:n]) for n in (3, 5))
    assert (few[1], many[1]) == ("agree", "differ")


def detailed(tokens: int, role: bool) -> dict:
    """A result file of vLLM's chat client: 50 ms to the first chunk, 10 ms a token, one answer failed."""
    itl = ([0.0001] if role else []) + [0.01] * (tokens - 1)
    return {
        "ttfts": [0.05, 0.05, 0.0], "itls": [itl, itl, []], "output_lens": [tokens, tokens, 0],
        "mean_itl_ms": 1.0, "mean_ttft_ms": 50.0, "completed": 2,
    }  # fmt: skip


def test_the_chunk_that_names_the_role_is_no_token():
    found, note = without_role_chunk(detailed(5, role=True))
    assert "its own stamps without it" in note
    assert their_figures(found) == pytest.approx({
        "service_ttft_mean": 50.1, "service_ttft_p50": 50.1, "service_ttft_p90": 50.1, "tpot_mean": 10, "tpot_p50": 10,
        "itl_mean": 10, "itl_p50": 10, "itl_p90": 10, "itl_p99": 10,
    })  # fmt: skip
    found, note = without_role_chunk(detailed(5, role=False))
    assert (found, "as it printed them" in note) == (detailed(5, role=False), True)
    assert without_role_chunk({**detailed(5, role=True), "output_lens": [0, 0, 0]})[0]["mean_itl_ms"] == 1.0


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM, whose client this is, is not installed")
@pytest.mark.e2e
def test_a_chat_plan_is_crosschecked(fake_server: StartServer, tmp_path):
    """Both clients send the plan's own messages, and vLLM's figures are those of tokens."""
    server = fake_server("--ttft", "0.03", "--itl", "0.005")
    trace, words = tmp_path / "trace.jsonl", [3 + i % 4 for i in range(16)]
    trace.write_text("".join(
        json.dumps({
            "arrival_s": 0.05 * i, "messages": [{"role": "user", "content": "w " * n}], "output_tokens": 8,
        }) + "\n"
        for i, n in enumerate(words)
    ))  # fmt: skip
    plan = tmp_path / "plan.arrow"
    done = harness("plan", trace, "--base-url", server.url, "-o", plan)
    assert done.returncode == 0, done.stderr
    found = crosscheck(plan, server.url, tmp_path / "runs", repeats=1)
    assert found.completed == [(16, 16)]
    assert any("names the role" in note for note in found.notes)
    figures = {f.name: f for f in found.figures}
    assert figures["itl_mean"].theirs == pytest.approx(5, rel=0.1), "as printed it would be 7/8 of that"
    assert sorted(t["prompt_tokens"] for t in server.truth()) == sorted(words * 3)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM, whose client this is, is not installed")
@pytest.mark.e2e
def test_vllms_client_is_given_the_same_requests(fake_server: StartServer, tmp_path):
    """What the server saw is the same from both: prompts' and answers' lengths, and their order in time."""
    server = fake_server("--ttft", "0.03", "--itl", "0.005")
    trace = tmp_path / "trace.jsonl"
    lengths = [(5 + i, 3 + i % 4) for i in range(24)]
    trace.write_text("".join(
        json.dumps({"arrival_s": 0.05 * i, "input_tokens": a, "output_tokens": b}) + "\n"
        for i, (a, b) in enumerate(lengths)
    ))  # fmt: skip
    plan = tmp_path / "plan.arrow"
    done = harness("plan", trace, "--base-url", server.url, "-o", plan)
    assert done.returncode == 0, done.stderr
    found = crosscheck(plan, server.url, tmp_path / "runs", repeats=2)
    assert found.completed == [(24, 24)] * 2
    figures = {f.name: f for f in found.figures}
    assert figures["tpot_mean"].theirs == pytest.approx(5, rel=0.3)
    truth = sorted(server.truth(), key=lambda t: t["received_ns"])
    runs = [truth[i : i + 24] for i in range(0, len(truth), 24)]
    assert len(runs) == 5, "one uncounted, two of each client"
    for run in runs:
        assert sorted((t["prompt_tokens"], t["tokens"]) for t in run) == sorted(lengths)
        span_s = (run[-1]["received_ns"] - run[0]["received_ns"]) / 1e9
        assert span_s == pytest.approx(23 * 0.05, abs=0.15), "sent at the plan's times"


def test_the_crosscheck_says_what_it_cannot_do(fake_server: StartServer, tmp_path):
    server = fake_server()
    ask = [{"role": "user", "content": "hi"}]
    first = {"arrival_s": 0, "messages": ask, "session_id": "s", "output_tokens": 2}
    then = {**first, "messages": [*ask, {"role": "assistant", "content": "a"}, *ask], "arrival_s": 1}
    cases = {
        "live conversation": ([first, then], ["--conversation", "live"]),
        "1 requests do not say how many tokens": ([{**first, "output_tokens": None}], []),
    }
    for k, (words, (rows, args)) in enumerate(cases.items()):
        trace, plan = tmp_path / f"{k}.jsonl", tmp_path / f"{k}.arrow"
        trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = harness("plan", trace, "--base-url", server.url, "-o", plan, *args)
        assert made.returncode == 0, made.stderr
        with pytest.raises(UsageError, match=words):
            beyond_vllm(plan, "chat")


def test_what_vllms_client_does_not_do_is_noted(tmp_path):
    rows = [
        {"prompt": "a", "session_id": "s", "cancel_after_s": 1.0, "arrival_s": 0},
        {"prompt": "b", "session_id": "s", "timeout_s": 2.0, "arrival_s": 1},
    ]
    plan = tmp_path / "p"
    build(trace_of(tmp_path, *rows), plan, closed=False, sessions="wait")
    said = beyond_vllm(plan, "completions")
    assert [note.split(",")[0] for note in said] == [
        "1 requests wait for the turn before them", "1 requests hang up", "1 requests have a time limit of their own",
    ]  # fmt: skip
    build(trace_of(tmp_path, {"prompt": "a", "arrival_s": 0}), tmp_path / "q", closed=False)
    assert beyond_vllm(tmp_path / "q", "completions") == []
