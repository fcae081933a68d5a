"""What a person types, rightly and wrongly, and what they are told."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from conftest import StartServer, harness

from harness.option_types import parse_duration

TRACE = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "azure-conv-2023.csv"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("1.5m", 90),
        ("2h", 7200),
        ("150ms", 0.15),
        ("", None),
        ("5x", None),
        ("-1", None),
        ("1e9", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["replya"], 2, "replay"),
        (["replay", str(TRACE), "--sped", "2"], 2, "--speed"),
        (["replay", str(TRACE), "--slo", "tfft=2s"], 2, "ttft"),
        (["replay", str(TRACE), "--slo", "ttft=2s,ttft=3s"], 2, "ttft has a limit already"),
        (["replay", str(TRACE), "--slo", "ttft=2000"], 2, "write ttft=2000ms or ttft=2000s"),
        (["replay", str(TRACE), "--slo", "ttft:2s"], 2, "write ttft=2s"),
        (["replay", str(TRACE), "--slo", "p99_ttft=2s"], 2, "write ttft_p99=2s"),
        (["replay", str(TRACE), "--slo", "TTFT-p99<=2s"], 2, "write ttft_p99=2s"),
        (["replay", str(TRACE), "--slo", "ttft"], 2, "write a metric and its limit"),
        (["replay", str(TRACE), "--slo", "ttft=0s"], 2, "not a time above 0"),
        (["replay", str(TRACE), "--slo", ","], 2, "no limit"),
        (["replay", str(TRACE), "--attain", "95%"], 2, "--slo"),
        (["replay", str(TRACE), "--duration", "5 parsecs"], 2, "1.5m"),
        (["replay", str(TRACE), "--model", "smollm2-135"], 2, "smollm2-135m"),
        (["replay", str(TRACE), "--tier", "aws-m7a.larg"], 2, "aws-m7a.large"),
        (["replay", str(TRACE), "--trace-format", "azur"], 2, "azure"),
        (["replay", str(TRACE), "--concurrency", "8", "--rate", "2"], 2, "closed loop"),
        (["replay", str(TRACE), "--speed", "2", "--rate", "2"], 2, "one"),
        (["replay", str(TRACE), "--rate", "0"], 2, "0"),
        (["replay", str(TRACE), "--base-url", "127.0.0.1:8000"], 2, "http://"),
        (["replay", str(TRACE), "--base-url", "http://user:secret@127.0.0.1:8000"], 2, "HARNESS_API_KEY"),
        (["replay", str(TRACE), "--extra-body", "[1]"], 2, "object"),
        (["replay", "no-such-trace.jsonl"], 1, "no-such-trace.jsonl"),
        (["report", "no-such-run"], 1, "not a run directory"),
        (["run", "no-such-plan.arrow"], 1, "no-such-plan.arrow"),
    ],
)  # fmt: skip
def test_wrong_input_is_answered_with_what_to_do(args: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = harness(*args, *(["--out", str(tmp_path)] if args[0] in ("replay", "run") else []))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert done.stdout == ""


def test_server_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    done = harness("replay", TRACE, "--base-url", url, "--out", tmp_path)
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert list(tmp_path.iterdir()) == [], "no run directory for a run that never was"


def test_api_key(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.001", FAKE_SERVER_API_KEY="right-key-123")
    args = ("replay", TRACE, "--limit", "5", "--concurrency", "5", "--base-url", server.url, "--out", tmp_path)
    none = harness(*args)
    assert none.returncode == 1
    assert "HARNESS_API_KEY" in none.stderr
    wrong = harness(*args, HARNESS_API_KEY="wrong-key-456")
    assert wrong.returncode == 1
    assert "401" in wrong.stderr
    right = harness(*args, "--format", "json", HARNESS_API_KEY="right-key-123")
    assert right.returncode == 0, right.stderr
    assert json.loads(right.stdout)["requests"]["succeeded"] == 5, right.stdout
    assert "-key-" not in none.stderr + wrong.stderr + right.stderr + right.stdout
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"right-key-123" not in file.read_bytes(), file


def test_unknown_model_at_the_server(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server("--model", "mistral-7b")
    done = harness("replay", TRACE, "--base-url", server.url, "--model", "mistral-8b", "--out", tmp_path)
    assert done.returncode == 1, "a list is advice; that a first request is refused is not"
    assert "did you mean mistral-7b" in done.stderr and "no load was begun" in done.stderr


def test_bad_trace_line(tmp_path: Path, fake_server: StartServer) -> None:
    trace = tmp_path / "trace.jsonl"
    good = '{"arrival_s": 0.0, "input_tokens": 5, "output_tokens": 5}\n'
    trace.write_text(
        good + '{"arrival_s": 1.0, "input_tokens": "many", "output_tokens": 5}\n' + good.replace("0.0", "2.0")
    )
    server = fake_server("--ttft", "0.01", "--itl", "0.001")
    args = ("replay", trace, "--base-url", server.url, "--out", tmp_path / "runs", "--speed", "10", "--format", "json")
    done = harness(*args)
    assert done.returncode == 1
    assert f"{trace}:2: " in done.stderr
    assert "input_tokens" in done.stderr
    skipped = harness(*args, "--skip-bad")
    assert skipped.returncode == 0, skipped.stderr
    plan = json.loads(skipped.stdout)["plan"]
    assert plan["rows_read"] == 3
    assert plan["rows_kept"] == 2
    assert sum(plan["rows_dropped"].values()) == 1


def test_no_permission_and_not_a_folder(tmp_path: Path, fake_server: StartServer) -> None:
    server = fake_server()
    file = tmp_path / "file"
    file.write_text("")
    done = harness("replay", TRACE, "--base-url", server.url, "--out", file)
    assert done.returncode in (1, 2)
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


def test_lists_are_for_scripts_too() -> None:
    tiers = json.loads(harness("tiers", "--format", "json").stdout)["tiers"]
    assert {"name", "usd_per_hour", "source", "date", "region", "purchase"} <= set(tiers[0])
    assert all(t["source"] and t["date"] and t["usd_per_hour"] > 0 for t in tiers)
    eight = next(t for t in tiers if t["accelerator_count"] == 8)
    assert eight["usd_per_accelerator_hour"] == eight["usd_per_hour"] / 8
    models = json.loads(harness("models", "--format", "json").stdout)["models"]
    assert "smollm2-135m" in {m["name"] for m in models}
    doctor = json.loads(harness("doctor", "--format", "json").stdout)
    assert {f["level"] for f in doctor["findings"]} <= {"ok", "limit", "missing"}
    assert len(doctor["can"]) == 3
    for verb in ("tiers", "models", "doctor"):
        assert harness(verb).stdout


def test_every_verb_has_help() -> None:
    for verb in ("replay", "plan", "serve", "run", "report", "doctor", "tiers", "models"):
        done = harness(verb, "--help")
        assert done.returncode == 0
        assert "Usage" in done.stdout
