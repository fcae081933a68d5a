"""Made-up chats have exactly the planned tokens behind any template; where it can be, a session is a conversation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import byte_level, characters, merging, metaspace
from tokenizers import AddedToken, Tokenizer

from harness.errors import PlanError, UsageError
from harness.plan.build import build_plan
from harness.plan.chat import Chat, Made
from harness.plan.file import PlanInfo, iter_requests
from harness.plan.prompts import Vocabulary
from harness.plan.reuse import UnknownTokensError, plan_prompts, prompt_reuse
from harness.plan.spec import PlanSpec
from harness.plan.tokenizers import ChatTemplate
from harness.trace.io import open_trace
from harness.trace.prefix import Turns
from harness.trace.survey import Content

ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    # As Qwen and SmolLM: a system message by default.
    "chatml": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe good<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ANSWER,
    # As Llama 3: strips each message; the first begins with a start token.
    "trimming": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}"
    "<|im_end|>{% endfor %}" + ANSWER,
    # Not one token between a message and the next.
    "bare": "{% for m in messages %}{{ m.content }}{% endfor %}",
    # The more is said, the more it adds.
    "counting": "{% for m in messages %}<|im_start|>{{ 'ba ' * (m.content | length // 40) }}{{ m.content }}<|im_end|>"
    "{% endfor %}" + ANSWER,
    # As LLaVA and SmolVLM: reads texts only as parts of a list.
    "parts": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content | selectattr('type', "
    "'equalto', 'text') %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}" + ANSWER,
    # As Gemma 1 does with a system message: refuses what is not from a user.
    "users only": "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
    "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}" + ANSWER,
}
KINDS = {f.__name__: f for f in (byte_level, metaspace, merging, characters)}
MESSAGES = {"chatml", "trimming", "parts"}


def folder_of(root: Path, kind: str, template: str | None) -> Path:
    folder = root / f"{kind} {template}"
    folder.mkdir()
    tokenizer: Tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        config = {"chat_template": TEMPLATES[template], "bos_token": {"content": "<|im_end|>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("models")
    return {(k, t): folder_of(root, k, t) for k in KINDS for t in TEMPLATES}


def counted(folder: Path, messages: list[dict[str, str]]) -> int:
    return len(tokens_of(folder, messages))


def tokens_of(folder: Path, messages: list[dict[str, str]]) -> list[int]:
    """By other means than the harness's own."""
    source = json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = lambda words: pytest.fail(words)
    messages = in_parts(messages) if source == TEMPLATES["parts"] else messages
    text = environment.from_string(source).render(messages=messages, add_generation_prompt=True, bos_token="<|im_end|>")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, object]]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def rows_of(turns: list[tuple[int, int]]) -> list[dict[str, object]]:
    return [
        {"arrival_s": float(i), "input_tokens": into, "output_tokens": out, "session_id": "a"}
        for i, (into, out) in enumerate(turns)
    ]


def plan(root: Path, folder: Path, rows: list[dict[str, object]], **spec: object) -> tuple[PlanInfo, list[object]]:
    trace, out = root / "t.jsonl", root / "t.plan"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.unlink(missing_ok=True)
    asked = PlanSpec(**({"closed": False, "as_text": True} | spec))
    info = build_plan(open_trace(trace), out, asked, Vocabulary.from_tokenizer(folder))
    return info, list(iter_requests(out))


def all_messages(requests: list[object]) -> list[list[dict[str, str]]]:
    return [json.loads(request.messages) for request in requests]


GROWING = [(60, 9), (120, 30), (230, 1), (320, 17)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_chat_has_the_planned_tokens(folders, tmp_path, kind, template):
    folder = folders[kind, template]
    info, requests = plan(tmp_path, folder, rows_of([*GROWING, (70, 5), (64, 2), (300, 4)]))
    lengths = [counted(folder, messages) for messages in all_messages(requests)]
    assert lengths == [request.input_tokens for request in requests] == [60, 120, 230, 320, 70, 64, 300]
    constant = template in MESSAGES and kind in ("byte_level", "metaspace")
    assert constant or template == "bare" or any("no constant number of tokens" in note for note in info.notes)


@pytest.mark.parametrize("template", sorted(MESSAGES))
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_a_session_is_its_conversation(folders, tmp_path, kind, template):
    folder = folders[kind, template]
    _, requests = plan(tmp_path, folder, rows_of(GROWING))
    chats = all_messages(requests)
    assert [[m["role"] for m in chat] for chat in chats] == [(["user", "assistant"] * 4)[: 2 * i + 1] for i in range(4)]
    tokenizer = Vocabulary.from_tokenizer(folder).tokenizer
    for i, chat in enumerate(chats[1:], 1):
        assert chat[:-2] == chats[i - 1]
        (answer,) = tokenizer.encode([" " + chat[-2]["content"] if kind == "byte_level" else chat[-2]["content"]])
        assert len(answer) == pytest.approx(GROWING[i - 1][1], abs=3)  # the word it begins with may be a few tokens


@pytest.mark.parametrize(("kind", "template"), [("characters", "chatml"), ("byte_level", "counting")])
def test_where_messages_cannot_be_exact_one_message_grows(folders, tmp_path, kind, template):
    _, requests = plan(tmp_path, folders[kind, template], rows_of(GROWING))
    chats = all_messages(requests)
    assert [len(chat) for chat in chats] == [1, 1, 1, 1]
    for before, after in pairwise(chats):
        size = len(before[0]["content"]) - 40  # its end may have been fitted
        assert after[0]["content"][: max(size, 0)] == before[0]["content"][: max(size, 0)]


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60) | st.none()), min_size=1, max_size=12),
    seed=st.integers(0, 2**63),
)
def test_any_session_is_exact_and_alternates(folders, turns, seed, tmp_path_factory):
    chat = Chat.of(Vocabulary.from_tokenizer(folders["byte_level", "trimming"]))
    assert chat is not None
    assert chat.room is not None
    follow = Turns(room=chat.room, lengths=True)
    made, continued = [], []
    for i, (wanted, out) in enumerate(turns):
        tokens = max(wanted, chat.shortest)
        place = follow.place("a", i, tokens, out)
        ids = chat._vocabulary.token_ids(tokens, place.first, seed=seed)
        made.append(Made(ids=ids, tokens=tokens, before=place.before))
        continued.append(place.first != i)
    chats = chat.messages(made)
    for i, messages in enumerate(chats):
        assert counted(folders["byte_level", "trimming"], messages) == made[i].tokens
        assert [m["role"] for m in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
        assert (messages[:-2] == chats[i - 1]) if continued[i] else len(messages) == 1


def reuse_of(prompts: list[list[int]], block: int) -> tuple[int, int]:
    """(tokens, hits) of an unlimited cache, prompt by prompt: the longest beginning in whole blocks that was there."""
    seen: set[tuple[int, ...]] = set()
    hits = 0
    for ids in prompts:
        begins = [tuple(ids[: block * (i + 1)]) for i in range((len(ids) - 1) // block)]
        hits += block * sum(begin in seen for begin in begins)
        seen.update(begins)
    return sum(map(len, prompts)), hits


TALKS = [("a", 60, 9), ("b", 50, 3), ("a", 120, 30), (None, 90, 3), ("b", 100, 2), ("a", 230, 1), ("a", 90, 4)]


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("template", sorted({*MESSAGES, "bare"}))
@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_reuse_among_chats_is_that_of_their_tokens(folders, tmp_path, kind, template, block):
    folder = folders[kind, template]
    rows = [
        {"arrival_s": float(i), "input_tokens": into, "output_tokens": out} | ({"session_id": s} if s else {})
        for i, (s, into, out) in enumerate(TALKS)
    ]
    info, requests = plan(tmp_path, folder, rows)
    truth = reuse_of([tokens_of(folder, messages) for messages in all_messages(requests)], block)
    found = prompt_reuse(plan_prompts(tmp_path / "t.plan", info.template), block)
    assert (found.tokens, found.hit_tokens) == truth
    assert truth[1] > 0
    # The template's own beginning, which all chats share, is nothing that the trace shares.
    own = prompt_reuse(plan_prompts(tmp_path / "t.plan", info.template, shared_head=False), 16, partial=True)
    assert own.hit_rate == pytest.approx(info.source.prefix.hit_rate_tokens)


def test_reuse_among_texts_is_that_of_their_tokens(tmp_path):
    folder = folder_of(tmp_path, "byte_level", None)
    rows = [
        {"arrival_s": 0.0, "input_tokens": 250, "output_tokens": 1, "prefix_ids": [1, 2, i, 9], "block_tokens": 64}
        for i in (5, 6)
    ]
    info, requests = plan(tmp_path, folder, rows)
    ids = Vocabulary.from_tokenizer(folder).tokenizer.encode([request.prompt_text for request in requests])
    found = prompt_reuse(plan_prompts(tmp_path / "t.plan", info.template), 16)
    assert (found.tokens, found.hit_tokens) == reuse_of(ids, 16) == (500, 128)


@pytest.mark.parametrize("kind", ["characters", "merging"])
def test_tokens_that_are_no_words_are_not_guessed(folders, tmp_path, kind):
    info, _ = plan(tmp_path, folders[kind, "chatml"], rows_of(GROWING))
    with pytest.raises(UnknownTokensError):
        prompt_reuse(plan_prompts(tmp_path / "t.plan", info.template), 16)


def test_what_the_template_alone_exceeds_is_said_and_planned_as_it_is(folders, tmp_path):
    folder = folders["byte_level", "chatml"]
    info, requests = plan(tmp_path, folder, rows_of([(2, 1), (300, 1)]))
    shortest = Chat.of(Vocabulary.from_tokenizer(folder)).shortest
    assert [r.input_tokens for r in requests] == [shortest, 300]
    assert counted(folder, all_messages(requests)[0]) == shortest
    assert any(note.startswith("1 rows ask for less than the") for note in info.notes)


def test_shared_blocks_are_shared_text(folders, tmp_path):
    folder = folders["byte_level", "chatml"]
    rows = [
        {"arrival_s": 0.0, "input_tokens": 250, "output_tokens": 1, "prefix_ids": [1, 2, i, 9], "block_tokens": 64}
        for i in (5, 6)
    ]
    _, requests = plan(tmp_path, folder, rows)
    one, two = (chat[0]["content"].split() for chat in all_messages(requests))
    assert one[:129] == two[:129]  # the word each message begins with, and two blocks
    assert one[129:] != two[129:]


def test_without_a_template_the_length_is_the_texts_and_a_note_says_so(tmp_path):
    folder = folder_of(tmp_path, "byte_level", None)
    info, requests = plan(tmp_path, folder, rows_of([(60, 9)]))
    assert requests[0].messages is None
    assert len(Vocabulary.from_tokenizer(folder).tokenizer.encode([requests[0].prompt_text])[0]) == 60
    assert any("no chat template lies beside the tokenizer" in note for note in info.notes)


def test_what_to_make_prompts_from_is_asked_once_the_trace_is_known(folders, tmp_path):
    trace = tmp_path / "t.jsonl"
    rows = [*rows_of(GROWING), {"arrival_s": 9.0, "prompt": "hello"}, {"arrival_s": 9.5, "messages": HELLO}]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = Vocabulary.from_tokenizer(folders["byte_level", "chatml"])
    asked: list[Content] = []

    def choose(content: Content) -> tuple[Vocabulary, bool]:
        asked.append(content)
        return vocabulary, True

    spec = PlanSpec(closed=False)
    build_plan(open_trace(trace), tmp_path / "chosen", spec, choose=choose)
    assert asked == [Content(messages=1, text=1, lengths_only=4)]
    build_plan(open_trace(trace), tmp_path / "given", PlanSpec(closed=False, as_text=True), vocabulary)
    assert (tmp_path / "chosen").read_bytes() == (tmp_path / "given").read_bytes()

    def refuse(content: Content) -> tuple[Vocabulary, bool]:
        raise UsageError("not with this server")

    with pytest.raises(UsageError, match="not with this server"):
        build_plan(open_trace(trace), tmp_path / "refused", spec, choose=refuse)
    assert not (tmp_path / "refused").exists()


def test_the_seed_decides_all(folders, tmp_path):
    folder = folders["byte_level", "chatml"]
    one, same, other = (all_messages(plan(tmp_path, folder, rows_of(GROWING), seed=s)[1]) for s in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_wrong_measure_is_noticed(folders, monkeypatch):
    chat = Chat.of(Vocabulary.from_tokenizer(folders["byte_level", "chatml"]))
    monkeypatch.setattr(chat, "shortest", chat.shortest - 2)  # as if the template had become longer
    ids = np.concatenate([chat._vocabulary.token_ids(200, 1)])
    (messages,) = chat.messages([Made(ids=ids, tokens=200)])
    assert counted(folders["byte_level", "chatml"], messages) == 200


# --- templates -------------------------------------------------------------------------------------------------------


HELLO = [{"role": "user", "content": "<hi>"}]


def rendered(source: object, **config: object) -> str:
    return ChatTemplate(str(source), {"bos_token": "<s>"}, "t").render(HELLO)


def test_templates_have_what_transformers_gives_them():
    assert rendered("{{ bos_token }}{{ messages[0].content }}") == "<s><hi>"
    assert rendered("{{ messages | tojson }}") == '[{"role": "user", "content": "<hi>"}]'
    assert rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "<hi>"
    assert rendered("{% for m in messages %}{% break %}{% endfor %}x") == "x"
    assert len(rendered("{{ strftime_now('%Y') }}")) == 4
    assert rendered("{% if tools is defined %}t{% endif %}{% if add_generation_prompt %}a{% endif %}") == "a"


def test_templates_like_transformers_own(folders):
    transformers = pytest.importorskip("transformers")
    for template in TEMPLATES:
        folder = folders["byte_level", template]
        own = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=TEMPLATES[template], bos_token="<|im_end|>"
        )
        given = in_parts(HELLO) if template == "parts" else HELLO
        theirs = own.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        assert ChatTemplate.of(folder).render(HELLO) == theirs


def test_a_template_can_touch_nothing_outside():
    for evil in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/x' %}",
    ):
        with pytest.raises(PlanError, match="refuses a conversation"):
            rendered(evil)


def test_templates_are_found_where_models_keep_them(tmp_path):
    assert ChatTemplate.of(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ eos_token }}yes"}]
    config.write_text(json.dumps({"chat_template": named, "eos_token": "<e>"}))
    assert ChatTemplate.of(tmp_path).render(HELLO) == "<e>yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.of(tmp_path).render(HELLO) == "file"
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(PlanError, match=r"chat_template.jinja: not a chat template"):
        ChatTemplate.of(tmp_path)
    config.write_text("{")
    with pytest.raises(PlanError, match=r"tokenizer_config\.json"):
        ChatTemplate.of(tmp_path)
