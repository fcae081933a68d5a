"""Whatever a model folder holds, prompts are as long as asked when the library that owns the format counts them."""

from __future__ import annotations

import base64
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prompts import byte_level, corpus, words
from tokenizers import Tokenizer

from harness.errors import PlanError
from harness.plan.prompts import Vocabulary
from harness.plan.tokenizers import load_tokenizer


def vocab_and_merges(folder: Path) -> None:
    """As GPT-2: no tokenizer.json."""
    model = json.loads(byte_level().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def sentencepiece(folder: Path, kind: str) -> None:
    """As Llama 2 (bpe) and T5 (unigram): tokenizer.model alone."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (folder / "corpus.txt").write_text("\n".join(corpus()))
    trainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type=kind,
        vocab_size={"bpe": 560, "unigram": 360}[kind],
        byte_fallback=kind == "bpe", normalization_rule_name={"bpe": "identity", "unigram": "nmt_nfkc"}[kind],
        minloglevel=2,
    )  # fmt: skip
    loads = {"bpe": "LlamaTokenizer", "unigram": "T5Tokenizer"}[kind]
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": loads}))


def tekken(folder: Path) -> None:
    """As Mistral."""
    pytest.importorskip("mistral_common")
    vocab = [bytes([i]) for i in range(256)]
    seen = set(vocab)
    for word in words(500):
        spelled = f" {word}".encode()
        for size in range(2, len(spelled) + 1):
            if spelled[:size] not in seen:
                seen.add(spelled[:size])
                vocab.append(spelled[:size])
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
    special += ["[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"]
    special += ["[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    config = {"pattern": pattern, "default_vocab_size": len(vocab) + 100, "default_num_special_tokens": 100}
    ranks = [
        {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, token in enumerate(vocab)
    ]
    specials = [{"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(special)]
    whole = {"config": config | {"version": "v7"}, "vocab": ranks, "special_tokens": specials}
    (folder / "tekken.json").write_text(json.dumps(whole))


KINDS = {
    "vocab_and_merges": vocab_and_merges,
    "sentencepiece_bpe": lambda folder: sentencepiece(folder, "bpe"),
    "sentencepiece_unigram": lambda folder: sentencepiece(folder, "unigram"),
    "tekken": tekken,
}
TRANSFORMERS = [kind for kind in KINDS if kind != "tekken"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    if request.param in TRANSFORMERS:
        pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](path)
    return path


def counted_by_its_own_library(folder: Path, text: str) -> int:
    if (folder / "tokenizer.model").exists():
        import sentencepiece

        return len(sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text))
    if (folder / "tekken.json").exists():
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        return len(Tekkenizer.from_file(folder / "tekken.json").encode(text, bos=False, eos=False))
    return len(byte_level_without_bos().encode(text, add_special_tokens=False))


def byte_level_without_bos() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def test_text_is_as_long_as_asked_by_the_formats_own_library(folder):
    vocabulary = Vocabulary.from_tokenizer(folder)
    lengths = [1, 2, 3, 16, 17, 100, 400]
    texts = vocabulary.texts([vocabulary.token_ids(n, n, seed=5) for n in lengths])
    assert [counted_by_its_own_library(folder, text) for text in texts] == lengths


def test_any_length_and_seed(folder):
    vocabulary = Vocabulary.from_tokenizer(folder)

    @settings(max_examples=25, deadline=None)
    @given(n=st.integers(1, 200), seed=st.integers(0, 2**64 - 1))
    def check(n: int, seed: int) -> None:
        (text,) = vocabulary.texts([vocabulary.token_ids(n, 1, seed=seed)])
        assert len(vocabulary.tokenizer.encode([text])[0]) == n

    check()


def test_special_tokens_are_never_drawn(folder):
    vocabulary = Vocabulary.from_tokenizer(folder)
    drawn = {int(i) for i in vocabulary.token_ids(20_000, 0)}
    texts = "".join(vocabulary.tokenizer.decode([[i] for i in sorted(drawn)]))
    assert not any(mark in texts for mark in ("<s>", "</s>", "<unk>", "[INST]", "<|bos|>", "\ufffd"))


def test_merges_are_part_of_the_name(tmp_path):
    pytest.importorskip("transformers")
    vocab_and_merges(tmp_path)
    before = load_tokenizer(tmp_path).label
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(merges[:-1]))
    assert load_tokenizer(tmp_path).label != before


# --- what is missing or damaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "file"), [("transformers", "tokenizer.model"), ("mistral_common", "tekken.json")])
def test_a_client_only_install_says_what_to_install(tmp_path, monkeypatch, package, file):
    (tmp_path / file).write_text("{}")
    for name in [n for n in sys.modules if n == package or n.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PlanError, match=rf"{package}.*not installed.*\[cpu\]"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.model", "tekken.json", "vocab.json", "tokenizer.json"])
def test_damaged_files_are_errors_of_ours(tmp_path, file):
    rng = random.Random(1)
    for content in (b"", b"{}", b"[]", b"null", bytes(rng.randrange(256) for _ in range(500)), b'{"config": 5}'):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(PlanError, match=tmp_path.name):
            load_tokenizer(tmp_path)


def test_an_empty_folder_names_what_it_looked_for(tmp_path):
    with pytest.raises(PlanError, match=r"no tokenizer in this folder; looked for tokenizer.json, tekken.json"):
        load_tokenizer(tmp_path)


def test_code_beside_a_model_is_never_run(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(PlanError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
