"""Prompts have exactly the length asked for, depend on seed and key alone, and share what the trace says they share."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from harness.errors import PlanError
from harness.plan.prompts import MIN_IDS, Vocabulary


def words(n: int) -> list[str]:
    rng = random.Random(4)
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(n)})


def corpus() -> list[str]:
    rng = random.Random(5)
    return [" ".join(rng.choices(words(500), k=40)) for _ in range(200)]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|bos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.enable_truncation(8)  # a saved setting that would cut every prompt
    tokenizer.enable_padding(length=64)
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2: no pre-tokenizer, the normalizer writes a mark for each space and one in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def wordpiece() -> Tokenizer:
    """As BERT."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "##ba", "##x", *words(600)])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


def merging() -> Tokenizer:
    """Merges across words: about one pair of random words in a hundred becomes one token."""
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz▁")}
    merges = []
    for left in "abcdefghijklmnopqrstuvwxyz":
        vocab["▁" + left] = len(vocab)
        merges.append(("▁", left))
    for left in "abcdefghijklmnop":
        for right in "abcdefghijklmnopqrstuvwxyz":
            vocab[f"▁{left}{right}"] = len(vocab)
            merges.append((f"▁{left}", right))
    for left in "abcdefgh":
        for right in "abcdefghijklmnopqrstuvwxyz":
            for next_word in ("▁ia", "▁ib", "▁jc", "▁jd", "▁ke", "▁kf", "▁lg", "▁lh"):
                vocab[f"▁{left}{right}{next_word}"] = len(vocab)
                merges.append((f"▁{left}{right}", next_word))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def characters() -> Tokenizer:
    """One token per character: no words at all."""
    vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


KINDS = {f.__name__: f for f in (byte_level, metaspace, wordpiece, merging, characters)}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, make in KINDS.items():
        (folder / name).mkdir()
        make().save(str(folder / name / "tokenizer.json"))
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def vocabularies(files) -> dict[str, Vocabulary]:
    return {name: Vocabulary.from_tokenizer(path) for name, path in files.items()}


def encode(files: dict[str, Path], kind: str, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(files[kind] / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer.encode(text, add_special_tokens=False).ids


PLAIN = Vocabulary.from_ids(range(100, 5000))


# --- token ids -------------------------------------------------------------------------------------------------------


def splitmix64(state: int) -> int:
    """Straight from the paper, one number at a time."""
    mask = 2**64 - 1
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def reference(start: bytes, n: int) -> list[int]:
    first = int.from_bytes(hashlib.blake2b(start, digest_size=8).digest(), "little")
    draws = [splitmix64((first + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(n)]
    return [100 + (draw >> 32) * 4900 // 2**32 for draw in draws]


def u64(*values: int) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def test_golden_ids():
    # Prompts of an old plan's seed must come out the same for ever, on any machine and with any numpy.
    assert PLAIN.token_ids(4, 0).tolist() == [4701, 4787, 2697, 118]
    assert PLAIN.token_ids(50, 9, seed=3).tolist() == reference(b"request" + u64(3, 9), 50)
    blocks = reference(b"prefix" + u64(1, 5), 20) + reference(b"prefix" + u64(1, 5, 6), 20)
    assert PLAIN.token_ids(37, 7, seed=1, prefix_ids=[5, 6], block_tokens=20).tolist() == blocks[:37]


@given(n=st.integers(1, 3000), key=st.integers(0, 2**40), seed=st.integers(0, 2**63))
def test_exact_length_pure_and_inside_the_vocabulary(n, key, seed):
    ids = PLAIN.token_ids(n, key, seed=seed)
    assert ids.dtype == np.int32
    assert len(ids) == n
    assert 100 <= ids.min() <= ids.max() < 5000
    assert ids.tolist() == PLAIN.token_ids(n, key, seed=seed).tolist()
    assert ids.tolist() == PLAIN.token_ids(n + 7, key, seed=seed)[:n].tolist()


def test_keys_and_seeds_share_no_leading_block():
    starts = {tuple(PLAIN.token_ids(16, key, seed=seed).tolist()) for key in range(300) for seed in range(10)}
    assert len(starts) == 3000


def test_draws_are_even():
    counts = np.bincount(PLAIN.token_ids(490_000, 3), minlength=5000)[100:]
    # 4,900 bins of mean 100: chi-square has mean 4,899 and deviation 99.
    assert abs(((counts - 100.0) ** 2 / 100).sum() - 4899) < 6 * 99


ids_lists = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(a=ids_lists, b=ids_lists, block=st.integers(16, 40), cut=st.integers(0, 15), seed=st.integers(0, 5))
def test_equal_leading_ids_are_equal_leading_tokens_and_nothing_else_is(a, b, block, cut, seed):
    one = PLAIN.token_ids(len(a) * block - cut, 1, seed=seed, prefix_ids=a, block_tokens=block)
    two = PLAIN.token_ids(len(b) * block - cut, 2, seed=seed, prefix_ids=b, block_tokens=block)
    assert len(one) == len(a) * block - cut
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    common = min(shared * block, len(one), len(two))
    assert one[:common].tolist() == two[:common].tolist()
    for i in range(shared, min(len(a), len(b))):  # also where a later id is equal again: ids are chained
        left, right = one[i * block : (i + 1) * block], two[i * block : (i + 1) * block]
        if min(len(left), len(right)) >= 4:
            assert left[:4].tolist() != right[:4].tolist()


def test_prefix_blocks_differ_between_seeds():
    one, two = (PLAIN.token_ids(64, 1, seed=s, prefix_ids=[1, 2], block_tokens=32) for s in (0, 1))
    assert (one == two).mean() < 0.1


def test_ids_from_a_server():
    assert len(Vocabulary.from_ids([5, 5, *range(20)])) == 20
    assert Vocabulary.from_ids(range(20)).name == Vocabulary.from_ids(reversed(range(20))).name
    assert Vocabulary.from_ids(range(20)).name != Vocabulary.from_ids(range(21)).name
    assert Vocabulary.from_ids(range(20), name="here").name.startswith("here sha256:")
    for bad in ([], range(MIN_IDS - 1), [-1, *range(20)], [2**31, *range(20)]):
        with pytest.raises(PlanError):
            Vocabulary.from_ids(bad)
    with pytest.raises(PlanError, match="need a tokenizer"):
        PLAIN.texts([PLAIN.token_ids(3, 0)])


# --- tokenizers and text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_added_tokens_are_left_out(vocabularies, files, kind):
    tokenizer = Tokenizer.from_file(str(files[kind] / "tokenizer.json"))
    drawn = set(vocabularies[kind].token_ids(100_000, 0).tolist())
    assert drawn.isdisjoint(tokenizer.get_added_tokens_decoder())
    assert "\ufffd" not in tokenizer.decode(sorted(drawn))


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "wordpiece"])
def test_text_encodes_to_the_very_ids(vocabularies, files, kind):
    vocabulary = vocabularies[kind]
    prompts = [vocabulary.token_ids(n, n) for n in (1, 2, 3, 17, 500, 1000)]
    for ids, text in zip(prompts, vocabulary.texts(prompts), strict=True):
        assert encode(files, kind, text) == ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_text_has_the_exact_length_whatever_the_tokenizer(vocabularies, files, kind):
    vocabulary = vocabularies[kind]
    prompts = [vocabulary.token_ids(n, n, seed=3) for n in range(1, 120)]
    texts = vocabulary.texts(prompts)
    assert [len(encode(files, kind, text)) for text in texts] == list(range(1, 120))
    assert texts == vocabulary.texts(prompts)
    assert vocabulary.texts([prompts[50]]) == [texts[50]]  # alone or in a batch


def test_merging_across_words_was_really_repaired_and_keeps_the_shared_text(vocabularies, files):
    vocabulary = vocabularies["merging"]
    prompts = [vocabulary.token_ids(600, key, prefix_ids=[1, 2, 3 + key], block_tokens=200) for key in range(2)]
    tokenizer = Tokenizer.from_file(str(files["merging"] / "tokenizer.json"))
    unrepaired = vocabulary.render(prompts)
    assert any(len(tokenizer.encode(text)) != 600 for text in unrepaired), "this tokenizer must need the repair"
    one, two = vocabulary.texts(prompts)
    shared = vocabulary.render([prompts[0][:400]])[0]
    assert one.startswith(shared)
    assert two.startswith(shared)
    assert one != two


def test_words_are_proved_apart_only_where_the_tokenizer_cuts_them_apart(vocabularies, files):
    assert {kind: v.apart for kind, v in vocabularies.items()} == {
        "byte_level": True, "metaspace": True, "wordpiece": True, "merging": False, "characters": False,
    }  # fmt: skip
    # Then one text in 64 is encoded; all must be as long as asked all the same.
    for kind in ("byte_level", "metaspace", "wordpiece"):
        prompts = [vocabularies[kind].token_ids(40, key, seed=9) for key in range(300)]
        texts = vocabularies[kind].texts(prompts)
        assert [encode(files, kind, text) for text in texts] == [ids.tolist() for ids in prompts]


def test_a_wrong_proof_is_noticed(vocabularies, monkeypatch):
    vocabulary = vocabularies["merging"]
    monkeypatch.setattr(vocabulary, "apart", True)
    prompts = [vocabulary.token_ids(600, key, seed=2) for key in range(128)]
    assert {len(ids) for ids in vocabulary.tokenizer.encode(vocabulary.texts(prompts))} == {600}


def test_impossible_text_is_an_error(tmp_path):
    # Every text is one token here: no text of two exists.
    vocab = {f"w{chr(97 + i)}": i for i in range(20)} | {"[UNK]": 20}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.from_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(PlanError, match="no text of exactly 2 tokens"):
        vocabulary.texts([vocabulary.token_ids(2, 0)])


def test_name_follows_the_content(files, vocabularies, tmp_path):
    copy = tmp_path / "byte_level"
    copy.mkdir()
    raw = (files["byte_level"] / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(raw)
    assert Vocabulary.from_tokenizer(copy).name == vocabularies["byte_level"].name
    (copy / "tokenizer.json").write_bytes(raw + b"\n")
    assert Vocabulary.from_tokenizer(copy).name != vocabularies["byte_level"].name


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\0", b'{"model": 5}'])
def test_not_a_tokenizer(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(PlanError, match="tokenizer"):
        Vocabulary.from_tokenizer(tmp_path)
