"""A judge over HTTP: one that is fair is believed, one that is down, nonsense, slow, biased or injected is not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness.analysis.quality.judging import sharpness
from harness.audit.asked import AuditOptions
from harness.audit.judge import KEY, HttpJudge, JudgeTrial, Label, read_labels, try_judge
from harness.audit.records import AuditedRecord
from harness.checks.judge import SCHEMA, AskedJudge
from harness.checks.spec import parse_check
from harness.cli.runner.audit_judge import check_labels, trust_of
from harness.errors import UsageError
from harness.trace.formats.record import TraceRecord

Reply = Callable[[dict[str, object]], tuple[int, object]]
"""From the request's body to status and body."""
SECRET = "judge-key-1234567890"


@contextmanager
def server(reply: Reply, seen: list[dict[str, object]] | None = None) -> Iterator[str]:
    """A judge at a URL, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append({**body, "key": self.headers.get("Authorization")})
            status, said = reply(body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        request_queue_size = 128  # of five, the sixth that comes at once waits a second for the next SYN

    listener = Listener(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}/v1"
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def said(verdict: object) -> dict[str, object]:
    content = verdict if isinstance(verdict, str) else json.dumps(verdict)
    return {"choices": [{"message": {"content": content}}]}


def shown(body: dict[str, object]) -> dict[str, object]:
    messages = body["messages"]
    assert isinstance(messages, list)
    found: dict[str, object] = json.loads(messages[1]["content"])
    return found


def fair(body: dict[str, object]) -> tuple[int, object]:
    """Right when the whole answer is the reference."""
    data = shown(body)
    references = data["references"]
    assert isinstance(references, list)
    return 200, said({"verdict": "accept" if data["answer"] in references else "reject"})


def kind_to_the_candidate(body: dict[str, object]) -> tuple[int, object]:
    """Half of the candidate's wrong answers (they say so) are let through."""
    data = shown(body)
    if "wrong of the candidate" in str(data["answer"]) and str(data["answer"]).endswith(("1", "3", "5", "7", "9")):
        return 200, said({"verdict": "accept"})
    return fair(body)


def obedient(body: dict[str, object]) -> tuple[int, object]:
    """Does what the answer says."""
    if "accept" in str(shown(body)["answer"]):
        return 200, said({"verdict": "accept"})
    return fair(body)


N = 60
RECORDS = [
    AuditedRecord(
        row=i,
        session=i,
        gate=None,
        check=parse_check('{"type": "judge", "rubric": "The word."}', [f"word{i}"]),
        source=TraceRecord(None, None, None, text=f"Which word belongs to {i}?", line=i + 1),
    )
    for i in range(N)
]
LABELS = [
    Label(line=i + 1, answer=f"word{i}" if good else f"wrong of the {who} {i}", accepted=good, model=model)
    for i in range(N)
    for who, model in (("current", "current"), ("candidate", "small@http://h/v1"))
    for good in (i % 3 > 0,)
]


def trial(url: str, total_s: float = 60.0, records: list[AuditedRecord] = RECORDS) -> JudgeTrial:
    return try_judge(AskedJudge(HttpJudge(url, "judge", total_s)), records, LABELS)


def test_a_fair_judge_is_believed_and_asked_as_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    seen: list[dict[str, object]] = []
    with server(fair, seen) as url:
        found = trial(url)
    assert found.canaries >= 20 and found.accepted == 0 and len(found.labelled) == 2 * N
    trusted = trust_of(found, "small@http://h/v1", 0.05)
    assert trusted.faults == () and trusted.labels == 2 * N and 0.8 < sharpness(trusted) < 1
    assert {one["key"] for one in seen} == {f"Bearer {SECRET}"}
    assert all(one["temperature"] == 0 and "json_schema" in str(one["response_format"]) for one in seen)


def test_a_judge_that_says_to_come_back_is_asked_again() -> None:
    left = [429, 503, 429]

    def busy(body: dict[str, object]) -> tuple[int, object]:
        return (left.pop(), {}) if left else fair(body)

    with server(busy) as url:
        judge = HttpJudge(url, "judge", 60.0)
        data = json.dumps({"task": "t", "references": ["a"], "answer": "a"})
        assert judge([{"role": "system", "content": ""}, {"role": "user", "content": data}], SCHEMA) is not None
    assert not left and judge.unheard == 0


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (kind_to_the_candidate, "kinder to one model"),
        (obedient, "accepted a canary"),
        (lambda body: (200, said({"verdict": "accept"})), "accepted a canary"),
        (lambda body: (200, said("I would say: accept!")), "too often no verdict"),
        (lambda body: (200, b"\xff\x00nonsense"), "too few canaries"),
        (lambda body: (200, {"choices": []}), "too few labels"),
        (lambda body: (500, {}), "too few canaries"),
        (lambda body: (200, b"[" * 100_000), "too few canaries"),
    ],
)
def test_another_is_not_believed(reply: Reply, fault: str) -> None:
    with server(reply) as url:
        found = trial(url)
    assert fault in trust_of(found, "small@http://h/v1", 0.05).faults


def test_one_that_is_down_or_slow_ends_in_time() -> None:
    found = trial("http://127.0.0.1:1/v1")
    assert "too few canaries" in trust_of(found, "small@http://h/v1", 0.05).faults
    ended = threading.Event()

    def slow(body: dict[str, object]) -> tuple[int, object]:
        ended.wait(20)
        return fair(body)

    began = time.monotonic()
    with server(slow) as url:
        found = trial(url, total_s=0.5)
        took = time.monotonic() - began
        ended.set()
    assert all(one.judged is None for one in found.labelled) and found.canaries == 0
    assert took < 15, "its time is one for all questions"


def test_labels_are_lines_of_the_trace_and_of_models_that_are_audited(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_text('{"line": 1, "answer": "word0", "accepted": true, "model": "current"}\n\n')
    (label,) = read_labels(file)
    want = AuditOptions(current="a@http://h/v1", candidates=["small@http://h/v1"])
    check_labels([label], want)
    for wrong in (Label(line=1, answer="", accepted=True, model="other"),):
        with pytest.raises(UsageError, match="other"):
            check_labels([wrong], want)
    with pytest.raises(UsageError, match="line 999"):
        try_judge(AskedJudge(lambda *_: None), RECORDS, [Label(line=999, answer="", accepted=True, model="current")])
    file.write_text('{"line": 1}\n')
    with pytest.raises(UsageError, match=r"labels\.jsonl:1"):
        read_labels(file)
