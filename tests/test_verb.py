"""Help, defaults from the environment and from harness.toml, quiet and verbose runs, and the line of a run."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from conftest import StartServer, harness
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness.cli import SECTIONS, cli, main
from harness.cli.verb import COMMON, Group, read_defaults
from harness.console import LoadProgress
from harness.errors import UsageError
from harness.terminal import Verbosity, set_verbosity

TRACE = Path(__file__).resolve().parent.parent / "scenarios" / "traces" / "azure-conv-2023.csv"
RESERVED = {"api-key", "cache", "tiers", "models", "interpreted", "group", "peers", "complete"}
"""Variables HARNESS_* that are no option's default."""


def leaves(group: click.Group) -> list[click.Command]:
    verbs = [group.get_command(None, name) for name in group.commands]  # type: ignore[arg-type]
    return [leaf for verb in verbs for leaf in (leaves(verb) if isinstance(verb, Group) else [verb])]


def test_a_long_verb_shows_a_dozen_options_until_asked() -> None:
    short, full = (CliRunner().invoke(cli, ["replay", word]).output for word in ("-h", "--help-all"))
    shown = [line for line in short.splitlines() if line.startswith(("  --", "  -o, "))]
    assert len(shown) == len(COMMON) + 1 == 13, "and --help-all"
    assert "more options: cli replay --help-all" in short
    for heading in ("Trace:", "Plan:", "Servers:", "Load:", "Report:"):
        assert f"\n{heading}\n" in full
        assert f"\n{heading}\n" not in short
    assert "--burstiness" in full
    assert "--burstiness" not in short


def test_help_of_a_verb() -> None:
    run = CliRunner().invoke
    assert run(cli, ["help"]).output == run(cli, ["--help"]).output
    assert run(cli, ["help", "replay"]).output == run(cli, ["replay", "--help-all"]).output
    assert "Usage: cli trace inspect" in run(cli, ["help", "trace", "inspect"]).output
    done = harness("help", "replya")
    assert done.returncode == 2
    assert re.search(r"No such command 'replya'\. \(?Did you mean .*'replay'", done.stderr)


def test_version_and_module() -> None:
    assert harness("-V").stdout.startswith("harness, version ")


def test_no_option_has_the_variable_of_something_else() -> None:
    found = {str(p.envvar) for verb in leaves(cli) for p in verb.params if isinstance(p, click.Option)}
    assert "HARNESS_MODEL" in found
    assert not found & {f"HARNESS_{name.replace('-', '_').upper()}" for name in RESERVED}


def test_the_list_of_verbs_is_what_the_verbs_say() -> None:
    lazy = {name: verb for verbs in SECTIONS.values() for name, verb in verbs.items()}
    assert lazy.keys() == cli.commands.keys() - {"help"}
    for name in lazy:
        assert cli.get_command(None, name).name == name  # type: ignore[arg-type, union-attr]


MODULES = "print(*sorted(m for m in sys.modules if m.startswith(('harness.cli.', 'analysis.', 'cluster.'))))"


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["-h"], {}),
        (["help"], {}),
        (["-V"], {}),
        (["nonsense"], {}),
        ([], {"_HARNESS_COMPLETE": "bash_complete", "COMP_WORDS": "harness re", "COMP_CWORD": "1"}),
    ],
    ids=str,
)
def test_no_verb_is_imported_before_it_is_asked_for(words: list[str], environment: dict[str, str]) -> None:
    code = f"import atexit, sys; from harness.cli import main; atexit.register(lambda: {MODULES}); main({words})"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    *said, modules = done.stdout.splitlines()
    assert set(modules.split()) == {"harness.cli.verb"}, done.stderr
    if environment:
        assert said == ["plain,replay", "plain,report"]


def test_a_verb_is_imported_alone() -> None:
    code = f"import atexit, sys; from harness.cli import main; atexit.register(lambda: {MODULES}); main(['stop', '-h'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = {"harness.cli.verb", "harness.cli.output", "harness.cli.machines"}
    assert {m for m in done.stdout.splitlines()[-1].split() if m.startswith("harness.cli.")} == own


def test_the_help_of_no_verb_waits_for_what_the_verb_does() -> None:
    """Imports of a tenth of a second and more: arrays, traces, what follows a run to S3, the packages above."""
    code = """import sys
from harness.cli import cli
assert len([cli.get_command(None, name) for name in cli.commands]) > 15
slow = ('numpy', 'pyarrow', 'msgspec', 'boto3', 'ray', 'jinja2', 'analysis', 'cluster', 'scenarios', 'harness.trace',
        'harness.sweep', 'harness.store.copies', 'harness.record.manifest', 'harness.plan.file', 'harness.cli.runner')
print(*sorted(name for name in sys.modules if name in slow or name.startswith(tuple(f'{each}.' for each in slow))))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def defaults(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "harness.toml"
    path.write_text(text)
    return read_defaults(cli, path)


def test_defaults_from_a_file(tmp_path: Path) -> None:
    text = 'model = "a"\nbase-url = ["http://a/v1", "http://b/v1"]\n[replay]\nlimit = 5\nslo = { ttft = "2s" }\n'
    text += "no_stream = true\n"
    found = defaults(tmp_path, text)
    assert found["replay"] == {
        "model": "a", "base_urls": ["http://a/v1", "http://b/v1"], "limit": "5", "slo": "ttft=2s", "no_stream": True,
    }  # fmt: skip
    assert found["serve"]["model"] == "a"
    assert "slo" not in found["run"]
    assert read_defaults(cli, tmp_path / "none.toml") == {}
    with pytest.raises(UsageError, match="modle: no verb has such an option; did you mean model"):
        defaults(tmp_path, "modle = 1")


def test_the_environment_is_heard_over_the_file_and_not_over_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*words: str) -> dict[str, Any]:
        with cli.make_context("harness", ["replay", "t", *words]) as ctx:
            ctx.default_map = {"replay": {"model": "a", "limit": "5"}}
            verb = cli.get_command(ctx, "replay")
            assert verb is not None
            return verb.make_context("replay", ["t", *words], parent=ctx).params

    monkeypatch.setenv("HARNESS_MODEL", "b")
    monkeypatch.setenv("HARNESS_BASE_URL", "http://a/v1 http://b/v1")
    found = asked("--label", "l")
    assert (found["model"], found["limit"], found["base_urls"]) == ("b", 5, ("http://a/v1", "http://b/v1"))
    assert asked("--model", "c")["model"] == "c"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle = 1", "modle: no verb has such an option; did you mean model"),
        ("[replya]\nlimit = 1", "replya: no such verb; did you mean replay"),
        ("[replay]\nspeeed = 1", "speeed: harness replay has no such option; did you mean speed"),
        ("[replay", "not a TOML file"),
        ("a = " + "[" * 5000, "not a TOML file"),
        ("#" * (1 << 21), "larger than 1 MiB"),
    ],
)
def test_a_wrong_file_of_defaults(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as e:
        defaults(tmp_path, text)
    assert words in str(e.value)
    assert "harness.toml" in str(e.value)


def test_the_command_line_wins_and_verbose_says_where_values_come_from(
    tmp_path: Path, fake_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = fake_server("--ttft", "0.01", "--itl", "0.001")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_LIMIT", "31")
    (tmp_path / "harness.toml").write_text(f'limit = 40\nconcurrency = 9\nbase-url = "{server.url}"\n')
    replay = [sys.executable, "-m", "harness", "replay", str(TRACE), "--concurrency", "8"]
    done = subprocess.run([*replay, "-v"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "--limit = 31 (from HARNESS_LIMIT)" in done.stderr
    assert "(from harness.toml)" in done.stderr
    assert "31 of 31 requests" in done.stdout
    assert "closed loop, 8 in flight" in done.stdout
    quiet = subprocess.run([*replay, "-q"], capture_output=True, text=True, timeout=100, check=False)
    assert quiet.stderr == ""
    assert "31 of 31 requests" in quiet.stdout


def test_verbose_shows_the_traceback_of_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.cli.machines.examine", lambda: {}["x"])
    monkeypatch.setattr("harness.cli.forgo_pandas", lambda: None)  # our process is not only its
    with pytest.raises(SystemExit):
        main(["doctor"])
    with pytest.raises(KeyError):
        main(["doctor", "-v"])
    set_verbosity(Verbosity.NORMAL)


def progress(width: int = 80, **options: Any) -> LoadProgress:
    return LoadProgress(Console(file=io.StringIO(), width=width), total=60, span_s=None, **options)


def test_the_line_of_a_run_shows_what_the_slo_is_about() -> None:
    counts: dict[str, object] = {
        "done": 16, "in_flight": 8, "failed": 1, "ttft_s": [0.1, 0.2, 0.3], "tpot_s": [0.09], "e2e_s": [3.0],
    }  # fmt: skip
    plain = progress()
    plain.update(counts)
    assert "16/60" in plain.line(counts, 0.0, 80)
    assert "ttft p50 200 ms" in plain.line(counts, 0.0, 80)
    promised = progress(slo={"ttft_p99": 2.0, "tpot": 0.1}, attain=0.95)
    promised.update(counts)
    assert "tpot p95 90 ms of 100 ms" in promised.line(counts, 0.0, 80), "it is nearer to its limit than ttft"


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.floats(0, 1e5), st.integers(20, 200))
def test_the_line_of_a_run_fits(done: int, in_flight: int, ttft_s: float, width: int) -> None:
    counts: dict[str, object] = {"done": done, "in_flight": in_flight, "failed": done // 2, "ttft_s": [ttft_s]}
    shown = progress(slo={"ttft_p99": 2.0})
    shown.update(counts)
    text = shown.line(counts, 1.0, width)
    assert len(text) <= width
    assert str(done) in text
