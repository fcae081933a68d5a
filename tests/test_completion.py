"""What events mean: which chunks are tokens, and what was said."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.record.results import Result
from harness.scenarios.client.completion import Completion, StreamedAnswer, fill
from harness.scenarios.client.fast_path import Template


def filled(said):
    return fill(Result(0, 0), said, status=200, done=True, body=b"", location="", secret=None)


def completion(*events: dict[str, Any], told: bool = False) -> Completion:
    """Events read one by one, at 1, 2, 3 ..."""
    made = Completion()
    made.answer = StreamedAnswer() if told else None
    for stamp, event in enumerate(events, 1):
        made.read_event(b"data: " + msgspec.json.encode(event) + b"\n\n", stamp)
    return made


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}}


ROLE = delta(role="assistant", content="")


@pytest.mark.parametrize(
    ("events", "stamps", "tokens"),
    [
        # vLLM streams a token that has no text (a special one, half a character) as an empty content
        ((ROLE, delta(content="a"), delta(content=""), delta(content="b"), usage(3)), [2, 3, 4], [1, 1, 1]),
        ((ROLE, delta(content=""), delta(content="a"), usage(2)), [2, 3], [1, 1]),
        # an empty content at the end that is no token
        ((ROLE, delta(content="a"), delta(content="b"), delta(content=""), usage(2)), [2, 3], [1, 1]),
        # neither count fits: nothing is guessed
        ((ROLE, delta(content="a"), delta(content=""), usage(5)), [2], None),
        ((delta(role="assistant", content="a"), delta(role="assistant", content=""), usage(2)), [1], None),
        ((delta(content=None), delta(content="a"), usage(1)), [2], [1]),
    ],
)
def test_a_token_without_text_counts_where_the_servers_own_count_says_so(events, stamps, tokens):
    got, counted = completion(*events).chunks()
    assert (list(got), None if counted is None else list(counted)) == (stamps, tokens)


NOTHING = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ((), "empty"),  # nothing but [DONE]
        ((ROLE, NOTHING), "empty"),
        ((ROLE, delta(content=""), NOTHING), "empty"),
        ((NOTHING, usage(0)), "empty"),
        ((NOTHING, {"choices": [], "usage": None}), "empty"),
        ((NOTHING, {"choices": [], "usage": {"prompt_tokens": 9}}), "empty"),
        ((NOTHING, usage(1)), None),  # the model ended at once: its last token counts
        ((ROLE, delta(content="a"), NOTHING), None),
        ((ROLE, delta(reasoning_content="a"), NOTHING), None),
        ((ROLE, delta(tool_calls=[{"index": 0, "function": {"name": "f"}}]), NOTHING), None),
        ((ROLE, delta(refusal="no"), NOTHING), None),
        (({"choices": [{"index": 0, "text": "", "token_ids": [2], "finish_reason": "stop"}]},), None),
    ],
)
def test_an_answer_without_output_and_without_a_count_of_any_is_no_success(events, error):
    said = completion(*events)
    said.read_event(b"data: [DONE]\n\n", 9)
    facts = filled(said)
    assert facts.error == error
    assert (facts.detail is not None) is (error is not None)


def test_a_whole_answer_without_output_is_none_either():
    for text, usage_, error in (("", None, "empty"), ("", {"completion_tokens": 1}, None), ("a", None, None)):
        said = Completion()
        body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage_}
        said.read_json(msgspec.json.encode(body), 1)
        assert filled(said).error == error


def test_the_chunk_that_names_the_role_is_not_the_beginning_of_output():
    assert completion(ROLE).empty
    assert not completion(ROLE, delta(content="")).empty


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(["content", "reasoning", "refusal"]), st.text(max_size=5)), max_size=12)
)
def test_what_was_said_is_the_content_alone(parts):
    told = completion(ROLE, *(delta(**{kind: text}) for kind, text in parts), told=True).answer
    assert told.text == "".join(text for kind, text in parts if kind == "content")


def test_what_was_said_without_streaming_and_on_completions():
    whole = Completion()
    whole.answer = StreamedAnswer()
    whole.read_json(b'{"choices":[{"message":{"content":"all of it"},"token_ids":[1,2]}]}', 1)
    assert (whole.answer.text, whole.answer.token_ids) == ("all of it", [1, 2])
    said = completion({"choices": [{"text": "a", "token_ids": [7]}]}, {"choices": [{"text": "b"}]}, told=True).answer
    assert (said.text, said.token_ids) == ("ab", [7])
    odd = completion({"choices": [{"text": ["a"], "token_ids": "x"}]}, told=True).answer
    assert (odd.text, odd.token_ids) == ("", [])


# ---------------------------------------------------------------------------------------------------- several choices


def of(index: int | None, **fields: Any) -> dict[str, Any]:
    choice = {"delta": fields} if index is None else {"index": index, "delta": fields}
    return {"choices": [choice]}


def both(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"choices": first["choices"] + second["choices"]}


@pytest.mark.parametrize(
    "events",
    [
        # each choice in events of its own, as vLLM streams n=2: the second one begins sooner and ends later
        (of(1, content="x"), of(0, content="a"), of(1, content="y"), of(0, content="b"), of(1, content="z"), usage(5)),
        (of(1, content="x"), both(of(1, content="y"), of(0, content="a")), usage(9), of(0, content="b"), usage(9)),
        (usage(3), both(of(None, content="a"), of(None, content="x")), usage(4), both(of(0, content="b"), of(1))),
    ],
)
def test_of_several_choices_the_first_is_timed_and_no_count_of_all_is_taken_for_its_own(events):
    """Stamps 2 and 4 are those of choice 0; the server's count is of all choices, so nobody knows that of one."""
    made = completion(*events, told=True)
    made.read_event(b"data: [DONE]\n\n", 9)
    facts = filled(made)
    assert (facts.error, list(facts.chunk_ns)) == (None, [2, 4])
    assert (facts.output_tokens, facts.chunk_tokens, facts.reasoning_tokens) == (None, None, None)
    assert facts.input_tokens == 1, "a prompt is counted once"
    assert facts.detail is not None and facts.detail.startswith("several choices: ")
    assert made.answer is not None and (made.answer.text, made.answer.other) == ("ab", True)


def test_one_choice_of_any_index_or_none_is_as_ever():
    for index in (0, None):
        events = of(index, content="a"), of(index, content="b", finish_reason="stop"), usage(2)
        facts = filled(completion(*events))
        assert (list(facts.chunk_ns), facts.output_tokens) == ([1, 2], 2)


def test_the_end_of_another_choice_is_not_the_end_of_the_first():
    ended = {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]}
    facts = filled(completion(of(0, content="a"), ended))
    assert (facts.error, facts.finish_reason) == ("incomplete", None)


def test_a_whole_answer_of_several_choices_has_no_count_of_its_first():
    made = Completion()
    made.answer = StreamedAnswer()
    choices = [{"index": k, "message": {"content": text}, "finish_reason": "stop"} for k, text in ((1, "x"), (0, "a"))]
    made.read_json(msgspec.json.encode({"choices": choices, "usage": {"completion_tokens": 2}}), 5)
    facts = filled(made)
    assert (facts.error, list(facts.chunk_ns), facts.output_tokens, made.answer.text) == (None, [5], None, "a")


@pytest.mark.parametrize(
    ("said", "logprobs"),
    [
        ({"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]}, [-0.5, -1.0]),
        ({"tokens": ["a"], "token_logprobs": [-0.25], "top_logprobs": None}, [-0.25]),
        ({"token_logprobs": [None, -2.0]}, [-2.0]),
        (None, []), ({}, []), ([], []), ({"content": "x"}, []), ({"content": [{"logprob": "x"}, {}]}, []),
    ],
)  # fmt: skip
def test_log_probabilities_are_of_the_tokens_that_have_one(said: object, logprobs: list[float]) -> None:
    answer = completion({"choices": [{"index": 0, "text": "a", "logprobs": said}]}, told=True).answer
    assert answer is not None and answer.logprobs == logprobs


def test_an_event_with_a_log_probability_is_never_taken_for_one_like_it() -> None:
    plain = b'data: {"choices":[{"index":0,"text":"a","logprobs":null}]}\n\n'
    assert Template.learn(plain) is not None
    assert Template.learn(plain.replace(b"null", b'{"token_logprobs":[-0.5]}')) is None
