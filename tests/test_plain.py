"""The short way through an answer says what the long one says, or does not say anything."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_response import CHUNKED, DONE, END, chunk, listed, text, usage

from harness.results import Result
from scenarios import hot_path, plain, reading
from scenarios.connection import Connection
from scenarios.plain import Template, _Usual
from scenarios.response import Response
from scenarios.stream import Stream

PATHS: list[Any] = [reading, *([hot_path] if hot_path.COMPILED else [])]
TOKENS = ["a", " the", "ß", "日本", "🙂", '"', "\\", "\n", "\n\n", "\r\n", "\x00", "\x7f", "}]}", '"}]}', "data: x",
          "[DONE]", '","finish_reason":"stop', "e\r\ndata: ", " ", "\u2028", "0", "f9\r\n"]  # fmt: skip
ODD = ["", '"a"', "null", "5", "true", "[1]", '"\\ud83d"', '"\\ud83d\\ude42"', '"\\ude42"', '"\\x"', '"\\u12"', '"a\\"',
       '"a\nb"', '"a\tb"', '"a","text":"b"', '"a","text":""', '"a","finish_reason":"stop"', '""',
       '"a"}],"usage":null,"x":[{"y":"b"',
       '"a"}],"error":{"message":"no"},"x":[{"y":"b"', '"a"},{"text":"b"', '"a","token_ids":[1,2]', '"?"']  # fmt: skip
RAW = [b'"\xff"', b'"\xe6\x97"', b'"\xa5"', b'"\xed\xa0\x80"', b'"a\x00b"', b"\xff"]
SHAPES = [
    '{"id":"x","choices":[{"index":0,"text":%s,"logprobs":null,"finish_reason":null}]}',
    '{"id": "x", "choices": [{"index": 0, "text": %s, "finish_reason": null}], "usage": null}',
    '{"id":"x","object":"chat.completion.chunk","choices":[{"delta":{"role":"assistant","content":%s},"finish_reason":null}]}',
    '{"choices":[{"delta":{"reasoning_content":%s}}]}',
    '{"choices":[{"delta":{"reasoning":%s,"content":null}}]}',
    # These look plain and are not, or not always.
    '{"choices":[{"text":%s,"finish_reason":"length"}]}',
    '{"choices":[{"text":%s,"token_ids":[1]}]}',
    '{"choices":[{"text":%s}],"usage":{"prompt_tokens":3,"completion_tokens":1}}',
    '{"error":{"text":%s}}',
    '{"object":"error","message":"no","choices":[{"text":%s}]}',
    '{"choices":[],"text":%s}',
    '{"x":{"text":%s},"choices":[]}',
    '{"choices":[{"text":%s},{"text":""}]}',
    '{"x":{"content":%s},"choices":[{"text":"?"}]}',
    '{"x":{"content":%s},"choices":[{"text":""}]}',
    '{"choices":[{"text":"a","\\u0074ext":%s}]}',
    '{"choices":[{"text":%s,"text":""}]}',
    '{"choices":[{"text":%s,"\\u0074ext":""}]}',
    '{"choices":[{"text":"","text":%s}]}',
    '{"choices":[{"delta":{"content":%s,"tool_calls":[{"x":1}]}}]}',
    '{"choices":[{"delta":{"content":%s},"delta":{}}]}',
    '{"choices":[{"text":%s,"finish_reason":{"text":"a"}}]}',
    '{"choices":[{"finish_reason":%s}]}',
    '{"choices":%s}',
    '{"choices":[{"text":%s}],"usage":{"prompt_tokens":-1}}',
    '{"choices":[{"text":%s}]',
]
ENDS = [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\n"]


def said(shape: str, value: bytes, end: bytes = b"\n\n") -> bytes:
    before, _, after = shape.encode().partition(b"%s")
    return b"data: " + before + value + after + end


def outcome(reads: list[bytes], parts: list[int], *, by_the_book: bool) -> tuple[Any, ...]:
    response = Response()
    response.feed([CHUNKED], [0])
    if by_the_book:
        response._lessons = 0
    at = 0
    for n in [*parts, len(reads)]:
        if reads[at : at + n]:
            response.feed(reads[at : at + n], list(range(at + 1, at + 1 + len(reads[at : at + n]))))
        at += n
    so_far = response.done, response.keep_alive
    response.eof()
    return *so_far, listed(response)


VALUES = st.one_of(
    st.sampled_from(TOKENS).map(lambda t: json.dumps(t).encode()),
    st.sampled_from(TOKENS).map(lambda t: json.dumps(t, ensure_ascii=False).encode()),
    st.sampled_from(ODD).map(str.encode),
    st.sampled_from(RAW),
    st.text(max_size=8).map(lambda t: b'"%b"' % t.encode("utf-8", "surrogatepass")),
)
FRAMES = st.sampled_from(
    [b"%x\r\n%b\r\n"] * 8 + [b"%X\r\n%b\r\n", b"0%x\r\n%b\r\n", b"%x;a=b\r\n%b\r\n", b"%x\n%b\r\n"]
)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_the_short_way_says_what_the_long_way_says(data: st.DataObject) -> None:
    """Whole chunks of one shape with any text between, odd ones among them, any chunk damaged, fed in any batches."""
    shape = data.draw(st.sampled_from(SHAPES))
    reads = []
    for _ in range(data.draw(st.integers(4, 30))):
        kind = data.draw(st.integers(0, 15))
        end = (
            data.draw(st.sampled_from(ENDS)) if kind == 15 else ENDS[data.draw(st.integers(0, 1)) if kind == 14 else 0]
        )
        payload = said(data.draw(st.sampled_from(SHAPES)) if kind == 13 else shape, data.draw(VALUES), end)
        read = data.draw(FRAMES) % (len(payload), payload)
        if kind == 12:  # a byte is lost or changed
            at = data.draw(st.integers(0, len(read) - 1))
            read = read[:at] + data.draw(st.sampled_from([b"", b"x", b'"', b"\n"])) + read[at + 1 :]
        reads.append(read)
    reads += data.draw(
        st.sampled_from([[], [chunk(usage(3)), chunk(DONE), END], [chunk(DONE) + END], [chunk(DONE), text("a")]])
    )
    if data.draw(st.integers(0, 4)) == 0:  # the kernel joined or cut what was sent
        at = data.draw(st.integers(0, len(reads) - 1))
        whole = b"".join(reads[at : at + 2])
        cut = data.draw(st.integers(0, len(whole)))
        reads[at : at + 2] = [part for part in (whole[:cut], whole[cut:]) if part]
    parts = data.draw(st.lists(st.integers(1, 12), max_size=6))
    assert outcome(reads, parts, by_the_book=False) == outcome(reads, parts, by_the_book=True)


@settings(max_examples=400, deadline=None)
@given(shape=st.sampled_from(SHAPES), first=VALUES, values=st.lists(VALUES, min_size=1, max_size=6), data=st.data())
def test_whatever_a_template_takes_is_one_output_by_the_book(shape, first, values, data) -> None:
    template = Template.learn(chunk(said(shape, first)))
    reads = [data.draw(FRAMES) % (len(payload), payload) for payload in (said(shape, value) for value in values)]
    taken = template.count(reads) if template is not None else 0
    alone = 0
    for i, read in enumerate(reads):
        seen = outcome([read], [], by_the_book=True)[2]
        is_output = (len(seen.chunk_ns), seen.chunk_tokens, seen.finish_reason, seen.error) == (1, None, None, "cut")
        assert is_output or i >= taken, read
        alone = i + 1 if alone == i and template is not None and template.count([read]) else alone
    assert taken == alone, "in bulk as one by one"


IDS = st.one_of(
    st.sampled_from(["chatcmpl-0f3a", "chatcmpl-9b2c", "_-", 'x","error":"y', 'x","usage":{}, "z":"', "\\\\", ""]),
    st.text('ab9-_"\\\\,:{ ', max_size=13),
)


@settings(max_examples=400, deadline=None)
@given(shape=st.sampled_from(SHAPES), ids=st.lists(IDS, min_size=2, max_size=2), values=st.lists(VALUES, min_size=2))
def test_the_next_answer_is_learned_from_the_last_one_with_another_id(shape, ids, values) -> None:
    """By heart or by the book: what it takes is output, and nothing else."""
    first, second = (
        chunk(said(shape.replace("{", '{"id":"' + one + '",', 1), value))
        for one, value in zip(ids, values, strict=False)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Usual, "template", None)
        by_the_book = Template.learn(second)
        patch.setattr(_Usual, "template", None)
        Template.learn(first)
        found = Template.learn(second)
    assert found is not None or by_the_book is None
    if found is not None:
        seen = outcome([chunk(found.before + b"?" + found.after[:-2])], [], by_the_book=True)[2]
        assert (len(seen.chunk_ns), seen.finish_reason, seen.error) == (1, None, "cut")


def test_an_id_costs_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another id, and nothing else: what was proved of the last answer need not be proved again."""
    shape = '{"id":"cmpl-%s","created":%d,"choices":[{"text":%%s}]}'
    monkeypatch.setattr(_Usual, "template", None)
    proofs: list[bytes] = []
    prove = plain._is_output
    monkeypatch.setattr(plain, "_is_output", lambda event: proofs.append(event) or prove(event))
    for one, created in (("0f3a", 1), ("9b2c", 1), ("9b2c", 1), ("77-a", 1), ("77-a", 2), ("1", 2)):
        template = Template.learn(chunk(said(shape % (one, created), b'"a"')))
        assert template is not None
        assert b"cmpl-" + one.encode() in template.before
    assert len(proofs) == 3, "the first, another time, and an id of another length"


def test_what_servers_really_send_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that never fits would make every other test here true."""
    monkeypatch.setattr(_Usual, "head", b"%x")
    for shape in SHAPES[:5]:
        for end in ENDS[:2]:
            texts = ["a", " longer than that", "日本", "\\n", '\\"', "\\ud83d\\ude42"]
            reads = [chunk(said(shape, b'"%b"' % t.encode(), end)) for t in texts]
            template = Template.learn(reads[0])
            assert template is not None
            assert template.count(reads) == len(reads)
            assert template.count([*reads, chunk(said(shape, b'""', end)), *reads]) == len(reads)
            assert template.count([read.upper() for read in reads]) == 0


@pytest.mark.parametrize("path", PATHS)
def test_capital_sizes_are_plain_too(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers in Rust (hyper) write 8A, not 8a; an event of 0x81 bytes alone does not show that."""
    monkeypatch.setattr(_Usual, "head", b"%x")
    payloads = [said(SHAPES[2], b'"%b"' % (b"t" * (1 + i % 20))) for i in range(400)]
    reads = [b"%X\r\n%b\r\n" % (len(payload), payload) for payload in payloads]
    assert (reads[0][:2], reads[9][:2]) == (b"81", b"8A")
    kept: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        other = Connection.other

        def spy(connection: Connection, data: bytes, stamp: int) -> None:
            kept.append(stamp)
            other(connection, data, stamp)

        patch.setattr(Connection, "other", spy)
        for start in (10, 0):  # an answer that shows it, and one that does not
            stream, _, _ = through_a_socket([*reads[start:], chunk(DONE), END], set(range(6, 400, 6)), path)
            assert len(listed(stream.response).chunk_ns) == 400 - start
    assert len(kept) == 2, "the ends"


@pytest.mark.parametrize("shape", SHAPES[5:12] + SHAPES[16:18] + SHAPES[20:])
def test_what_only_looks_plain_is_never_taken(shape: str) -> None:
    template = Template.learn(chunk(said(shape, b'"a"')))
    assert template is None or not template.count([chunk(said(shape, b'"a"'))])


def test_an_answer_of_plain_events_is_taken_by_template() -> None:
    body = [chunk(said(SHAPES[2], b'" token"'))] * 100
    response = Response()
    response.feed([CHUNKED], [0])
    for at in range(0, 100, 20):
        response.feed(body[at : at + 20], list(range(at, at + 20)))
        assert response._plain is not None
    response.feed([chunk(text("", "length")), chunk(usage(100)), chunk(DONE), END], [100, 101, 102, 103])
    facts = listed(response)
    assert (response.done, response.keep_alive, facts.error, facts.finish_reason) == (True, True, None, "length")
    assert (facts.chunk_ns, facts.chunk_tokens) == (list(range(100)), [1] * 100)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_cut_or_joined_at_any_byte(shape: str) -> None:
    """A cut anywhere in a stream that otherwise comes an event a read: all facts and stamps are those by the book."""
    texts = [" tok", "\\n", "日本", "en", " ", "x" * 300] * 2
    events = [chunk(said(shape, b'"%b"' % t.encode())) for t in texts]
    reads = [*events, chunk(text("", "stop")), chunk(usage(12)), chunk(DONE), END]
    whole = b"".join(reads)
    expected = outcome([whole], [], by_the_book=True)[2].chunk_tokens
    assert expected == [1] * 12
    for i, read in enumerate(reads):
        for cut in range(len(read) + 1):
            after = reads[i + 1 : i + 2]
            in_two = [*reads[:i], read[:cut], read[cut:], *reads[i + 1 :]]
            joined = [*reads[:i], read[:cut], b"".join([read[cut:], *after]), *reads[i + 2 :]]
            for split in ([part for part in parts if part] for parts in (in_two, joined)):
                assert b"".join(split) == whole
                assert outcome(split, [4, 5], by_the_book=False) == outcome(split, [4, 5], by_the_book=True)


# -- through the hot path ---------------------------------------------------------------------------------------------


class Owner:
    """What a connection needs of a client."""

    retries = 0

    def __init__(self, path: Any) -> None:
        self.reader = path.Reader()
        self.ended: list[Stream] = []
        self.pooled = 0

    def end(self, stream: Stream, stamp: int) -> None:
        stream.result.finished_ns = stamp
        self.ended.append(stream)

    def pool(self, connection: Connection) -> None:
        self.pooled += 1

    def drop(self, connection: Connection, trouble: str = "") -> None:
        pass

    def when_idle(self, stream: Stream) -> None:
        pass


def through_a_socket(reads: list[bytes], parse_after: set[int], path: Any) -> tuple[Stream, list[int], Owner]:
    """Send reads one by one to a real connection; parse at some of them. The stream, and when each read was sent."""
    owner: Any = Owner(path)
    target: Any = type("Target", (), {"tls": None, "idle": [], "authority": "x"})()
    here, there = socket.socketpair()
    connection = Connection(owner, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scenarios.stream.Kept", path.Kept)
        stream = Stream(Result(0, 0), b"", target, None, None)
    connection.sock, connection.recvmsg, connection.stream, stream.connection = there, there.recvmsg, stream, connection
    there.setblocking(False)
    connection.ready = True
    owner.reader.add(there.fileno(), connection)
    sent = []
    try:
        for i, read in enumerate([CHUNKED, *reads]):
            sent.append(time.monotonic_ns())
            with contextlib.suppress(OSError):  # it may have had enough
                here.sendall(read)
            owner.reader.read()
            if i in parse_after:
                stream.parse()
        here.close()
        owner.reader.read()
        owner.reader.read()  # an end that came with the last bytes
        stream.parse()
    finally:
        connection.close()
        owner.reader.close()
    return stream, sent, owner


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_the_hot_path_keeps_says_what_the_book_says(data: st.DataObject) -> None:
    """Texts of plain events, and whole reads of all others, parsed now and then."""
    path = data.draw(st.sampled_from(PATHS))
    shape = data.draw(st.sampled_from(SHAPES[:5] * 3 + SHAPES[5:]))
    reads = [chunk(said(shape, b'"first"'))] * 5
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.integers(0, 11))
        payload = said(data.draw(st.sampled_from(SHAPES)) if kind == 11 else shape, data.draw(VALUES))
        read = data.draw(FRAMES) % (len(payload), payload)
        if kind == 10:
            at = data.draw(st.integers(1, len(read) - 1))
            reads += [read[:at], read[at:]]
        elif kind == 9:
            reads.append(read * data.draw(st.integers(2, 4)))
        else:
            reads.append(read)
    tails = [[], [chunk(usage(3)), chunk(DONE), END], [chunk(DONE) + END], [chunk(usage(3)) + chunk(DONE) + END]]
    reads += data.draw(st.sampled_from(tails))
    parse_after = data.draw(st.sets(st.integers(0, len(reads))))
    stream, sent, owner = through_a_socket(reads, parse_after | {6}, path)
    expected = outcome(reads, [1] * len(reads), by_the_book=True)[2]
    found = listed(stream.response)
    assert replace(found, chunk_ns=[]) == replace(expected, chunk_ns=[])
    for stamp, read in zip(found.chunk_ns, expected.chunk_ns, strict=True):
        assert sent[read] <= stamp < (sent[read + 1] if read + 1 < len(sent) else stamp + 1)
    assert len(owner.ended) == 1
    assert stream.kept.texts() == stream.reads == stream.stamps == []


@pytest.mark.parametrize("path", PATHS)
def test_the_hot_path_keeps_texts_alone(path: Any) -> None:
    """Ten thousand streams fit into memory, because of a plain event only the text is kept."""
    body = [chunk(said(SHAPES[2], b'" t%d"' % i)) for i in range(60)]
    learned: list[int] = []
    texts: list[bytes] = []
    keep_texts, feed_kept = Connection.keep_texts, Response.feed_kept

    def learn(connection: Connection, kept: Any, template: Template) -> None:
        assert connection.stream is not None
        learned.append(len(connection.stream.response._completion._stamps))
        keep_texts(connection, kept, template)

    def feed(response: Response, template: Template, kept: Any, since_ns: int) -> None:
        texts.extend(kept.texts())
        feed_kept(response, template, kept, since_ns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "keep_texts", learn)
        patch.setattr(Response, "feed_kept", feed)
        patch.setattr(_Usual, "head", b"%x")
        end = [chunk(text("", "stop")), chunk(usage(60)), chunk(DONE), END]
        stream, _, _ = through_a_socket([*body, *end], {1}, path)
    assert learned == [1], "learned once, from the first event"
    assert texts == [b" t%d" % i for i in range(1, 60)]
    assert len(listed(stream.response).chunk_ns) == 60


REASONING, CONTENT = SHAPES[3], '{"choices":[{"delta":{"content":%s}}]}'
ODD_ONE = '{"choices":[{"delta":{"content":%s},"logprobs":[]}]}'


@pytest.mark.parametrize("every", [1, 3, 4, 5, 13])
@pytest.mark.parametrize(
    ("shapes", "least"),
    [
        pytest.param([REASONING] * 20 + [CONTENT] * 180, 180, id="it thinks, then answers"),
        pytest.param([ODD_ONE] + [CONTENT] * 199, 180, id="the first event is like no other"),
        pytest.param(([CONTENT] * 19 + [None]) * 10, 60, id="a comment now and then"),
    ],
)
def test_an_answer_that_changes_is_recognised_again(shapes: list[str | None], least: int, every: int) -> None:
    """However few reads are parsed at a time: a slow stream has no four of them between two looks at it."""
    reads = [chunk(b": ping\n\n" if s is None else said(s, b'"t%d"' % i)) for i, s in enumerate(shapes)]
    kept = 0
    feed_kept = Response.feed_kept

    def count(response: Response, template: Template, texts: Any, since_ns: int) -> None:
        nonlocal kept
        kept += len(texts)
        feed_kept(response, template, texts, since_ns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Response, "feed_kept", count)
        patch.setattr(_Usual, "head", b"%x")
        stream, _, _ = through_a_socket([*reads, chunk(DONE) + END], set(range(1, 200, every)), hot_path)
    assert len(listed(stream.response).chunk_ns) == 200 - shapes.count(None)
    assert kept >= least
