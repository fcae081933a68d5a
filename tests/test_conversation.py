"""Live conversations: a turn carries what the server really answered; from the plan to the server's own record."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import gevent
import msgspec
import numpy as np
import pytest
from conftest import ROOT, StartServer, harness, trace_record
from hypothesis import given, settings
from hypothesis import strategies as st
from test_client import HEAD, Run, Server, chunk, read_request, request, spec_of
from test_plan import VOCABULARY, build, trace_of
from test_worker import classes, starter, write_plan  # noqa: F401 - a fixture

from harness.errors import PlanError, UsageError
from harness.plan.chat import Live, Prompt
from harness.plan.file import iter_requests, plan_sha256, read_plan_info
from harness.record.manifest import RunDir, read_manifest
from harness.record.results import Result, read_results
from harness.record.run_spec import RunSpec
from harness.scenarios.client.completion import StreamedAnswer
from harness.scenarios.client.http1 import Response
from harness.scenarios.dispatch import Conversations
from harness.scenarios.plan_reader import PlanReader, draft, prepare
from harness.scenarios.schedule import Schedule
from harness.trace.io import TraceRecord

S = 1_000_000_000
FORMS = ("messages", "text", "ids")


def held(conversations: Conversations) -> int:
    """Answers that are waited for or kept."""
    return len(conversations._open) + len(conversations._said)


def body_of(payload: bytes) -> dict[str, Any]:
    return json.loads(payload.partition(b"\r\n\r\n")[2])


# -- the plan: what is new in a turn ----------------------------------------------------------------------------------


def record(form: str, prompt: Any, *, answer: str | None = None, output_tokens: int | None = None) -> TraceRecord:
    return trace_record(
        1, 0.0, len(prompt) if form == "ids" else None, output_tokens, session_id="s", answer=answer,
        text=prompt if form == "text" else None, messages=tuple(prompt) if form == "messages" else None,
    )  # fmt: skip


def prompt_of(form: str, value: Any) -> Prompt:
    if form == "messages":
        return Prompt(messages=value)
    return Prompt(text=value) if form == "text" else Prompt(ids=np.array(value, dtype=np.int32))


def said_by(form: str, answer: str) -> Any:
    """An answer as the next recorded prompt holds it."""
    if form == "messages":
        return [{"role": "assistant", "content": answer}]
    return answer if form == "text" else list(answer.encode())


def asked_by(form: str, question: str) -> Any:
    return [{"role": "user", "content": question}] if form == "messages" else said_by(form, question)


def whole(form: str, part: Prompt) -> Any:
    return part.messages if form == "messages" else part.text if form == "text" else part.ids.tolist()


def planned(form: str, i: int, prompt: Any, **fields: Any) -> Any:
    given_ = {
        "messages": {"ids": None, "messages": json.dumps(prompt)}, "text": {"ids": None, "text": prompt},
        "ids": {"ids": prompt},
    }[form]  # fmt: skip
    return request(i, **given_, **fields)


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(form=st.sampled_from(FORMS), turns=st.lists(st.tuples(words, words), min_size=1, max_size=6))
def test_with_the_recorded_answers_a_live_conversation_is_the_recorded_one(form, turns):
    """The plan cuts each prompt into what is new, the client puts it together: the same bytes as ever, JSON-wise."""
    live, history, prompt, before = Live(), b"", asked_by(form, ""), None
    endpoint = "chat" if form == "messages" else "completions"
    for i, (question, answer) in enumerate(turns):
        more = asked_by(form, question)
        prompt = more if i == 0 else prompt + said_by(form, before) + more
        output = len(answer.encode()) if form == "ids" else None
        new = live.new(0, record(form, prompt, answer=answer, output_tokens=output), prompt_of(form, prompt))
        assert (new is None) == (i == 0)
        part = prompt if new is None else whole(form, new)
        assert part == more
        turn = draft(planned(form, i, part), spec_of(endpoint=endpoint, model="m"), kept=True)
        expected = body_of(prepare(planned(form, i, prompt), spec_of(endpoint=endpoint, model="m")))
        got = body_of(turn.payload(history))
        assert got.pop("return_token_ids", None) == (True if form == "ids" else None)
        assert got == expected
        said = StreamedAnswer()
        said.parts.append(answer)
        said.token_ids += list(answer.encode()) if form == "ids" else []
        history, before = turn.history(history, said), answer
    assert (live.continued, live.whole) == (len(turns) - 1, {})


def chat(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (("messages", chat("a"), {}), ("messages", chat("other", "b", "c")), "does not begin"),
        (("messages", chat("a", "b", "c")), ("messages", chat("c")), "does not begin"),
        (("messages", chat("a")), ("messages", chat("a", "b")), "no answer stands"),
        (("messages", chat("a")), ("messages", [*chat("a"), *chat("again")]), "no answer stands"),
        (("text", "a", {"answer": "b"}), ("text", "a c"), "no answer stands"),
        (("text", "a"), ("text", "a b c"), "does not say the answer"),
        (("ids", [1, 2], {"output_tokens": 3}), ("ids", [1, 2, 3, 4]), "no answer stands"),
        (("ids", [1, 2], {"output_tokens": 3}), ("ids", [7, 2, 3, 4, 5, 6]), "does not begin"),
        (("text", "a", {"answer": "b"}), ("messages", chat("a", "b", "c")), "another form"),
    ],
)  # fmt: skip
def test_a_turn_that_does_not_go_on_is_sent_whole_and_counted(first, second, why):
    live = Live()
    for form, prompt, *fields in (first, second):
        assert live.new(0, record(form, prompt, **(fields[0] if fields else {})), prompt_of(form, prompt)) is None
    assert live.continued == 0
    (reason,) = live.whole
    assert why in reason
    assert live.whole[reason] == 1


def sessions_of(turns: int, sessions: int = 2, **fields: Any) -> list[dict[str, Any]]:
    """Rows of a chat trace: sessions by turns, whole histories, as logs have them."""
    return [
        {
            "arrival_s": round(0.02 * (turn * sessions + s), 3), "session_id": f"s{s}", "turn": turn,
            "messages": chat(*(f"recorded {s} {k}" for k in range(2 * turn + 1))), "output_tokens": 4, **fields,
        }
        for turn in range(turns) for s in range(sessions)
    ]  # fmt: skip


def test_the_plan_holds_what_is_new_and_says_so(tmp_path):
    rows = sessions_of(3)
    info = build(trace_of(tmp_path, *rows), tmp_path / "p", closed=False, sessions="wait", conversation="live")
    assert (info.conversation, read_plan_info(tmp_path / "p")) == ("live", info)
    requests = list(iter_requests(tmp_path / "p"))
    assert [r.continues for r in requests] == [None, None, True, True, True, True]
    assert json.loads(requests[4].messages) == chat("recorded 0 4")
    assert (requests[4].after, requests[4].slice) == (2, requests[0].slice)
    assert any("4 turns carry what the server really answers" in note for note in info.notes)
    build(trace_of(tmp_path, *rows), tmp_path / "q", closed=False, sessions="wait", conversation="live")
    assert plan_sha256(tmp_path / "q") == plan_sha256(tmp_path / "p"), "answers are not part of a plan"
    recorded = build(trace_of(tmp_path, *rows), tmp_path / "r", closed=False, sessions="wait")
    assert recorded.conversation == "recorded"
    assert [r.continues for r in iter_requests(tmp_path / "r")] == [None] * 6


def test_turns_that_do_not_go_on_are_noted_with_the_reason(tmp_path):
    rows = sessions_of(2)
    rows[3]["messages"] = chat("a new beginning")
    info = build(trace_of(tmp_path, *rows), tmp_path / "p", closed=False, sessions="wait", conversation="live")
    assert [r.continues for r in iter_requests(tmp_path / "p")] == [None, None, True, None]
    assert any("1 later turns are sent as recorded: 1 x the prompt does not begin" in note for note in info.notes)


def test_made_up_conversations_go_on_too(tmp_path):
    """Lengths only: what is new has the tokens that the trace adds beyond prompt and answer."""
    rows = [
        {"arrival_s": i, "input_tokens": 20 + 17 * i, "output_tokens": 10, "session_id": "a"} for i in range(3)
    ]  # fmt: skip
    build(
        trace_of(tmp_path, *rows), tmp_path / "p", closed=False, sessions="wait", conversation="live",
        vocabulary=VOCABULARY,
    )  # fmt: skip
    requests = list(iter_requests(tmp_path / "p"))
    assert [len(r.prompt_token_ids) for r in requests] == [20, 7, 7]
    assert [r.input_tokens for r in requests] == [20, 37, 54], "what was asked, with what goes before it"


@pytest.mark.parametrize(
    ("rows", "spec", "words"),
    [
        (sessions_of(1), {}, "no session has a second turn"),
        ([{**row, "session_id": f"s{i}"} for i, row in enumerate(sessions_of(2))], {}, "no session has a second turn"),
        ([{"prompt": "a", "session_id": "s", "arrival_s": 0}, {"prompt": "ab", "session_id": "s", "arrival_s": 1}],
         {}, "does not say the answer"),
        (sessions_of(2), {"sessions": "trace"}, "sessions wait"),
    ],
)  # fmt: skip
def test_what_cannot_be_live_is_refused_when_planned(tmp_path, rows, spec, words):
    with pytest.raises(UsageError, match=words):
        build(
            trace_of(tmp_path, *rows), tmp_path / "p",
            **{"closed": False, "sessions": "wait", "conversation": "live", **spec},
        )  # fmt: skip
    assert not (tmp_path / "p").exists()


# -- the bodies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{"messages": []}, {"prompt": "x"}, {"n": 2}, {"best_of": 3}, {"echo": True}])
def test_a_body_of_ones_own_that_a_conversation_cannot_have(extra):
    with pytest.raises(UsageError, match="live conversation"):
        draft(request(text="a", ids=None), spec_of(endpoint="chat", extra_body=extra), kept=True)


def test_only_turns_whose_ids_are_needed_ask_for_them():
    assert body_of(draft(request(), spec_of(), kept=True).payload())["return_token_ids"] is True
    last = body_of(draft(request(), spec_of(), kept=False).payload(b"5,6"))
    assert "return_token_ids" not in last
    assert last["prompt"] == [5, 6, 1, 2, 3]


def test_a_damaged_plan_is_refused(tmp_path):
    for damage in ({"after": [None, 0, 0], "continues": [None, True, True]}, {"continues": [None, True, None]}):
        plan = write_plan(tmp_path / f"{len(damage)}.arrow", n=3, slice=[0, 0, 0], **damage)
        with pytest.raises(PlanError, match="damaged"):
            PlanReader(plan, RunSpec(mode="open", model="m", base_urls=[]))


# -- what was said ----------------------------------------------------------------------------------------------------


def events(*choices: dict[str, Any], fields: dict[str, Any] | None = None) -> list[bytes]:
    return [b"data: " + msgspec.json.encode({"id": "x", "choices": [c], **(fields or {})}) + b"\n\n" for c in choices]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=30),
    cuts=st.lists(st.integers(1, 4000), max_size=40),
    spoken=st.booleans(),
)
def test_what_was_said_is_the_same_however_it_arrives(texts, cuts, spoken):
    """Any cut into reads, content between reasoning: the text is that of the content alone."""
    choices = [{"index": 0, "delta": {"reasoning_content": "hm"}}] * 6
    choices += [{"index": 0, "delta": {"content": text} if spoken else {"reasoning": text}} for text in texts]
    raw = HEAD + b"".join(map(chunk, events(*choices))) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
    at = sorted({cut % len(raw) for cut in cuts} - {0})
    reads = [raw[a:b] for a, b in pairwise([0, *at, len(raw)])]
    response = Response(None, StreamedAnswer())
    for stamp, read in enumerate(reads):
        response.feed(read, stamp)
    assert response.done
    assert response.answer is not None
    assert response.answer.text == ("".join(texts) if spoken else "")


class Echo(Server):
    """Answers each request with a text that nobody could have guessed, and writes down what it was sent."""

    def __init__(self, *, fail: Any = None, slow_s: float = 0.0, ids: bool = True, tokens: int = 30) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.said: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.fail, self.slow_s, self.ids, self.tokens = fail, slow_s, ids, tokens
        super().__init__(self.answer)

    def answer(self, connection, nth):
        while raw := read_request(connection):
            head, _, rest = raw.partition(b"\r\n\r\n")
            body = json.loads(rest or head)
            with self.lock:
                number = len(self.bodies)
                self.bodies.append(body)
            if self.fail is not None and self.fail(body):
                connection.sendall(b"HTTP/1.1 500 X\r\nContent-Length: 4\r\n\r\nboom")
                continue
            ids = [1000 * (number + 1) + k for k in range(self.tokens)]
            texts = [f" {number}-{k}" + (' "\u00e9"\n' if k % 7 == 6 else "") for k in range(self.tokens)]
            self.said[json.dumps(body.get("messages") or body.get("prompt"))] = (
                ids if isinstance(body.get("prompt"), list) else "".join(texts)
            )
            self.stream(connection, body, ids, texts)

    def stream(self, connection, body, ids, texts):
        connection.sendall(HEAD)
        for i, text in zip(ids, texts, strict=True):
            choice: dict[str, Any] = {"delta": {"content": text}} if "messages" in body else {"text": text}
            if body.get("return_token_ids") and self.ids:
                choice["token_ids"] = [i]
            connection.sendall(chunk(events({"index": 0, **choice})[0]))
            if self.slow_s:
                threading.Event().wait(self.slow_s)
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n' % self.tokens
        connection.sendall(chunk(usage) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


@pytest.fixture
def echo():
    servers = []

    def start(**options: Any) -> Echo:
        servers.append(Echo(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.socket.close()


@pytest.mark.parametrize("tokens", [1, 3, 40, 400])
def test_a_client_tells_the_answer_and_goes_on_recognising_plain_events(echo, tokens):
    server, told = echo(tokens=tokens, slow_s=0.0005), []
    run = Run(server.url, endpoint="chat")
    try:
        payload = draft(request(text="hi", ids=None), spec_of(endpoint="chat"), kept=True).payload()
        stream = run.client.send(Result(0, 0), payload, on_answer=lambda result, answer: told.append(answer.text))
        run.sent = 1
        texts = 0
        while not run.rows:
            texts = max(texts, len(stream.buffer) if not stream.buffer.chunk_bytes else 0)
            gevent.sleep(0.002)
        assert (run.rows[0].error, run.rows[0].output_tokens, len(run.rows[0].chunk_ns)) == (None, tokens, tokens)
        assert told == list(server.said.values())
        if tokens == 400:
            assert texts > 10, "its plain events were recognised, not parsed"
    finally:
        run.client.close()


# -- the worker -------------------------------------------------------------------------------------------------------


def chain(turns: int, sessions: int = 1, form: str = "messages", **more: Any) -> dict[str, Any]:
    """Columns of a plan of so many sessions, one turn of each after the other."""
    n = turns * sessions
    after = [None if i < sessions else i - sessions for i in range(n)]
    columns: dict[str, Any] = {
        "slice": [i % sessions for i in range(n)], "after": after, "continues": [a is not None or None for a in after],
        "think_ns": [None if a is None else 20_000_000 for a in after],
    }  # fmt: skip
    if form == "messages":
        columns |= {"prompt_token_ids": [None] * n, "messages": [json.dumps(chat(f"new {i}")) for i in range(n)]}
    elif form == "text":
        columns |= {"prompt_token_ids": [None] * n, "prompt_text": [f"new {i}" for i in range(n)]}
    else:
        columns |= {"prompt_token_ids": [[i, i] for i in range(n)]}
    return columns | more


def conversation(server: Echo, form: str, session: int, sessions: int) -> list[Any]:
    """The prompts of a session in the order of its turns."""
    prompts = [b.get("messages") or b["prompt"] for b in server.bodies]
    mine = {
        "messages": lambda p: p[-1]["content"], "text": lambda p: p[p.rindex("new ") :],
        "ids": lambda p: f"new {p[-1]}",
    }[form]  # fmt: skip
    return sorted((p for p in prompts if int(mine(p).split()[-1]) % sessions == session), key=len)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("closed", [False, True])
def test_every_turn_carries_what_the_server_answered(echo, start, tmp_path, form, closed):
    server = echo()
    plan = write_plan(tmp_path / "plan.arrow", n=12, timed=not closed, gap_s=0.001, **chain(4, 3, form))
    loop = {"mode": "closed", "concurrency": 2} if closed else {}
    endpoint = "chat" if form == "messages" else "completions"
    _, end, rows = start(server.url, plan, endpoint=endpoint, **loop).start().end()
    assert (end["exit"], classes(rows)) == (None, {None: 12})
    for session in range(3):
        turns = conversation(server, form, session, 3)
        for i, (before, prompt) in enumerate(pairwise(turns)):
            number = session + 3 * (i + 1)
            new = {"messages": chat(f"new {number}"), "text": f"new {number}", "ids": [number, number]}[form]
            answer = server.said[json.dumps(before)]
            said = chat(answer, first="assistant") if form == "messages" else answer
            assert prompt == before + said + new
    asked = [b.get("return_token_ids") for b in server.bodies]
    assert asked.count(True) == (9 if form == "ids" else 0), "nobody goes on from the last turn of each session"


def test_after_a_failure_the_rest_of_the_session_is_not_sent_and_counted(echo, start, tmp_path):
    """The second turn of session 0 fails: its third and fourth have rows, the other session is not touched."""
    server = echo(fail=lambda body: body["messages"][-1]["content"] == "new 2")
    plan = write_plan(tmp_path / "plan.arrow", n=8, gap_s=0.001, **chain(4, 2))
    _, end, rows = start(server.url, plan, endpoint="chat").start().end()
    assert (end["exit"], end["rows"]) == (None, 8)
    assert [row["error"] for row in rows] == [None, None, "server", None, "no_history", None, "no_history", None]
    assert len(server.bodies) == 6
    for row, before in ((rows[4], rows[2]), (rows[6], None)):
        assert (row["sent_ns"], row["finished_ns"], row["replica"]) == (None, None, None)
        assert "request 2" in row["detail"]
        assert before is None or row["scheduled_ns"] >= before["finished_ns"] + 20_000_000


def test_a_dropped_turn_holds_no_slot_of_a_closed_loop(echo, start, tmp_path):
    """One slot: were it lost with the turn that is not sent, the plan would never end."""
    server = echo(fail=lambda body: body["messages"][-1]["content"] == "new 0")
    plan = write_plan(tmp_path / "plan.arrow", n=9, timed=False, **chain(3, 3))
    _, end, rows = start(server.url, plan, endpoint="chat", mode="closed", concurrency=1).start().end()
    assert end["exit"] is None
    assert classes(rows) == {None: 6, "server": 1, "no_history": 2}


def test_a_server_without_token_ids_is_said(echo, start, tmp_path):
    plan = write_plan(tmp_path / "plan.arrow", n=2, gap_s=0.001, **chain(2, 1, "ids"))
    _, _, rows = start(echo(ids=False).url, plan).start().end()
    assert [row["error"] for row in rows] == [None, "no_history"]
    assert "return_token_ids" in rows[1]["detail"]


def test_who_hung_up_goes_on_from_what_was_read(echo, start, tmp_path):
    server = echo(slow_s=0.02)
    hang_up = [200_000_000, None]
    plan = write_plan(tmp_path / "plan.arrow", n=2, gap_s=0.001, **chain(2), cancel_after_ns=hang_up)
    _, _, rows = start(server.url, plan, endpoint="chat").start().end()
    assert [row["error"] for row in rows] == ["cancelled", None]
    read, said = server.bodies[1]["messages"][1]["content"], server.said[json.dumps(chat("new 0"))]
    assert said.startswith(read)
    assert 0 < len(read) < len(said)


def test_answers_are_kept_only_while_a_turn_needs_them(tmp_path, echo):
    """After every session has ended nothing is held, and never more than one answer for each that is open."""
    from harness.scenarios.dispatch import Dispatcher

    server, sessions = echo(tokens=5), 4
    plan = write_plan(tmp_path / "plan.arrow", n=40, timed=False, **chain(10, sessions, think_ns=[None] * 40))
    run = Run(server.url, endpoint="chat")
    try:
        load = Dispatcher(
            Schedule.of(PlanReader(plan, RunSpec(mode="closed", endpoint="chat", model="m", base_urls=[]))), run.client
        )
        most = 0
        while load.schedule.left:
            if load.schedule.next_due() is None:
                gevent.sleep(0.001)
                continue
            load.send_next(load.ended)
            most = max(most, held(load.conversations))
        run.sent = 40
        rows = run.wait()
        assert [row.error for row in rows] == [None] * 40
        assert 0 < most <= sessions
        assert held(load.conversations) == 0
    finally:
        run.client.close()


def test_a_plain_locustfile_counts_a_turn_that_was_not_sent(echo, tmp_path):
    server = echo(fail=lambda body: body["messages"][-1]["content"] == "new 0")
    plan, rows = write_plan(tmp_path / "plan.arrow", n=3, gap_s=0.001, **chain(3)), tmp_path / "rows.arrows"
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", "scenarios/replay.py", "--headless", "-u", "1", "--host", server.url,
         "--plan", str(plan), "--endpoint", "chat", "--results", str(rows), "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert classes(read_results(rows).to_pylist()) == {"server": 1, "no_history": 2}
    assert "Traceback" not in done.stderr
    posts = next(s for s in json.loads(done.stdout) if s["method"] == "POST")
    assert (posts["num_requests"], posts["num_failures"]) == (3, 3)


# -- the command line -------------------------------------------------------------------------------------------------


def test_replay_with_a_live_conversation(fake_server: StartServer, tmp_path: Path) -> None:
    """The server's own count of each prompt: words of all questions, and of all answers that it really gave."""
    server = fake_server("--ttft", "0.02", "--itl", "0.002")
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in sessions_of(3, 4, think_s=0.02)))
    done = harness(
        "replay", trace, "--base-url", server.url, "--conversation", "live", "--out", tmp_path / "runs",
        "--format", "json", "--workers", "2",
    )  # fmt: skip
    assert done.stdout.strip(), done.stderr
    run = RunDir(max((tmp_path / "runs").iterdir()))
    manifest = read_manifest(run.path)
    assert (manifest.plan.conversation, manifest.plan.sessions) == ("live", "wait")
    rows = sorted((r for f in run.all_results() for r in read_results(f).to_pylist()), key=lambda r: r["request_id"])
    assert [row["error"] for row in rows] == [None] * 12
    # a question has 3 words; the recorded answers had 3, the real ones 4
    assert [row["input_tokens"] for row in rows] == [3] * 4 + [10] * 4 + [17] * 4
    assert sorted(t["prompt_tokens"] for t in server.truth()) == [3] * 4 + [10] * 4 + [17] * 4
    report = json.loads(done.stdout)
    assert not [
        c for c in report["checks"] if c["name"] in ("rows", "token_books", "input_tokens") and c["ok"] is False
    ]
