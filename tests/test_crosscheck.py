"""Two clients on one server: when they agree, when they do not, and when nobody can tell."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from conftest import StartServer, harness
from run_files import good, write_run

from analysis.against.crosscheck import FIGURES, REASONS, compare, our_figures, their_figures
from analysis.load import read_run
from analysis.summary import summarise


def repeats(values, name="service_ttft_mean"):
    return [{name: v} for v in values]


def verdict(ours, theirs, completed=None):
    check = compare(repeats(ours), repeats(theirs), completed or [(9, 9)] * len(ours))
    return check, check.figures[0].verdict


def test_clients_agree_within_the_noise_of_repeats():
    check, said = verdict([50.0, 51.0, 52.0], [50.5, 51.5, 52.5])
    assert (said, check.agree, check.figures[0].why) == ("agree", True, None)
    # Welch's interval, by hand: s^2 = 1 on both sides, n = 3, t(4) = 2.776
    assert check.figures[0].noise == pytest.approx(2.776 * (2 / 3) ** 0.5)
    assert check.figures[0].difference == pytest.approx(-0.5)


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
    done = harness(
        "crosscheck", plan, "--base-url", server.url, "--out", tmp_path / "runs", "--format", "json", timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["completed"] == [[24, 24]] * 3
    figures = {f["name"]: f for f in found["figures"]}
    assert figures["tpot_mean"]["theirs"] == pytest.approx(5, rel=0.3)
    truth = sorted(server.truth(), key=lambda t: t["received_ns"])
    runs = [truth[i : i + 24] for i in range(0, len(truth), 24)]
    assert len(runs) == 7, "one uncounted, three of each client"
    for run in runs:
        assert sorted((t["prompt_tokens"], t["tokens"]) for t in run) == sorted(lengths)
        span_s = (run[-1]["received_ns"] - run[0]["received_ns"]) / 1e9
        assert span_s == pytest.approx(23 * 0.05, abs=0.15), "sent at the plan's times"


def test_the_crosscheck_says_what_it_cannot_do(fake_server: StartServer, tmp_path):
    server = fake_server()
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "messages": [{"role": "user", "content": "hi"}], "output_tokens": 2}\n')
    plan = tmp_path / "plan.arrow"
    assert harness("plan", trace, "--base-url", server.url, "-o", plan).returncode == 0
    done = harness("crosscheck", plan, "--base-url", server.url, "--out", tmp_path / "runs")
    assert done.returncode == 2
    assert "needs a plan for the completions endpoint" in done.stderr
