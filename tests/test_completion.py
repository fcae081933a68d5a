"""What events mean: which chunks are tokens, and what was said."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenarios.completion import Answer, Completion


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
