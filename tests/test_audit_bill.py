"""Judge, gate, cascade and kept text of an audit, end to end on servers whose answers are planted."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import StartServer, harness
from test_audit_judge import Reply, fair, kind_to_the_candidate, server

from harness.errors import EXIT_INVALID, EXIT_USAGE, EXIT_VALID

QUESTION = "Question {}: which word belongs to the number {}?"
KEY = "judge-secret-0123456789"


def plant(
    start: StartServer, folder: Path, model: str, answers: Sequence[Sequence[str]], *args: str,
    logprobs: Sequence[float] | None = None,
) -> str:  # fmt: skip
    """``MODEL@URL`` of a server with these answers to each question: the first, the second time ..."""
    file = folder / f"{model}-answers.jsonl"
    scored = [{}] * len(answers) if logprobs is None else [{"logprob": one} for one in logprobs]
    rows = [{"prompt": QUESTION.format(i, i), "answers": tries, **score}
            for i, (tries, score) in enumerate(zip(answers, scored, strict=True))]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    url = start("--model", model, "--answers", str(file), "--ttft", "0.08", "--itl", "0.002", *args).url
    return f"{model}@{url}"


def trace(path: Path, n: int, check: dict[str, object], **more: object) -> Path:
    rows = ({"arrival_s": i * 0.01, "prompt": QUESTION.format(i, i), "max_tokens": 20, "expected": f"word{i}",
             "check": check, "tags": ["all"], **more} for i in range(n))  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def audited(path: Path, current: str, candidate: str, *more: str, **env: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, document, stderr) of an audit of one candidate at a tenth of the price."""
    names = [one.partition("@")[0] for one in (current, candidate)]
    prices = [x for name, usd in zip(names, ("2:8", "0.2:0.8"), strict=True) for x in ("--list-price", f"{name}={usd}")]
    asked = ("audit", path, "--current", current, "--candidate", candidate, *prices, "--slo", "ttft_p95=5s", "--rate",
             "100", "-o", path.parent / "audits", "--format", "json", *more)  # fmt: skip
    done = harness(*asked, timeout=300, **env)
    for _ in range(5):  # a load that this machine was too busy to measure is INVALID, and measured again
        found = json.loads(done.stdout or "{}")
        if not found or all(row["slo_met"] for row in found["models"]):
            break
        done = harness(*asked, "--resume", found["folder"], timeout=300, **env)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.parametrize(("reply", "code"), [(fair, EXIT_VALID), (kind_to_the_candidate, EXIT_INVALID)])
def test_a_judge_decides_only_where_it_is_believed(
    reply: Reply, code: int, fake_server: StartServer, tmp_path: Path
) -> None:
    n = 160
    path = trace(tmp_path / "trace.jsonl", n, {"type": "judge", "rubric": "The answer is the word."})
    right = [[f"word{i}"] if i % 3 else [f"wrong {i}"] for i in range(n)]
    current, small = (  # of a judge that is not believed nobody is asked
        plant(fake_server, tmp_path, name, right) if reply is fair else f"{name}@http://127.0.0.1:1/v1"
        for name in ("current", "small")
    )
    labels = [
        {"line": i + 1, "answer": f"word{i}" if i % 3 else f"wrong of the {who} {i}", "accepted": i % 3 > 0,
         "model": model}
        for i in range(80) for who, model in (("current", "current"), ("candidate", small))
    ]  # fmt: skip
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in labels))
    with server(reply) as url:
        found = audited(
            path, current, small, "--judge", url, "--judge-model", "judge-7b", "--labelled", str(file), "--margin",
            "5pt", HARNESS_JUDGE_API_KEY=KEY,
        )  # fmt: skip
    assert found[0] == code, found[2]
    answer = found[1]["answers"][0]
    assert (answer["verdict"]["word"] == "switch") is (reply is fair), answer["sentence"]
    if reply is fair:
        assert answer["judge"]["labels"] == 160 and answer["judged"]["low"] < 2 / 3 < answer["judged"]["high"]
    else:
        assert "kinder to one model" in answer["verdict"]["why"]
    assert KEY not in found[2] + json.dumps(found[1])
    assert not [
        file for file in (tmp_path / "audits").rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()
    ]


def test_a_planted_score_makes_a_cascade(fake_server: StartServer, tmp_path: Path) -> None:
    """The candidate loses 12 points; its log-probabilities tell nearly all of them."""
    n, draw = 400, random.Random(3)
    path = trace(tmp_path / "trace.jsonl", n, {"type": "contains"})
    good = [draw.random() < 0.8 for _ in range(n)]
    lost = [one and draw.random() < 0.15 for one in good]
    current = plant(fake_server, tmp_path, "current", [[f"word{i}" if good[i] else "no idea"] for i in range(n)])
    small = plant(
        fake_server, tmp_path, "small", [[f"word{i}" if good[i] and not lost[i] else "no idea"] for i in range(n)],
        logprobs=[draw.gauss(-3.0 if lost[i] else -0.5, 0.3) for i in range(n)],
    )  # fmt: skip
    code, found, said = audited(path, current, small, "--margin", "5pt", "--cascade")
    assert code == EXIT_VALID, said
    answer = found["answers"][0]
    assert answer["verdict"]["word"] == "switch as a cascade", answer["sentence"]
    cascade = answer["cascade"]
    assert cascade["held_out"]["current"] == pytest.approx(sum(good) / n)
    assert cascade["oracle"] == pytest.approx(sum(good) / n)
    assert -3 < cascade["threshold"] < 0 and answer["verdict"]["bill"]["high"] < 1


def test_retries_escalation_and_other_checks_on_kept_answers(fake_server: StartServer, tmp_path: Path) -> None:
    """Asked twice, the candidate passes the gate at once on half of the records, and on the others every other time."""
    n = 120
    gate = {"type": "regex", "pattern": "word"}
    path = trace(tmp_path / "trace.jsonl", n, {"type": "contains"}, gate=gate)
    current = plant(fake_server, tmp_path, "current", [[f"word{i} it is"] for i in range(n)])
    tries = [[f"word{i} here", "no idea", f"word{i} here"] if i % 2 else [f"word{i} here"] for i in range(n)]
    small = plant(fake_server, tmp_path, "small", tries)
    code, found, said = audited(
        path, current, small, "--margin", "5pt", "--repeats", "2", "--tries", "2", "--escalate", "--keep-text",
        "--gate-usd", "0.00001",
    )  # fmt: skip
    assert code == EXIT_VALID, said
    answer, row = found["answers"][0], found["models"][1]
    assert found["models"][0]["accepted"]["value"] == 1
    assert answer["verdict"]["word"] == "switch", answer["sentence"]
    assert row["calls"] == pytest.approx(1.25) and row["escalated"] == 0 and row["accepted"]["value"] == 1
    assert any("noise of the server" in note for note in found["notes"])

    # a load that proved nothing is not kept
    loaded = Path(found["folder"]) / "load-1-small" / "sweep.json"
    loaded.write_text(loaded.read_text().replace('"verdict": "VALID"', '"verdict": "INVALID"'))
    code, _, said = audited(
        path, current, small, "--margin", "5pt", "--repeats", "2", "--tries", "2", "--escalate", "--keep-text",
        "--gate-usd", "0.00001", "--resume", found["folder"],
    )  # fmt: skip
    assert code == EXIT_VALID and "to be done again: it was INVALID" in said, said

    other = tmp_path / "new.toml"
    other.write_text('[[check]]\nwhen = { all = "" }\ntype = "regex"\npattern = "here"\n')
    done = harness("audit", "grade", found["folder"], "--check", other, "--format", "json")
    assert done.returncode == EXIT_VALID, done.stderr
    regraded = json.loads(done.stdout)
    assert regraded["after_the_results"] is True
    assert [one["accepted"] for one in regraded["models"]] == [0, pytest.approx(0.75)]
    assert [one["accepted_before"] for one in regraded["models"]] == [1, pytest.approx(0.75)]
    assert regraded["models"][1]["difference"][0] == pytest.approx(0.75)

    state = Path(found["folder"]) / "audit.json"
    state.write_text(state.read_text().replace('"keep_text": true', '"keep_text": false'))
    done = harness("audit", "grade", found["folder"], "--check", other)
    assert done.returncode == EXIT_USAGE and "--keep-text" in done.stderr


def test_what_cannot_be_asked_together(tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.jsonl", 4, {"type": "contains"})
    there = ("a@http://127.0.0.1:1/v1", "b@http://127.0.0.1:1/v1")
    for more, why in ((("--tries", "2"), "--repeats 2"), (("--escalate",), "'gate'"),
                      (("--escalate", "--cascade"), "--cascade"), (("--judge", "http://h/v1"), "--judge-model"),
                      (("--labelled", str(path)), "--judge")):  # fmt: skip
        code, _, said = audited(path, *there, *more)
        assert code == EXIT_USAGE and why in said, said
