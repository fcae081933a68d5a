"""Turns that continue their session begin with the prompt before them and its answer; the others share nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from conftest import trace_record
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.plan.build import build_plan
from harness.plan.file import PlanInfo, Request, iter_requests
from harness.plan.prompts import Vocabulary
from harness.plan.reuse import plan_prompts, prompt_reuse
from harness.plan.spec import PlanSpec
from harness.trace.io import open_trace
from harness.trace.prefix import BLOCK_TOKENS, IdealReuse
from harness.trace.shape import measure

VOCABULARY = Vocabulary.from_ids(range(100, 5000))


def trace_of(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "t.jsonl"
    path.write_text("".join(json.dumps({"arrival_s": float(i)} | row) + "\n" for i, row in enumerate(rows)))
    return path


def turn(session: str | None, input_tokens: int, output_tokens: int | None = None, **more: object) -> dict[str, object]:
    row = {"session_id": session, "input_tokens": input_tokens, "output_tokens": output_tokens} | more
    return {name: value for name, value in row.items() if value is not None}


def plan(path: Path, **spec: object) -> tuple[PlanInfo, list[Request]]:
    out = path.with_suffix(".plan")
    out.unlink(missing_ok=True)
    info = build_plan(open_trace(path), out, PlanSpec(**({"closed": False} | spec)), VOCABULARY)
    return info, list(iter_requests(out))


def prompts(path: Path, **spec: object) -> list[list[int]]:
    return [r.prompt_token_ids or [] for r in plan(path, **spec)[1]]


def alike(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_conversation_is_the_beginning_of_one_stream(tmp_path):
    one, two, three = prompts(trace_of(tmp_path, turn("a", 50, 20), turn("a", 90, 30), turn("a", 120, 5)))
    assert [len(p) for p in (one, two, three)] == [50, 90, 120]
    assert two[:50] == one
    assert three[:90] == two


def test_the_answer_between_has_the_recorded_length(tmp_path):
    # The second turn has no word of its own behind the answer; the third has one token too few for prompt and answer.
    rows = [turn("a", 50, 20), turn("a", 70, 30), turn("a", 99, 1)]
    one, two, three = prompts(trace_of(tmp_path, *rows))
    assert two[:50] == one
    assert alike(two, three) < 4


def test_a_shorter_turn_begins_a_conversation_of_its_own(tmp_path):
    rows = [turn("a", 90, 10), turn("a", 40, 10), turn("a", 60, 10), turn("a", 59, 10)]
    info, requests = plan(trace_of(tmp_path, *rows))
    one, two, three, four = (r.prompt_token_ids for r in requests)
    assert alike(one, two) < 4
    assert three[:40] == two
    assert alike(three, four) < 4
    assert len({r.slice for r in requests}) == 1, "it stays a session all the same"
    assert (info.source.prefix.continued_turns, info.source.prefix.independent_turns) == (1, 2)
    assert any(note.startswith("1 turns continue their session") for note in info.notes)
    assert any(note.startswith("2 later turns of sessions are shorter") for note in info.notes)


def test_sessions_do_not_share_with_each_other_nor_with_those_without(tmp_path):
    rows = [
        turn("a", 50, 1),
        turn("b", 50, 1),
        turn(None, 50, 1),
        turn("b", 80, 1),
        turn("a", 80, 1),
        turn(None, 80, 1),
    ]
    got = prompts(trace_of(tmp_path, *rows))
    assert got[3][:50] == got[1]
    assert got[4][:50] == got[0]
    for i, j in [(0, 1), (0, 2), (1, 2), (3, 4), (2, 5), (4, 5)]:
        assert alike(got[i], got[j]) < 4


def test_limits_and_slices_change_no_prompt_and_seeds_all(tmp_path):
    path = trace_of(tmp_path, *(turn(f"s{i % 3}", 20 + 15 * (i // 3), 4) for i in range(12)))
    whole = prompts(path)
    assert prompts(path, limit=7) == whole[:7]
    assert prompts(path, closed=True) == whole
    assert all(alike(a, b) < 4 for a, b in zip(whole, prompts(path, seed=1), strict=True))


def test_a_trace_begun_again_is_not_known_to_the_cache(tmp_path):
    path = trace_of(tmp_path, *(turn("a", 40 + 40 * i, 4) for i in range(3)))
    got = prompts(path, repeat=True, limit=6)
    assert [alike(a, b) for a, b in pairwise(got[:3])] == [40, 80]
    assert [alike(a, b) for a, b in pairwise(got[3:])] == [40, 80]
    assert alike(got[0], got[3]) < 4


def test_copies_of_a_session_are_sessions_of_their_own(tmp_path):
    path = trace_of(tmp_path, *(turn(f"s{i % 4}", 20 + 15 * (i // 4), 4) for i in range(40)))
    _, requests = plan(path, grow=2.0)
    assert len(requests) == 80
    by_session: dict[int, list[list[int]]] = {}
    for request in requests:
        by_session.setdefault(request.slice, []).append(request.prompt_token_ids)
    assert len(by_session) == 8
    for turns in by_session.values():
        assert [alike(a, b) for a, b in pairwise(turns)] == [len(p) for p in turns[:-1]]
    firsts = [turns[0] for turns in by_session.values()]
    assert all(alike(a, b) < 4 for i, a in enumerate(firsts) for b in firsts[:i])


def test_prefix_ids_and_text_rule_where_the_trace_has_them(tmp_path):
    rows = [
        turn("a", 32, 4, prefix_ids=[1, 2], block_tokens=16),
        turn("a", 64, 4, prefix_ids=[1, 2, 3, 4], block_tokens=16),
        turn("a", 96, 4, prefix_ids=[9, 2, 3, 4, 5, 6], block_tokens=16),
    ]
    one, two, three = prompts(trace_of(tmp_path, *rows))
    assert alike(one, two) == 32
    assert alike(two, three) < 4
    texts = trace_of(tmp_path, {"session_id": "a", "prompt": "x"}, {"session_id": "a", "prompt": "x y"})
    info, _ = plan(texts)
    assert info.source.prefix is None
    assert not any("continue" in note for note in info.notes)


# --- what is expected is what is planned ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 300), st.integers(1, 60)),
        min_size=1,
        max_size=40,
    )
)
def test_the_expected_reuse_is_that_of_the_prompts(rows, tmp_path_factory):
    path = trace_of(tmp_path_factory.mktemp("t"), *(turn(*row) for row in rows))
    info, _ = plan(path)
    expected, inspected = info.source.prefix, measure(open_trace(path)).prefix
    if all(session is None for session, _, _ in rows):
        assert expected is None
        assert inspected is None
        return
    got = prompt_reuse(plan_prompts(path.with_suffix(".plan")), BLOCK_TOKENS, partial=True)
    assert (got.hit_tokens, got.tokens) == (inspected.hit_tokens, inspected.tokens)
    assert expected.hit_rate_tokens == inspected.hit_rate_tokens


def test_expected_reuse_of_a_known_trace():
    ideal = IdealReuse()
    for i, (session, tokens, out) in enumerate([("a", 100, 10), (None, 50, 10), ("a", 130, 10), ("a", 64, 10)]):
        ideal.add(trace_record(i + 1, float(i), tokens, out, session_id=session))
    found = ideal.result()
    assert (found.rows, found.tokens, found.hit_tokens) == (4, 344, 96)  # six whole blocks of the first prompt
    assert (found.blocks, found.hit_blocks) == (7 + 4 + 9 + 4, 6)
    assert (found.continued_turns, found.independent_turns) == (1, 1)
    assert found.block_tokens == [BLOCK_TOKENS]


def test_a_trace_without_sessions_or_prefixes_states_no_reuse():
    ideal = IdealReuse()
    ideal.add(trace_record(1, 0.0, 100, 10))
    assert ideal.result() is None
