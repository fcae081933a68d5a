"""The short way through an answer says what the long one says, or does not say anything."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_response import CHUNKED, DONE, END, chunk, delta, listed, text, usage

from harness.record.results import Result
from harness.scenarios.client import reader as reading
from harness.scenarios.client.completion import StreamedAnswer
from harness.scenarios.client.connection import Connection
from harness.scenarios.client.events import is_text
from harness.scenarios.client.fast_path import AnswerShape, Template
from harness.scenarios.client.http1 import Response
from harness.scenarios.client.in_flight import InFlight

PYTHON: Any = SimpleNamespace(
    Reader=reading.PythonReader,
    ReceiveBuffer=reading.PythonReceiveBuffer,
    Pattern=reading.PythonPattern,
    COMPILED=False,
)
needs_compiled = pytest.mark.skipif(not reading.COMPILED, reason="no compiled reader here")
STORING: list[Any] = [pytest.param(reading, marks=needs_compiled, id="compiled")]
READERS: list[Any] = [PYTHON, *([reading] if reading.COMPILED else [])]
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
    '{"choices":[{"text":%s}],"usage":[1]}',
    '{"choices":[{"text":%s,"finish_reason":1}]}',
    '{"choices":[{"text":%s}]',
    '{"choices":[{"index":1,"text":%s}]}',
    '{"choices":[{"text":%s,"index":1}]}',
    '{"choices":[{"index":0,"delta":{"content":%s}},{"index":1,"delta":{}}]}',
]
ENDS = [b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\n"]


def said(shape: str, value: bytes, end: bytes = b"\n\n") -> bytes:
    before, _, after = shape.encode().partition(b"%s")
    return b"data: " + before + value + after + end


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
IDS = st.one_of(
    st.sampled_from(["chatcmpl-0f3a", "chatcmpl-9b2c", "_-", 'x","error":"y', 'x","usage":{}, "z":"', "\\\\", ""]),
    st.text('ab9-_"\\\\,:{ ', max_size=13),
)


def by_the_book(reads: list[bytes], told: StreamedAnswer | None = None) -> Result:
    """The facts of an answer that the server then closes; a stamp is the number of the read, from 0 on."""
    response = Response()
    response._completion.answer = told
    for i, read in enumerate(reads):
        if not response.done:
            response.feed(read, i)
    response.eof()
    return listed(response)


# -- learning ---------------------------------------------------------------------------------------------------------


def takes(template: Template | None, content: bytes) -> bool:
    """Whether the hot path and what follows it would take this content of a chunk for some more output."""
    if template is None:
        return False
    here, there = socket.socketpair()
    reader, buffer = reading.Reader(), reading.ReceiveBuffer()
    reader.add(here.fileno(), SimpleNamespace(), False)  # type: ignore[arg-type]
    pattern = reading.Pattern(b"", b"", ((template.before, template.loose, template.after),))
    reader.store(here.fileno(), buffer, pattern, False)
    reader.take(here.fileno(), b"%x\r\n%b\r\n" % (len(content), content), 1)
    reader.close()
    here.close()
    there.close()
    return all(kind and parts is not None and is_text(parts) for kind, _, parts in buffer.runs(0, True))


def is_output(content: bytes) -> bool:
    facts = by_the_book([CHUNKED, chunk(content)])
    return (len(facts.chunk_ns), facts.chunk_tokens, facts.finish_reason, facts.error) == (1, None, None, "cut")


@needs_compiled
@settings(max_examples=600, deadline=None)
@given(shape=st.sampled_from(SHAPES), first=VALUES, values=st.lists(VALUES, min_size=1, max_size=6))
def test_whatever_a_template_takes_is_one_output_by_the_book(shape, first, values) -> None:
    template = Template.learn(said(shape, first))
    for value in values:
        content = said(shape, value)
        assert not takes(template, content) or is_output(content), content


@needs_compiled
@settings(max_examples=600, deadline=None)
@given(
    shape=st.sampled_from(SHAPES), ids=st.lists(IDS, min_size=2, max_size=2), values=st.lists(VALUES, min_size=2),
    created=st.lists(st.sampled_from(["1764391234", "1764391235", "0764391235", "1764391e35", "17"]), min_size=2),
)  # fmt: skip
def test_the_next_answer_is_taken_with_another_id_and_time(shape, ids, values, created) -> None:
    """By heart: what it takes is output, and nothing else."""
    first, second = (
        said(shape.replace("{", '{"id":"' + one + '","created":' + when + ",", 1), value)
        for one, when, value in zip(ids, created, values, strict=False)
    )
    assert not takes(Template.learn(first), second) or is_output(second), second


@needs_compiled
def test_other_ids_and_times_of_the_same_length_are_known() -> None:
    shape = '{"id":"cmpl-%s","created":%s,"choices":[{"text":%%s}]}'
    template = Template.learn(said(shape % ("0f3a", "1764391234"), b'"a"'))
    for one, created, known in (
        ("9b2c", "1764391234", True), ("9b2c", "1764399999", True), ("77-a", "2764391234", False),
        ("1", "1764391234", False), ("9b2c", "176439123", False), ("9b2c", "176439123.", False),
    ):  # fmt: skip
        assert takes(template, said(shape % (one, created), b'"b"')) is known, (one, created)
    assert Template.learn(said(shape % ("9b2c", "1764399999"), b'"a"')) == template, "alike is equal"


@needs_compiled
def test_what_servers_really_send_is_learned() -> None:
    """A template that never fits would make every other test here true."""
    for shape in SHAPES[:5]:
        for end in ENDS[:2]:
            texts = ["a", " longer than that", "日本", "\\n", '\\"', "\\ud83d\\ude42"]
            contents = [said(shape, b'"%b"' % t.encode(), end) for t in texts]
            template = Template.learn(contents[0])
            assert template is not None
            assert all(takes(template, content) for content in contents)
            assert re.sub(rb'(?<=")0(?=")', b"x", template.whole(b"a")) == contents[0]
            assert not takes(template, said(shape, b'""', end))
            assert not takes(template, contents[0].upper())


@needs_compiled
@pytest.mark.parametrize("shape", SHAPES[5:12] + SHAPES[16:18] + SHAPES[20:])
def test_what_only_looks_plain_is_never_taken(shape: str) -> None:
    content = said(shape, b'"a"')
    assert not takes(Template.learn(content), content)


ROLE = delta(role="assistant", content="")
FIRST = delta(content="a")
SECOND = b'data: {"choices":[{"index":1,"delta":{"role":"assistant","content":""}}]}\n\n'


@pytest.mark.parametrize(
    ("parts", "known"),
    [
        pytest.param([chunk(ROLE), chunk(FIRST)], [chunk(ROLE)], id="role"),
        pytest.param([chunk(FIRST)], [], id="head alone"),
        pytest.param(
            [chunk(b": hello\n\n"), chunk(ROLE), chunk(FIRST)], [chunk(b": hello\n\n"), chunk(ROLE)], id="comment"
        ),
        pytest.param([chunk(ROLE + FIRST)], [], id="in one chunk"),
        pytest.param([chunk(ROLE[:9]), chunk(ROLE[9:]), chunk(FIRST)], [], id="an event in two chunks"),
        pytest.param([chunk(usage(3)), chunk(FIRST)], [], id="what is said is no opening"),
        pytest.param([chunk(ROLE), chunk(SECOND), chunk(FIRST)], [chunk(ROLE)], id="another choice"),
    ],
)
def test_an_opening_is_what_says_nothing_yet(parts: list[bytes], known: list[bytes]) -> None:
    shape = AnswerShape.learn(CHUNKED + b"".join(parts), None)
    assert shape.opening == CHUNKED + b"".join(known)


@pytest.mark.parametrize(
    "head",
    [
        CHUNKED.replace(b"200 OK", b"500 OK"), CHUNKED.replace(b"text/event-stream", b"application/json"),
        CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), CHUNKED.replace(b"1.1", b"1.0"),
        CHUNKED.replace(b"chunked", b"gzip, chunked"), CHUNKED[:-2], b"",
    ],
)  # fmt: skip
def test_an_answer_of_another_kind_has_no_opening(head: bytes) -> None:
    assert AnswerShape.learn(head + chunk(ROLE) + chunk(FIRST), None).opening == b""


def test_a_shape_remembers_some_kinds_of_events_and_the_last_opening() -> None:
    shape = AnswerShape.learn(CHUNKED + chunk(FIRST), None)
    again = AnswerShape.learn(CHUNKED + chunk(FIRST), shape)
    assert again is shape
    other = AnswerShape.learn(CHUNKED + chunk(ROLE) + chunk(text("a")), shape)
    assert other.opening == CHUNKED + chunk(ROLE)
    assert (other.templates[0], len(other.templates)) == (shape.templates[0], 2)
    assert AnswerShape.learn(b"HTTP/1.1 500", other) is other
    for i in range(20):
        other = other.with_one(Template.learn(said(SHAPES[0].replace("index", f"x{i}"), b'"a"')))
    assert len(other.templates) == 4


# -- through the hot path ---------------------------------------------------------------------------------------------


class Owner:
    """What a connection needs of a client."""

    retries = 0

    def __init__(self, path: Any) -> None:
        self.reader = path.Reader()
        self.ended: list[InFlight] = []
        self.pooled = 0

    def end(self, stream: InFlight, stamp: int) -> None:
        stream.result.finished_ns = stamp
        self.ended.append(stream)

    def idle(self, connection: Connection) -> None:
        self.pooled += 1

    def drop(self, connection: Connection, trouble: str = "") -> None:
        pass


class Wire:
    """A connection to a server whose answers the test gives, one on each, and what the client learns from them."""

    def __init__(self, path: Any) -> None:
        self.path = path
        self.target: Any = type("Target", (), {"tls": None, "idle": [], "authority": "x", "head": b"", "shape": None})()
        self.handed_on = 0
        self.reader: Any = None  # of the last answer

    def answer(self, reads: list[bytes], parse_after: set[int] = frozenset(), *, told: bool = False) -> Any:  # type: ignore[assignment]
        """Send reads one by one; parse at some of them. The stream, and when each read was sent."""
        owner: Any = Owner(self.path)
        self.reader = owner.reader
        here, there = socket.socketpair()
        connection = Connection(owner, self.target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("harness.scenarios.client.connection.COMPILED", self.path.COMPILED)
            patch.setattr("harness.scenarios.client.in_flight.ReceiveBuffer", self.path.ReceiveBuffer)
            patch.setattr("harness.scenarios.client.fast_path.Pattern", self.path.Pattern)
            feed = InFlight.feed

            def handed_on(stream: InFlight, data: bytes, stamp: int) -> None:
                self.handed_on += 1
                feed(stream, data, stamp)

            patch.setattr(InFlight, "feed", handed_on)
            stream = InFlight(Result(0, 0), b"", self.target, None, None, 0, (lambda *_: None) if told else None)
            connection.sock, connection.fd, connection.recvmsg = there, there.fileno(), there.recvmsg
            there.setblocking(False)
            connection.ready = True
            owner.reader.add(there.fileno(), connection, True)
            connection.send(stream)
            sent = []
            try:
                for i, read in enumerate(reads):
                    sent.append(time.monotonic_ns())
                    with contextlib.suppress(OSError):  # it may have had enough
                        here.sendall(read)
                    while owner.reader.read():
                        pass
                    if i in parse_after and stream.connection is not None:
                        connection.look(stream)
                here.close()
                owner.reader.read()
                owner.reader.read()  # an end that came with the last bytes
                stream.parse(over=True)
                stream.response.eof()
            finally:
                connection.close()
                owner.reader.close()
        assert len(owner.ended) == 1
        assert len(stream.buffer) == 0
        return stream, sent


def agrees(stream: InFlight, sent: list[int], expected: Result) -> None:
    """All facts and stamps are those by the book."""
    found = listed(stream.response)
    assert replace(found, chunk_ns=[]) == replace(expected, chunk_ns=[])
    for stamp, read in zip(found.chunk_ns, expected.chunk_ns, strict=True):
        assert sent[read] <= stamp < (sent[read + 1] if read + 1 < len(sent) else stamp + 1)


OPENER = '{"id":"c-1234","created":1764391234,"choices":[{"delta":{"role":%s}}]}'


def head_of(date: int, more: bytes = b"") -> bytes:
    return CHUNKED[:-2] + b"Date: Sun, 29 Nov 2026 05:00:%02d GMT\r\n%b\r\n" % (date, more)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_what_the_hot_path_keeps_says_what_the_book_says(data: st.DataObject) -> None:
    """Several answers one after the other, of one shape but for ids, times and whatever goes wrong, parsed now and
    then, cut anywhere, any byte damaged.
    """
    path = data.draw(st.sampled_from(READERS))
    wire = Wire(path)
    shape = data.draw(st.sampled_from(SHAPES[:5] * 3 + SHAPES[5:]))
    told = data.draw(st.booleans())
    for nth in range(data.draw(st.integers(1, 4))):
        opening = [head_of(nth), chunk(said(OPENER.replace("1234", f"123{nth}"), b'"a"'))]
        first = data.draw(st.integers(0, 2))
        reads = [*opening[: 1 + first % 2], chunk(said(shape, b'"first"'))]
        for _ in range(data.draw(st.integers(0, 12))):
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
        tails = [[], [chunk(usage(3)), chunk(DONE), END], [chunk(DONE) + END], [chunk(usage(3)) + chunk(DONE) + END],
                 [chunk(DONE), chunk(said(shape, b'"late"')), END], [chunk(DONE), END + b"junk"]]  # fmt: skip
        reads += data.draw(st.sampled_from(tails))
        if data.draw(st.integers(0, 3)) == 0:  # the kernel joined what was sent
            at = data.draw(st.integers(0, len(reads) - 1))
            reads[at : at + 3] = [b"".join(reads[at : at + 3])]
        if data.draw(st.integers(0, 3)) == 0:  # a byte is lost, changed or too much
            at = data.draw(st.integers(0, min(len(reads) - 1, 2)))
            one, i = reads[at], data.draw(st.integers(0, len(reads[at]) - 1))
            damage = data.draw(st.sampled_from([b"", b"x", b'"', b"\n", b"\r", b"0", b":", one[i : i + 1] * 2]))
            reads[at] = (one[:i] + damage + one[i + 1 :]) or b"x"
        said_by_the_book = StreamedAnswer()
        expected = by_the_book(reads, said_by_the_book)
        parse_after = data.draw(st.sets(st.integers(0, len(reads)), max_size=4))
        stream, sent = wire.answer(reads, parse_after, told=told)
        agrees(stream, sent, expected)
        if told:
            assert stream.response.answer.text == said_by_the_book.text


@pytest.mark.parametrize("path", STORING)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_cut_or_joined_at_any_byte(path: Any, shape: str) -> None:
    """A cut anywhere in a stream that otherwise comes an event a read: all facts and stamps are those by the book."""
    texts = [" tok", "\\n", "日本", "en", " ", "x" * 30]
    reads = [head_of(1), chunk(ROLE), *(chunk(said(shape, b'"%b"' % t.encode())) for t in texts)]
    reads += [chunk(text("", "stop")), chunk(usage(6)), chunk(DONE), END]
    wire = Wire(path)
    agrees(*wire.answer(reads), by_the_book(reads))
    handed_on = wire.handed_on
    for i, read in enumerate(reads):
        for cut in range(0, len(read) + 1, 1 if i in (0, 2, len(reads) - 1) else 7):
            after = reads[i + 1 : i + 2]
            in_two = [*reads[:i], read[:cut], read[cut:], *reads[i + 1 :]]
            joined = [*reads[:i], read[:cut], b"".join([read[cut:], *after]), *reads[i + 2 :]]
            for split in ([part for part in parts if part] for parts in (in_two, joined)):
                assert b"".join(split) == b"".join(reads)
                expected = by_the_book(split)
                assert expected.chunk_tokens == [1] * 6
                agrees(*wire.answer(split), expected)
    assert wire.handed_on == handed_on, "once it is known nothing is handed on before the end"


@pytest.mark.parametrize("path", STORING)
@pytest.mark.parametrize("more", [b"", b"X-Request-Id: 7\r\n"])
def test_from_the_second_answer_on_nothing_is_parsed_before_the_end(path: Any, more: bytes) -> None:
    """Other dates and ids are no news, and of a plain event only the text is kept: 10,000 streams fit in memory."""
    wire = Wire(path)
    for nth in range(4):
        shape = '{"id":"c-1","created":9961,"choices":[{"text":%s}]}'.replace("1", str(nth + 1))
        body = [said(shape, b'" t%d"' % i) for i in range(60)]
        reads = [head_of(nth, more.replace(b"7", b"%d" % nth)), *map(chunk, body), chunk(usage(60)), chunk(DONE) + END]
        before = wire.handed_on
        stream, sent = wire.answer(reads)
        agrees(stream, sent, by_the_book(reads))
        assert (wire.handed_on - before > 0) is (nth == 0)
        assert (stream.response.keep_alive, stream.response.done) == (True, True)


@pytest.mark.parametrize("path", READERS)
def test_events_of_another_choice_are_not_taken_for_those_of_the_first(path: Any) -> None:
    """Not even once the answers of this server, of one choice so far, are known."""
    wire = Wire(path)
    one, other = ('{"id":"c-1","choices":[{"index":K,"text":%s}]}'.replace("K", k) for k in "01")
    for nth in range(5):
        several = nth > 1
        body = [said(one, b'" t%d"' % i) for i in range(20)]
        if several:
            body = [event for i, first in enumerate(body) for event in (said(other, b'" x%d"' % i), first)]
        reads = [head_of(nth), *map(chunk, body), chunk(usage(20 * (1 + several))), chunk(DONE) + END]
        stream, sent = wire.answer(reads)
        agrees(stream, sent, by_the_book(reads))
        facts = stream.response.fill(Result(0, 0))
        assert (len(facts.chunk_ns), facts.output_tokens) == (20, None if several else 20)


@pytest.mark.parametrize("path", STORING)
def test_a_shape_that_is_learned_while_others_wait_serves_them_too(path: Any) -> None:
    """The answers of a first wave come together: all were sent before any had shown what they look like."""
    wire = Wire(path)
    reads = [head_of(1), chunk(ROLE), chunk(FIRST), chunk(usage(1)), chunk(DONE) + END]
    wire.answer(reads)
    before, shape, begin = wire.handed_on, wire.target.shape, InFlight.begin
    with pytest.MonkeyPatch.context() as patch:

        def before_it_was_learned(stream: InFlight, now_ns: int) -> None:
            begin(stream, now_ns)
            stream.shape = None

        patch.setattr(InFlight, "begin", before_it_was_learned)
        stream, sent = wire.answer(reads)
    agrees(stream, sent, by_the_book(reads))
    assert (wire.handed_on, stream.shape, stream.buffer.opening_matched) == (before, shape, True)
    reader = wire.reader
    assert (reader.bytes, reader.events) == (len(b"".join(reads)), 1 + 1 + 2)


@pytest.mark.parametrize("path", STORING)
@pytest.mark.parametrize("lacks", [1, 2])
def test_a_line_end_that_never_comes_is_no_line_end(path: Any, lacks: int) -> None:
    """An event counts once its content is there; that its chunk is broken shows in what follows."""
    reads = [head_of(1), chunk(ROLE), chunk(FIRST), chunk(FIRST)[:-lacks], chunk(FIRST), chunk(DONE) + END]
    wire = Wire(path)
    for _ in range(2):
        expected = by_the_book(reads)
        assert (expected.error, len(expected.chunk_ns)) == ("protocol", 2)
        agrees(*wire.answer(reads), expected)


@needs_compiled
@pytest.mark.parametrize("changed", [b"404 OK", b"200 NO"])
def test_another_status_is_no_opening(changed: bytes) -> None:
    wire = Wire(reading)
    reads = [head_of(1), chunk(ROLE), chunk(FIRST), chunk(DONE) + END]
    wire.answer(reads)
    before = wire.handed_on
    reads[0] = reads[0].replace(b"200 OK", changed)
    agrees(*wire.answer(reads), by_the_book(reads))
    assert wire.handed_on > before


@needs_compiled
def test_many_models_behind_one_server_are_each_known_from_the_first_event_on() -> None:
    """More than a shape remembers, by turns: what is not known is learned at once, not at the end."""
    wire = Wire(reading)
    for nth in range(30):
        shape = SHAPES[0].replace('"x"', f'"x","model":"adapter-{"x" * (nth % 10)}"')
        reads = [head_of(1), *(chunk(said(shape, b'"t%d"' % i)) for i in range(50)), chunk(DONE) + END]
        before = wire.handed_on
        agrees(*wire.answer(reads), by_the_book(reads))
        assert wire.handed_on - before <= 2


REASONING, CONTENT = SHAPES[3], '{"choices":[{"delta":{"content":%s}}]}'
ODD_ONE = '{"choices":[{"delta":{"content":%s},"logprobs":[]}]}'


@needs_compiled
@pytest.mark.parametrize("every", [1, 3, 4, 5, 13])
@pytest.mark.parametrize(
    ("shapes", "least"),
    [
        pytest.param([REASONING] * 20 + [CONTENT] * 180, 180, id="it thinks, then answers"),
        pytest.param([ODD_ONE] + [CONTENT] * 199, 180, id="the first event is like no other"),
        pytest.param(([CONTENT] * 19 + [None]) * 10, 180, id="a comment now and then"),
        pytest.param([CONTENT, REASONING] * 100, 170, id="by turns"),
    ],
)
def test_an_answer_that_changes_is_recognised_again(shapes: list[str | None], least: int, every: int) -> None:
    """However few reads are parsed at a time; and the next answer is known from its beginning to its end."""
    reads = [chunk(b": ping\n\n" if s is None else said(s, b'"t%d"' % i)) for i, s in enumerate(shapes)]
    stored = 0
    feed_plain = Response.feed_plain

    def count(response: Response, whole: Any, in_answer: bool, stamps: Any, texts: Any) -> bool:
        nonlocal stored
        stored += len(stamps)
        return feed_plain(response, whole, in_answer, stamps, texts)

    wire = Wire(reading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Response, "feed_plain", count)
        stream, _ = wire.answer([CHUNKED, *reads, chunk(DONE) + END], set(range(1, 200, every)))
        assert len(listed(stream.response).chunk_ns) == 200 - shapes.count(None)
        assert stored >= least
        stored = 0
        stream, _ = wire.answer([CHUNKED, *reads, chunk(DONE) + END])
        assert len(listed(stream.response).chunk_ns) == stored == 200 - shapes.count(None)
