"""What events mean: which chunks are tokens, and what was said."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.completion import Answer, Completion
from scenarios.facts import facts_of


def completion(*events: dict[str, Any], told: bool = False) -> Completion:
    """Events read one by one, at 1, 2, 3 ..."""
    made = Completion()
    made.told = Answer() if told else None
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
    facts = facts_of(said, status=200, done=True, body=b"", location="", secret=None)
    assert facts.error == error
    assert (facts.detail is not None) is (error is not None)


def test_a_whole_answer_without_output_is_none_either():
    for text, usage_, error in (("", None, "empty"), ("", {"completion_tokens": 1}, None), ("a", None, None)):
        said = Completion()
        body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": usage_}
        said.read_json(msgspec.json.encode(body), 1)
        assert facts_of(said, status=200, done=True, body=b"", location="", secret=None).error == error


def test_the_chunk_that_names_the_role_is_not_the_beginning_of_output():
    assert completion(ROLE).empty
    assert not completion(ROLE, delta(content="")).empty


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(["content", "reasoning", "refusal"]), st.text(max_size=5)), max_size=12)
)
def test_what_was_said_is_the_content_alone(parts):
    told = completion(ROLE, *(delta(**{kind: text}) for kind, text in parts), told=True).told
    assert told.text == "".join(text for kind, text in parts if kind == "content")


def test_what_was_said_without_streaming_and_on_completions():
    whole = Completion()
    whole.told = Answer()
    whole.read_json(b'{"choices":[{"message":{"content":"all of it"},"token_ids":[1,2]}]}', 1)
    assert (whole.told.text, whole.told.token_ids) == ("all of it", [1, 2])
    said = completion({"choices": [{"text": "a", "token_ids": [7]}]}, {"choices": [{"text": "b"}]}, told=True).told
    assert (said.text, said.token_ids) == ("ab", [7])
    odd = completion({"choices": [{"text": ["a"], "token_ids": "x"}]}, told=True).told
    assert (odd.text, odd.token_ids) == ("", [])
