import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.record.results import ERRORS, Result
from harness.scenarios.client.completion import clean
from harness.scenarios.client.fast_path import Template
from harness.scenarios.client.http1 import EVENT_LIMIT, Response

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
JSON_LABEL = CHUNKED.replace(b"text/event-stream; charset=utf-8", b"application/json")
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(obj):
    return b"data: " + json.dumps(obj).encode() + b"\n\n"


def text(value, finish=None, **more):
    return event({"choices": [{"index": 0, "text": value, "finish_reason": finish}], **more})


def delta(finish=None, **fields):
    return event({"object": "chat.completion.chunk", "choices": [{"delta": fields, "finish_reason": finish}]})


def usage(output, prompt=7, cached=None):
    details = None if cached is None else {"cached_tokens": cached}
    counts = {"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details}
    return event({"choices": [], "usage": counts})


def stream(*events):
    return CHUNKED + b"".join(chunk(e) for e in events) + END


def tool(arguments):
    return delta(tool_calls=[{"index": 0, "function": {"arguments": arguments}}])


ROLE = delta(role="assistant", content="")


def answer(status, body, kind="application/json", more=b""):
    head = b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n"
    return head % (status, kind.encode(), len(body), more) + body


# name -> (bytes, closed by the server at the end, expected: chunks, tokens per chunk, output tokens, error class)
CASES = {
    "plain": (stream(text("a"), text("b", "length"), usage(2), DONE), False, 2, [1, 1], 2, None),
    "no usage": (stream(text("a"), text("b", "stop"), DONE), False, 2, None, None, None),
    "no done": (stream(text("a"), text("b", "stop"), usage(2)), False, 2, [1, 1], 2, None),
    "no done and no finish": (stream(text("a"), usage(1)), False, 1, [1], 1, "incomplete"),
    "done only": (stream(text("a"), text("b"), usage(2), DONE), False, 2, [1, 1], 2, None),
    "two tokens in a chunk": (stream(text("ab"), text("c", "length"), usage(3), DONE), False, 2, None, 3, None),
    "several events in one chunk": (
        CHUNKED + chunk(text("a") + text("b") + text("c", "length") + usage(3) + DONE) + END,
        False, 3, [1] * 3, 3, None,
    ),
    "an event over many chunks": (
        CHUNKED + b"".join(chunk(bytes([b])) for b in text("a", "stop") + usage(1) + DONE) + END,
        False, 1, [1], 1, None,
    ),
    "possible counts": (stream(text("a"), text(""), text("b", "length"), usage(3), DONE), False, 3, [1] * 3, 3, None),
    "possible does not": (stream(text("a"), text("b"), text("", "stop"), usage(2), DONE), False, 2, [1, 1], 2, None),
    "possible unclear": (stream(text("a"), text(""), text("b"), usage(5), DONE), False, 2, None, 5, None),
    "chat with role": (
        stream(ROLE, delta(content="x"), delta(content="y"), delta("stop"), usage(2), DONE), False, 2, [1, 1], 2, None,
    ),
    "reasoning": (
        stream(ROLE, delta(reasoning_content="x"), delta(reasoning="y"), delta("stop", content="z"), usage(3), DONE),
        False, 3, [1] * 3, 3, None,
    ),
    "tool calls": (
        stream(ROLE, tool(""), tool("{"), delta("tool_calls", tool_calls=[]), usage(2), DONE),
        False, 2, [1, 1], 2, None,
    ),
    "function call": (
        stream(ROLE, delta(function_call={"arguments": "{}"}), delta("stop"), usage(1), DONE), False, 1, [1], 1, None,
    ),
    "token ids": (
        stream(
            event({"choices": [{"text": "ab", "token_ids": [1, 2]}]}),
            event({"choices": [{"text": "", "token_ids": [3]}]}),
            event({"choices": [{"text": "d", "token_ids": [4], "finish_reason": "length"}]}), usage(4), DONE,
        ), False, 3, [2, 1, 1], 4, None,
    ),
    "continuous usage": (
        stream(
            text("ab", usage={"prompt_tokens": 7, "completion_tokens": 2}),
            text("c", "length", usage={"prompt_tokens": 7, "completion_tokens": 3}), usage(3), DONE,
        ), False, 2, [2, 1], 3, None,
    ),
    "usage of zero until the end": (
        stream(
            text("a", usage={"prompt_tokens": 7, "completion_tokens": 0}),
            text("b", "length", usage={"prompt_tokens": 7, "completion_tokens": 3}), DONE,
        ), False, 2, None, 3, None,
    ),
    "comments, event names and no space": (
        stream(b": ping\n\n", b"event: message\nid: 1\n" + text("a").replace(b"data: ", b"data:"), b"\n",
               text("b", "stop"), b": bye\n\n", usage(2), b"data:[DONE]\n\n"),
        False, 2, [1, 1], 2, None,
    ),
    "crlf": (
        stream(*(e.replace(b"\n", b"\r\n") for e in (text("a"), text("b", "stop"), usage(2), DONE))), False,
        2, [1, 1], 2, None,
    ),
    "data over two lines": (
        stream(b'data: {"choices":\ndata: [{"text": "a", "finish_reason": "stop"}]}\n\n', usage(1), DONE), False,
        1, [1], 1, None,
    ),
    "last event without its blank line": (stream(text("a", "stop"), usage(1), b"data: [DONE]"), False, 1, [1], 1, None),
    "half an event at the end": (stream(text("a"), b'data: {"choi'), False, 1, None, None, "incomplete"),
    "interim and trailers": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + CHUNKED + chunk(text("a", "stop"))
        + b"e;ext=1\r\n" + DONE + b"\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n", False, 1, None, None, None,
    ),
    "content-length stream": (
        OK + b"Content-Length: %d\r\n\r\n" % len(text("a", "stop") + DONE) + text("a", "stop") + DONE, False,
        1, None, None, None,
    ),
    "until close": (OK + b"\r\n" + text("a", "stop") + usage(1) + DONE, True, 1, [1], 1, None),
    "until close, no end": (OK + b"\r\n" + text("a"), True, 1, None, None, "incomplete"),
    "until close, torn": (OK + b"\r\n" + text("a") + b'data: {"cho', True, 1, None, None, "cut"),
    "cut between events": (CHUNKED + chunk(text("a")) + chunk(text("b")), True, 2, None, None, "cut"),
    "cut after done": (CHUNKED + chunk(text("a", "stop")) + chunk(DONE), True, 1, None, None, "cut"),
    "nothing at all": (b"", True, 0, None, None, "cut"),
    "half a header": (b"HTTP/1.1 200 OK\r\nConte", True, 0, None, None, "cut"),
    "error event": (
        stream(text("a"), event({"error": {"message": "engine died", "code": 500}}), text("b"), DONE), False,
        1, None, None, "server",
    ),
    "error event, old style": (
        stream(text("a"), event({"object": "error", "message": "engine died"}), DONE), False, 1, None, None, "server",
    ),
    "named error event": (stream(b"event: error\ndata: engine died\n\n", DONE), False, 0, None, None, "server"),
    "aborted": (stream(text("a"), text("", "abort"), usage(1), DONE), False, 1, [1], 1, "server"),
    "not json": (stream(text("a"), b"data: {oops}\n\n", text("b"), DONE), False, 1, None, None, "protocol"),
    "wrong types": (stream(event({"choices": 5}), DONE), False, 0, None, None, "protocol"),
    "negative count": (stream(text("a", "stop"), usage(-1), DONE), False, 1, None, None, None),
    "count beyond the column": (stream(text("a", "stop"), usage(2**40), DONE), False, 1, None, None, None),
    "a cached count that is none": (stream(text("a", "stop"), usage(1, cached=-1), DONE), False, 1, [1], 1, None),
    "details that are none": (
        stream(text("a", "stop", usage={"completion_tokens": 1, "prompt_tokens_details": []}), DONE), False,
        1, [1], 1, None,
    ),
    "usage that is none": (stream(text("a", "stop", usage="none"), DONE), False, 1, None, None, None),
    "a finish reason that is a number": (stream(text("a"), text("b", 1), usage(2), DONE), False, 2, [1, 1], 2, None),
    "an odd finish reason, no done": (stream(text("a", {"type": "stop"}), usage(1)), False, 1, [1], 1, None),
    "an empty finish reason": (stream(text("a", ""), text("b", ""), usage(2)), False, 2, [1, 1], 2, "incomplete"),
    "an odd choice": (stream(event({"choices": [{"delta": "x"}]}), DONE), False, 0, None, None, "protocol"),
    "usage of zero after the real one": (
        stream(text("a"), text("b", "length"), usage(2, cached=4), usage(0, prompt=0), DONE), False, 2, [1, 1], 2, None,
    ),
    "usage after done": (stream(text("a", "stop"), DONE, usage(1), b"data: bye\n\n"), False, 1, [1], 1, None),
    "output after done": (stream(text("a", "stop"), usage(1), DONE, text("b"), event({"error": "late"})), False,
                          1, [1], 1, None),
    "events without data": (
        stream(b"data:\n\n", b"data\n\n", text("a"), b"data: \ndata:\n\n", text("b", "stop"), usage(2), DONE), False,
        2, [1, 1], 2, None,
    ),
    "other fields and events for others": (
        stream(b"retry: 1000\nid\n\n", b"event: ping\ndata: now\n\n", b"what: this\n\n", b"event: ping\ndata: {}\n\n",
               text("a", "stop"), usage(1), DONE), False, 1, [1], 1, None,
    ),
    "a byte order mark": (stream(b"\xef\xbb\xbf" + text("a", "stop"), usage(1), DONE), False, 1, [1], 1, None),
    "cr": (
        stream(*(e.replace(b"\n", b"\r") for e in (text("a"), text("b", "stop"), usage(2), DONE))), False,
        2, [1, 1], 2, None,
    ),
    "any line end": (
        stream(text("a")[:-1] + b"\r", text("b")[:-1] + b"\r\n", text("c", "stop")[:-2] + b"\r\r\n",
               usage(3), DONE[:-2] + b"\r\n\n"), False, 3, [1, 1, 1], 3, None,
    ),
    "a stream labelled as json": (
        JSON_LABEL + b"".join(chunk(e) for e in (text("a"), text("b", "stop"), usage(2), DONE)) + END, False,
        2, [1, 1], 2, None,
    ),
    "a stream labelled as json, a comment first": (
        JSON_LABEL + b"".join(chunk(e) for e in (b"\n", b": hi\n\n", text("a", "stop"), usage(1), DONE)) + END, False,
        1, [1], 1, None,
    ),
    "json labelled as a stream": (
        CHUNKED + chunk(b'{"choices":[{"text":"ab","finish_reason":2}],')
        + chunk(b'"usage":{"completion_tokens":2}}') + END, False, 1, [2], 2, None,
    ),
    "a json error labelled as a stream": (CHUNKED + chunk(b' {"error": {"message": "no"}}') + END, False,
                                          0, None, None, "server"),
    "no event at all": (CHUNKED + chunk(b"hello") + END, False, 0, None, None, "protocol"),
    "empty body": (OK + b"Content-Length: 0\r\n\r\n", False, 0, None, None, "protocol"),
    "json completion": (
        answer(200, json.dumps({"choices": [{"message": {"content": "ab"}, "finish_reason": "stop"}],
                                "usage": {"prompt_tokens": 7, "completion_tokens": 2}}).encode()),
        False, 1, [2], 2, None,
    ),
    "json, but what": (answer(200, b'{"status": "ok"}'), False, 0, None, None, "protocol"),
    "json error with 200": (answer(200, b'{"error": {"message": "no"}}'), False, 0, None, None, "server"),
    "html": (answer(200, b"<html>Log in</html>", "text/html"), False, 0, None, None, "protocol"),
    "compressed": (
        answer(200, b"xx", "text/event-stream", b"Content-Encoding: gzip\r\n"), False, 0, None, None, "protocol",
    ),
    "redirect": (answer(307, b"", more=b"Location: https://elsewhere/\r\n"), False, 0, None, None, "redirect"),
    "401": (answer(401, b'{"error": "who are you"}'), False, 0, None, None, "auth"),
    "403": (answer(403, b"no", "text/plain"), False, 0, None, None, "auth"),
    "404": (answer(404, b'{"detail": "Not Found"}'), False, 0, None, None, "not_found"),
    "422": (answer(422, b'{"detail": [{"loc": ["body"]}]}'), False, 0, None, None, "rejected"),
    "429": (answer(429, b"", more=b"Retry-After: 1\r\n"), False, 0, None, None, "overloaded"),
    "503": (answer(503, b"busy", "text/plain"), False, 0, None, None, "overloaded"),
    "500": (answer(500, b'{"object":"error","message":"boom"}'), False, 0, None, None, "server"),
    "500 cut": (b"HTTP/1.1 500 X\r\nContent-Length: 100\r\n\r\n{", True, 0, None, None, "server"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", False, 0, None, None, "protocol"),
    "not http": (b"SSH-2.0-OpenSSH_9\r\n", False, 0, None, None, "protocol"),
    "bad status line": (b"HTTP/1.1 abc\r\n\r\n", False, 0, None, None, "protocol"),
    "bad chunk size": (CHUNKED + chunk(text("a")) + b"zz\r\n", False, 1, None, None, "protocol"),
    "negative chunk size": (CHUNKED + chunk(text("a")) + b"-1\r\n", False, 1, None, None, "protocol"),
    "long chunk": (CHUNKED + b"2\r\nabcd\r\n", False, 0, None, None, "protocol"),
    "two lengths": (OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", False, 0, None, None, "protocol"),
    "odd coding": (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", False, 0, None, None, "protocol"),
}  # fmt: skip


def contents(data) -> tuple[bytes, bool] | None:
    """The body of an answer in chunks, and whether it has its last; null where the framing is bad."""
    rest, body = data.removeprefix(CHUNKED), b""
    while frame := re.match(rb"([0-9a-f]+)\r\n", rest):
        size = int(frame[1], 16)
        content, rest = rest[frame.end() : frame.end() + size], rest[frame.end() + size :]
        if len(content) < size or not rest.startswith(b"\r\n"):
            return None
        body, rest = body + content, rest[2:]
        if not size:
            return (body, True) if not rest else None
    return (body, False) if body and not rest else None


def run(reads, closed, stamps=None) -> tuple[Response, Result]:
    response = Response()
    for i, read in enumerate(reads):
        response.feed(read, stamps[i] if stamps else i)
    if closed:
        response.eof()
    return response, listed(response)


def listed(response) -> Result:
    """The facts, comparable."""
    facts = response.fill(Result(0, 0))
    tokens = None if facts.chunk_tokens is None else list(facts.chunk_tokens)
    return replace(facts, chunk_ns=list(facts.chunk_ns), chunk_tokens=tokens)


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_answer_gives_its_facts(name):
    data, closed, chunks, tokens, output, error = CASES[name]
    response, facts = run([data] if data else [], closed)
    found = (len(facts.chunk_ns), facts.chunk_tokens, facts.output_tokens, facts.error)
    assert found == (chunks, tokens, output, error)
    assert response.done
    assert error is None or (error in ERRORS and facts.detail)


@pytest.mark.parametrize("name", CASES)
def test_cutting_the_bytes_anywhere_changes_nothing_but_the_stamps(name):
    data, closed, *_ = CASES[name]
    response, whole = run([data] if data else [], closed)
    bytewise, slow = run([data[i : i + 1] for i in range(len(data))], closed)
    assert replace(slow, chunk_ns=whole.chunk_ns) == whole
    assert bytewise.keep_alive == response.keep_alive
    for cut in range(1, len(data)):
        # Stamp of a chunk: the read that held the last byte of its event. Byte by byte that is the byte's own index.
        two, facts = run([data[:cut], data[cut:]], closed, stamps=[0, 1])
        assert replace(facts, chunk_ns=[]) == replace(whole, chunk_ns=[])
        assert facts.chunk_ns == [int(at >= cut) for at in slow.chunk_ns]
        assert two.keep_alive == response.keep_alive


STREAMS = sorted(name for name, (data, *_) in CASES.items() if data.startswith(CHUNKED) and contents(data))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(STREAMS), st.data())
def test_contents_of_chunks_mean_what_the_chunks_do(name, data):
    """However the body is cut into chunks, wherever the hot path begins to take their frames away."""
    body, over = contents(CASES[name][0])
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(body) - 1, 1)), max_size=12)))
    parts = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True) if body[a:b]]
    parts += [b""] * over
    by_the_book = [CHUNKED, *map(chunk, parts)]
    expected, facts = run(by_the_book, closed=True)
    first = data.draw(st.integers(1, len(parts)))
    response = Response()
    for i, read in enumerate(by_the_book[:first]):
        response.feed(read, i)
    while first <= len(parts):
        n = data.draw(st.integers(1, len(parts) + 1 - first))
        response.feed_chunks(parts[first - 1 : first - 1 + n], list(range(first, first + n)))
        first += n
    response.eof()
    assert listed(response) == facts
    assert (response.done, response.keep_alive) == (expected.done, expected.keep_alive)
    assert Template.learn(response.sample) == Template.learn(expected.sample)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", OK + b"\r\n", CHUNKED, CHUNKED + chunk(text("a"))]))
def test_any_bytes_are_survived_and_classified(junk, head):
    for reads in ([head + junk], [head, junk]):
        response, facts = run([r for r in reads if r], closed=True)
        assert response.done
        assert facts.error is None or facts.error in ERRORS


def test_keep_alive_follows_the_headers():
    body = chunk(text("a", "stop")) + chunk(DONE) + END

    def alive(head, tail=b""):
        response = Response()
        response.feed(head + b"Transfer-Encoding: chunked\r\n\r\n" + body + tail, 0)
        assert response.done
        assert response.fill(Result(0, 0)).error is None
        return response.keep_alive

    assert alive(OK)
    assert not alive(OK + b"Connection: close\r\n")
    assert not alive(OK.replace(b"1.1", b"1.0"))
    assert alive(OK.replace(b"1.1", b"1.0") + b"Connection: keep-alive\r\n")
    assert not alive(OK, tail=b"HTTP/1.1 200 OK\r\n"), "bytes after the end: the connection is out of step"


def test_details_are_short_clean_and_without_the_key():
    body = json.dumps({"error": {"message": "bad key sk-1234\x1b[31m\n" + "x" * 5000}}).encode()
    response = Response(secret="sk-1234")
    response.feed(answer(401, body), 0)
    detail = response.fill(Result(0, 0)).detail
    assert detail is not None
    assert len(detail) <= 300
    assert detail.isprintable()
    assert "sk-1234" not in detail
    assert detail.startswith("HTTP 401: bad key [api key]")
    assert clean("a\tb\r\nc") == "a b c"


def test_memory_is_bounded_against_endless_events_and_headers():
    response = Response()
    response.feed(CHUNKED + b"fffffff0\r\ndata: ", 0)
    block = b"x" * 2**20
    for _ in range(EVENT_LIMIT // len(block) + 1):
        response.feed(block, 0)
    assert response.done
    assert response.fill(Result(0, 0)).error == "protocol"

    response = Response()
    response.feed(b"HTTP/1.1 200 OK\r\n", 0)
    for _ in range(70):
        response.feed(b"X: y\r\n" * 200, 0)
    assert response.done
    assert response.fill(Result(0, 0)).error == "protocol"


def test_counts_of_the_prompt_are_taken_from_usage():
    response, facts = run([stream(text("a", "stop"), usage(1, prompt=9, cached=4), DONE)], False)
    assert (facts.input_tokens, facts.cached_tokens, facts.output_tokens, facts.finish_reason) == (9, 4, 1, "stop")
    assert facts.http_status == response.head.status == 200


@pytest.mark.parametrize(
    ("events", "found", "left_out"),
    [
        ([usage(2, prompt=9, cached=4), usage(0, prompt=0), usage(1, prompt=3)], (9, 4, 2), None),
        ([usage(2), usage(2, cached=5)], (7, 5, 2), None),
        ([usage(2, cached=-1)], (7, None, 2), "usage.prompt_tokens_details.cached_tokens"),
        ([usage("two", cached=3)], (7, 3, None), "usage.completion_tokens"),
        ([usage(True)], (7, None, None), "usage.completion_tokens"),
        ([text("", usage=[1])], (None, None, None), "usage"),
        ([text("", 3.5), usage(2)], (7, None, 2), "finish_reason"),
    ],
)
def test_counts_are_the_largest_said_and_what_cannot_be_read_is_named(events, found, left_out):
    _, facts = run([stream(text("a"), text("b"), *events, DONE)], False)
    assert (facts.input_tokens, facts.cached_tokens, facts.output_tokens) == found
    assert facts.error is None
    assert facts.detail == (left_out and f"left out, as of no type that can be read: {left_out}")
