"""The load is the same each time; made-up prompts are new unless a seed is stated; a printed seed gives them again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conftest import StartServer, harness
from hypothesis import given
from hypothesis import strategies as st

from harness.plan.file import plan_sha256, read_plan_columns, read_plan_info
from harness.plan.spec import drawn_seed, load_seed, with_load
from harness.sweep.spec import Loads, SweepSpec, make_points, seeded

LENGTHS = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "azure-conv-2023.csv"
DRAWN = ("--arrivals", "gamma", "--burstiness", "0.5", "--rate", "9", "--cancel", "20%@2s", "--limit", "40")


@given(st.integers(0, 2**32 - 1))
def test_a_drawn_seed_sends_the_load_of_seed_0_and_can_take_another(load: int) -> None:
    seed = drawn_seed()
    assert load_seed(seed) == 0
    assert 2**32 <= seed < 2**53
    assert load_seed(with_load(seed, load)) == load
    assert with_load(seed, load) >> 32 == seed >> 32
    assert load_seed(load) == load == with_load(7, load)
    assert load_seed(-3) == -3


def test_prompts_are_new_and_the_load_is_not(fake_server: StartServer, tmp_path: Path) -> None:
    server = fake_server()

    def plan(name: str, *more: str) -> tuple[Path, str]:
        out = tmp_path / name
        done = harness("plan", LENGTHS, "--base-url", server.url, "-o", out, *DRAWN, *more)
        assert done.returncode == 0, done.stderr
        return out, done.stderr

    first, said = plan("a.arrow")
    second, _ = plan("b.arrow")
    seed = read_plan_info(first).seed
    assert f"seed {seed}, drawn" in said
    assert seed != read_plan_info(second).seed
    load = ["scheduled_ns", "input_tokens", "output_tokens", "cancel_after_ns"]
    assert read_plan_columns(first, load) == read_plan_columns(second, load)
    prompts = [read_plan_columns(p, ["prompt_token_ids"])["prompt_token_ids"].to_pylist() for p in (first, second)]
    assert not any(a == b for a, b in zip(*prompts, strict=True))
    again, said = plan("c.arrow", "--seed", str(seed))
    assert plan_sha256(again) == plan_sha256(first), "bit for bit"
    assert "makes them again" not in said
    assert read_plan_columns(plan("d.arrow", "--seed", "0")[0], load) == read_plan_columns(first, load)


def test_two_sweeps_share_the_load_of_each_point_and_no_prompt() -> None:
    spec = SweepSpec(trace="t", loads=Loads(concurrency=[1, 2]), models=["m"], tiers=["a", "b"], repeats=2)
    one, two = (make_points(seeded(spec)) for _ in range(2))
    assert [load_seed(p.seed) for p in one] == [p.seed for p in make_points(replace(spec, seed=0))]
    assert [(p.name, load_seed(p.seed)) for p in one] == [(p.name, load_seed(p.seed)) for p in two]
    assert not {p.seed for p in one} & {p.seed for p in two}
    assert len({p.seed for p in one}) == 4, "loads x repeats: equal on both tiers"
    begun = seeded(spec)
    assert seeded(spec, begun) == begun
    assert seeded(replace(spec, seed=5), begun).seed == 5
