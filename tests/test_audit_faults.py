"""Audits of servers that limit rates or die, end to end: no verdict is wrong, and what is missing is completed."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from conftest import StartServer, harness
from test_audit_bill import plant, trace

from harness.errors import EXIT_INVALID, EXIT_USAGE, EXIT_VALID

N = 72
RIGHT = [[f"word{i}" if i % 4 else "no idea"] for i in range(N)]
TRACE_CHECK: dict[str, object] = {"type": "contains"}


def audited(path: Path, current: str, candidates: list[str], *more: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, document, stderr); candidates cost a tenth."""
    names = [one.partition("@")[0] for one in (current, *candidates)]
    prices = [x for name in names for x in ("--list-price", f"{name}={'2:8' if name == 'current' else '0.2:0.8'}")]
    done = harness(
        "audit", path, "--current", current, *(x for one in candidates for x in ("--candidate", one)), *prices,
        "--slo", "ttft_p95=900ms", "--margin", "8pt", "-o", path.parent / "audits", "--format", "json", *more,
        timeout=300,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_a_rate_limit_is_obeyed_and_is_part_of_the_answer(fake_server: StartServer, tmp_path: Path) -> None:
    """Each API forbids who comes back too soon, and admits 60, 60 and 12 requests/s: the trace has 24."""
    path = trace(tmp_path / "trace.jsonl", N, TRACE_CHECK)
    current = plant(fake_server, tmp_path, "current", RIGHT, "--rate-limit", "60")
    equal, slow = (
        plant(fake_server, tmp_path, name, RIGHT, "--rate-limit", most)
        for name, most in (("equal", "60"), ("slow", "12"))
    )
    code, found, said = audited(path, current, [equal, slow], "--rate", "24")
    for _ in range(4):  # a load that this machine was too busy to measure is INVALID
        if all(row["slo_met"] is not None for row in found["models"]):
            break
        code, found, said = audited(path, current, [equal, slow], "--rate", "24", "--resume", found["folder"])
    assert code == EXIT_VALID, said
    assert [row["failed"] for row in found["models"]] == [0, 0, 0], "nobody came back before Retry-After"
    assert [row["accepted"]["value"] for row in found["models"]] == [0.75] * 3
    words = [answer["verdict"]["word"] for answer in found["answers"]]
    assert words == ["switch", "do not switch: misses the SLO"], [answer["sentence"] for answer in found["answers"]]
    assert found["models"][2]["load"].startswith("24 req/s: VALID"), found["models"][2]["load"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_a_server_that_dies_is_invalid_until_resume_completes_it(fake_server: StartServer, tmp_path: Path) -> None:
    """One dies in its quality pass, one under load; both come back."""
    path = trace(tmp_path / "trace.jsonl", N, TRACE_CHECK)
    current = plant(fake_server, tmp_path, "current", RIGHT)
    ports = {"early": free_port(), "late": free_port()}
    dying = [
        plant(fake_server, tmp_path, name, RIGHT, "--port", str(ports[name]), "--die-after", str(after))
        for name, after in (("early", N // 2), ("late", N + N // 2))
    ]
    page = tmp_path / "audit.html"
    asked = ("--rate", "40", "--html", str(page))
    code, found, said = audited(path, current, dying, *asked)
    assert code == EXIT_INVALID, said
    why = [(answer["verdict"]["word"], answer["verdict"]["why"]) for answer in found["answers"]]
    assert [word for word, _ in why] == ["INVALID", "INVALID"]
    assert why[0][1].startswith("its server was no more after "), why
    assert why[1][1].startswith("under load: its server was no more after "), why
    assert all(reason in page.read_text() for _, reason in why)
    assert [row["load"].startswith("not loaded") for row in found["models"]] == [False, True, False]

    back = [plant(fake_server, tmp_path, name, RIGHT, "--port", str(port)) for name, port in ports.items()]
    assert back == dying
    for _ in range(4):
        code, found, said = audited(path, current, dying, *asked, "--resume", found["folder"])
        if all(row["slo_met"] for row in found["models"]):
            break
    assert code == EXIT_VALID, said
    assert [answer["verdict"]["word"] for answer in found["answers"]] == ["switch", "switch"]
    assert [answer["difference"]["value"] for answer in found["answers"]] == [0, 0]


def test_a_cascade_is_decided_by_its_score_and_tries_by_a_gate(tmp_path: Path) -> None:
    path = trace(tmp_path / "trace.jsonl", 4, TRACE_CHECK, gate={"type": "regex", "pattern": "word"})
    there = ("a@http://127.0.0.1:1/v1", ["b@http://127.0.0.1:1/v1"])
    code, _, said = audited(path, *there, "--cascade", "--tries", "2", "--repeats", "2")
    assert code == EXIT_USAGE and "either the score or the gate decides" in said
