"""`harness audit --engine simulated`: what models cost on hardware that is not there, and nothing of their quality."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from harness.cli import cli
from harness.cluster.catalogue.tiers import get_tier
from harness.cluster.hardware.error import cost_range
from harness.errors import EXIT_NOT_DECIDED, EXIT_SLO_MISSED, EXIT_USAGE

NOW = "llama-3.1-70b-instruct@lambda-h100x2"
CANDIDATES = (
    "mistral-7b-instruct-v0.3@lambda-h100", "mistral-7b-instruct-v0.3-fp8@lambda-h100", "llama-2-13b-chat@lambda-h100",
    "llama-2-13b-chat-fp8@lambda-h100",
)  # fmt: skip
FP8 = "llama-3.1-70b-instruct-fp8"
BOUND = "mistral-7b-instruct-v0.3@aws-g6.xlarge"


def audit(trace: Path, *words: str, slo: str = "ttft_p95=2s,tpot_p95=100ms") -> Result:
    args = ["audit", str(trace), "--engine", "simulated", "--slo", slo, "--min-requests", "30", *words]
    return CliRunner().invoke(cli, [*args, "-o", str(trace.parent / "out")], standalone_mode=False)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of lengths; one is longer than Llama 2 reads."""
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("audit") / "lengths.jsonl"
    rows = [
        {"arrival_s": k / 8, "input_tokens": int(i), "output_tokens": int(o), "session_id": f"s{k % 40}"}
        for k, (i, o) in enumerate(zip(rng.integers(50, 1500, 240), rng.integers(20, 200, 240), strict=True))
    ]
    rows[9]["input_tokens"] = 5000
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def done(trace: Path) -> Result:
    """One load level of five models and of one whose tier has but a data sheet."""
    named = [word for name in (*CANDIDATES, BOUND) for word in ("--candidate", name)]
    return audit(trace, "--current", NOW, *named, "--quick", "--rate", "2", "--html", str(trace.parent / "page.html"))


def test_a_laptop_audits_models_it_cannot_hold_and_never_says_switch(done: Result, trace: Path) -> None:
    assert done.return_value == EXIT_NOT_DECIDED, (done.output, done.exception)
    (folder,) = (trace.parent / "out").iterdir()
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert [answer["verdict"]["word"] for answer in found["answers"]] == ["quality not measured"] * 5
    assert {model["evidence"] for model in found["models"]} == {"simulated"}
    now, *others = found["models"]
    assert now["slo_met"] is True and all(model["accepted"] is None for model in found["models"])
    # one instance of each carries 2 requests/s: the rent of an hour by 7,200 requests
    assert now["usd_per_request"]["value"] == pytest.approx(get_tier("lambda-h100x2").usd_per_hour / 7200)
    ratio = get_tier("lambda-h100").usd_per_hour / get_tier("lambda-h100x2").usd_per_hour
    for answer in found["answers"][:4]:
        assert answer["usd_per_request"]["value"] == pytest.approx(ratio), answer["sentence"]
    # a bound is no estimate: it is held against nothing
    assert others[4]["at_least"] is True and found["answers"][4]["usd_per_request"] is None


def test_every_line_that_names_a_model_says_simulated(done: Result, trace: Path) -> None:
    page = re.sub(r"<[^>]+>", " ", (trace.parent / "page.html").read_text().partition("<body")[2])
    for text in (done.stdout, page):
        lines = [line for line in text.splitlines() if re.search(r"(instruct|chat).* on (lambda|aws)", line)]
        assert len(lines) > 20 and all("simulated" in line.lower() for line in lines), lines
    assert "at least" in done.stdout and "lengths of the trace" in done.stdout
    left_out = [line for line in done.stdout.splitlines() if "do not fit into its context of 4,096" in line]
    assert len(left_out) == 2, "what Llama 2 cannot read is said"


def test_a_search_claims_a_capacity_with_the_simulators_own_error(trace: Path) -> None:
    done = audit(trace, "--current", NOW, "--candidate", f"{FP8}@lambda-h100x2", "--probe", "15", "--tolerance", "40%",
                 "--format", "json")  # fmt: skip
    found = json.loads(done.stdout)
    assert done.return_value == EXIT_NOT_DECIDED
    cheap, dear = cost_range("kernels", "H100", {})
    for model in found["models"]:
        rate = model["capacity"]
        assert rate["low"] <= rate["value"] / dear
        assert rate["high"] is None or rate["high"] >= rate["value"] / cheap


def test_a_list_price_is_held_against_at_the_lengths_of_the_trace(trace: Path) -> None:
    done = audit(trace, "--current", "big@https://api.example.com/v1", "--list-price", "big=2:10", "--candidate",
                 CANDIDATES[0], "--quick", "--rate", "2", "--format", "json")  # fmt: skip
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    usd = np.mean([2 * row["input_tokens"] + 10 * row["output_tokens"] for row in rows]) / 1e6
    found = json.loads(done.stdout)
    assert found["models"][0]["usd_per_request"]["value"] == pytest.approx(usd)
    assert found["models"][0]["usd_per_accepted"] is None
    again = audit(trace, "--current", "big@https://api.example.com/v1", "--list-price", "big=2:10", "--candidate",
                  CANDIDATES[0], "--quick", "--rate", "2", "--format", "json", "--resume", found["folder"])  # fmt: skip
    assert json.loads(again.stdout)["models"] == found["models"], "what is whole is not simulated again"


def test_an_slo_that_the_current_model_misses_is_exit_4(trace: Path) -> None:
    done = audit(trace, "--current", NOW, "--candidate", CANDIDATES[0], "--quick", "--rate", "2", slo="ttft_p95=9ms")
    assert done.return_value == EXIT_SLO_MISSED


@pytest.mark.parametrize("words, said", [
    (["--escalate"], "--escalate: needs answers"),
    (["--candidate", "big@https://api.example.com/v1"], "--list-price big=IN:OUT"),
    (["--candidate", "smollm2-135m@aws-m7a.large"], "no step times are known of a CPU"),
])  # fmt: skip
def test_what_only_answers_or_hardware_can_tell_is_refused(trace: Path, words: list[str], said: str) -> None:
    done = audit(trace, "--current", NOW, "--candidate", CANDIDATES[0], *words)
    assert said in str(done.exception) and getattr(done.exception, "exit_code", EXIT_USAGE) == EXIT_USAGE


def test_texts_are_refused_with_what_makes_lengths_of_them(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"prompt": "Say yes.", "arrival_s": 0}) + "\n")
    done = audit(path, "--current", NOW, "--candidate", CANDIDATES[0])
    assert "harness trace anonymize" in str(done.exception)
