"""A prefix cache that knew the prompts before the run: said, and neither priced nor compared."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from run_files import SPEC, good, write_run

from harness import state_dir
from harness.analysis.capacity.serving_config import serving_configs
from harness.analysis.compare.comparable import refusals
from harness.analysis.rows.read import read_run
from harness.analysis.summary import Summary, summarise
from harness.cli.runner.seen import note_sent, seen_before
from harness.record.manifest import RunDir, read_manifest, write_manifest

N, TOKENS = 40, 64


def run(path, *, cached=0, shared=0, ids=True, **manifest) -> Summary:
    """40 prompts of 64 tokens, of which the first ``shared`` are the same in all; ``cached``: by usage, of each."""
    own = [range(1000 * (k + 1), 1000 * (k + 1) + TOKENS - shared) for k in range(N)]
    plan = {
        k: {"input_tokens": TOKENS, "prompt_token_ids": [*range(shared), *own[k]] if ids else [1]} for k in range(N)
    }
    rows = [replace(good(k, k * 50_000_000), input_tokens=TOKENS, cached_tokens=cached) for k in range(N)]
    write_run(path, rows, plan=plan, **{"spec": replace(SPEC, slo={"ttft": 1.0}), **manifest})
    return summarise(read_run(path))


def cache_check(s: Summary):
    (found,) = [c for c in s.checks if c.name == "prefix_cache"]
    return found


def test_more_than_a_cold_cache_finds_has_no_price(tmp_path):
    """96 % of prompts that share nothing: they were there before the run."""
    warm, cold = run(tmp_path / "warm", cached=62), run(tmp_path / "cold")
    assert cache_check(warm).ok is False and "96.9% of input tokens found, 0.0%" in cache_check(warm).observed
    assert warm.verdict == "VALID", "a limit: all of it was measured"
    assert warm.cost.usd_per_1m_total.value is None and warm.cost.reason is not None
    assert cache_check(cold).ok is True and cold.cost.usd_per_1m_total.value is not None
    assert any("96.9%" in reason for reason in refusals([cold], [warm])), "who goes second does not win"
    assert not any("input tokens found" in reason for reason in refusals([cold], [cold]))
    (system,) = serving_configs([cold, warm])
    assert system.runs == (cold.run,) and any("warm prefix cache" in note for note in system.notes)


@pytest.mark.parametrize(("shared", "cached", "ok"), [(32, 31, True), (32, 48, True), (32, 56, False)])
def test_what_prompts_share_is_found_by_a_cold_cache_too(tmp_path, shared, cached, ok):
    """A url says no block size: up to a block of 16 more of each prompt is allowed."""
    s = run(tmp_path / "run", shared=shared, cached=cached, engine="url")
    assert cache_check(s).ok is ok


def test_prompts_whose_tokens_are_the_servers_are_not_checked(tmp_path):
    s = run(tmp_path / "run", cached=62, ids=False)
    assert cache_check(s).ok is None and s.cost.usd_per_1m_total.value is not None


def text_run(path, texts, *, tokens, cached, chat=False) -> Summary:
    """Prompts of the trace's own text, of which the server counts ``tokens`` each and finds ``cached``."""
    named = [{"messages": text, "prompt_text": None} if chat else {"prompt_text": text} for text in texts]
    plan = {k: {"input_tokens": None, "prompt_token_ids": None, **fields} for k, fields in enumerate(named)}
    rows = [replace(good(k, k * 50_000_000), input_tokens=tokens, cached_tokens=cached) for k in range(len(texts))]
    spec = replace(SPEC, endpoint="chat" if chat else "completions")
    write_run(path, rows, plan=plan, spec=spec, engine="url", answers=[])
    return summarise(read_run(path))


def words(k: int, n: int) -> str:
    return " ".join(f"w{k}x{i}" for i in range(n))


SHARED = words(0, 500)


@pytest.mark.parametrize(
    ("texts", "cached", "ok"),
    [
        ([words(k, 1000) for k in range(N)], 0, True),
        ([words(k, 1000) for k in range(N)], 100, False),  # nothing is shared
        ([f"{SHARED} {words(k + 1, 500)}" for k in range(N)], 490, True),
        ([f"{SHARED} {words(k + 1, 500)}" for k in range(N)], 600, True),  # it may be denser than the rest
        ([f"{SHARED} {words(k + 1, 500)}" for k in range(N)], 960, False),
        ([words(0, 1000)] * N, 990, True),  # one prompt for all
    ],
)
def test_texts_share_what_their_bytes_share(tmp_path, texts, cached, ok):
    s = text_run(tmp_path / "run", texts, tokens=1000, cached=cached)
    said = cache_check(s)
    assert said.ok is ok and s.verdict == "VALID"
    assert (s.cost.usd_per_1m_total.value is None) is (not ok)
    if not ok:
        assert "by the bytes of their text" in said.observed
        assert "--seed" not in (said.advice or "--seed"), "no seed changes texts of the trace"


def test_a_chat_shares_its_turns_and_a_template_no_longer_than_its_prompts_leave_room_for(tmp_path):
    def chat(*contents: str) -> str:
        roles = ("user", "assistant")
        return json.dumps([{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)])

    turns = [chat(*(words(k, 100) for k in range(n))) for n in range(1, 12, 2)]
    assert cache_check(text_run(tmp_path / "turns", turns, tokens=620, cached=520, chat=True)).ok
    alone = [chat(words(k, 100)) for k in range(N)]
    for tokens, cached, ok in ((130, 28, True), (130, 96, False), (100, 28, False)):
        s = text_run(tmp_path / f"{tokens}-{cached}", alone, tokens=tokens, cached=cached, chat=True)
        assert cache_check(s).ok is ok, (tokens, cached, cache_check(s).observed)


def test_prompts_made_up_and_prompts_of_text_add_up(tmp_path):
    """Half of the input is 20 prompts of the trace's text, which share nothing; the others are one prompt of ids."""
    plan = {k: {"input_tokens": None, "prompt_token_ids": None, "prompt_text": words(k, 1000)} for k in range(20)}
    plan |= {k: {"input_tokens": 1000, "prompt_token_ids": [*range(1000)]} for k in range(20, N)}
    for cached, ok in ((450, True), (700, False)):
        rows = [replace(good(k, k * 50_000_000), input_tokens=1000, cached_tokens=cached) for k in range(N)]
        path = write_run(tmp_path / str(cached), rows, plan=plan, engine="url", answers=[])
        assert cache_check(summarise(read_run(path))).ok is ok


URL = "https://user:secret@gpu-1:8000/v1?key=secret"


def asked(path, *, seed=0, tokenizer="t", urls=("http://127.0.0.1:1/v1",), **facts):
    """A run that is about to begin, or (start_unix_ns) has begun."""
    run(path, engine="url", **facts)
    manifest = read_manifest(path)
    plan = replace(manifest.plan, seed=seed, tokenizer=tokenizer)
    manifest = replace(manifest, plan=plan, spec=replace(manifest.spec, base_urls=[*urls]))
    write_manifest(RunDir(path), manifest)
    return RunDir(path), manifest


def test_a_server_that_had_these_prompts_is_named_before_the_start(tmp_path):
    _, first = asked(tmp_path / "a")
    _, manifest = asked(tmp_path / "b")
    assert seen_before(manifest) is None
    note_sent(first)
    said = seen_before(manifest)
    assert said is not None and "--seed 1" in said
    assert seen_before(replace(manifest, plan=replace(manifest.plan, seed=7))) is None
    elsewhere = replace(manifest, spec=replace(manifest.spec, base_urls=["http://127.0.0.1:9/v1"]))
    assert seen_before(elsewhere) is None
    started = replace(manifest, engine="vllm")
    assert seen_before(started) is None, "a server that was started for the run has an empty cache"


def test_it_is_named_wherever_the_earlier_run_was_put(tmp_path):
    _, first = asked(tmp_path / "here" / "a", urls=[URL, "http://gpu-2/v1"])
    note_sent(first, now_s=1_767_225_600)
    _, second = asked(tmp_path / "there" / "b", urls=["https://GPU-1:8000/v1"])
    said = seen_before(second)
    assert said is not None and "(2026-01-01 00:00 UTC)" in said and "--seed 1" in said
    for other in (
        replace(second, plan=replace(second.plan, seed=1)), replace(second, engine="vllm"),
        replace(second, spec=replace(second.spec, base_urls=["https://gpu-1:8001/v1"])),
    ):  # fmt: skip
        assert seen_before(other) is None


def test_no_seed_makes_texts_of_the_trace_new(tmp_path):
    _, first = asked(tmp_path / "here" / "a", tokenizer=None)
    note_sent(first)
    _, second = asked(tmp_path / "there" / "b", tokenizer=None, seed=5)
    said = seen_before(second)
    assert said is not None and "texts of the same trace" in said and "no --seed changes them" in said


def test_what_was_sent_is_kept_privately_without_secrets_and_within_bounds(tmp_path, monkeypatch):
    file = state_dir() / "seen.jsonl"
    for seed in range(6):
        _, manifest = asked(tmp_path / "a", seed=seed, urls=[URL])
        note_sent(manifest, now_s=seed)
    assert [json.loads(line)["at"] for line in file.read_text().splitlines()] == [*range(6)]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "secret" not in file.read_text() and "gpu-1" not in file.read_text()
    file.write_bytes(b'{"address": 3}\n[[[\n\xff\n')
    assert seen_before(manifest) is None
    note_sent(manifest, now_s=9)
    assert "1970-01-01" in str(seen_before(manifest)), "what cannot be read hides nothing else"
    before = file.read_bytes()
    note_sent(replace(manifest, engine="vllm"))
    assert file.read_bytes() == before
    monkeypatch.setattr("harness.cli.runner.seen.MOST_BYTES", len(before) - 1)
    note_sent(manifest, now_s=10)
    assert [json.loads(line)["at"] for line in file.read_text().splitlines()] == [10]


def test_runs_that_begin_together_lose_nothing(tmp_path):
    _, manifest = asked(tmp_path / "a")
    every = [replace(manifest, plan=replace(manifest.plan, seed=seed)) for seed in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(note_sent, every))
    assert all(seen_before(one) for one in every)


def test_a_state_folder_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch):
    _, manifest = asked(tmp_path / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    note_sent(manifest)
    assert seen_before(manifest) is None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    state_dir().mkdir(parents=True)
    os.mkfifo(state_dir() / "seen.jsonl")
    note_sent(manifest)
    assert seen_before(manifest) is None
