"""Words of servers, files and registries reach a terminal as plain characters, in sentences of bounded length."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, harness
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from run_files import SPEC, good, write_run

from harness.console import Console
from harness.errors import sentence
from harness.terminal import MOST_CHARS, cut, printable

EVIL = "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]52;c;Zm9v\x1b\\\x9b2J\x08\r\x00\u202egpj.exe\u2066\ud800\U000e0041"
ORDER = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert printable(EVIL) == "redtitle"[:3] + r"\u009b2J\u0008\u000d\u0000\u202egpj.exe\u2066\ud800\udb40\udc41"
    assert printable("Größe 模型 😀 ab\tc\n") == "Größe 模型 😀 ab\tc\n"
    assert json.loads(printable(json.dumps({"name": EVIL[30:]}, ensure_ascii=False))) == {"name": EVIL[30:]}


@given(st.text())
def test_no_text_has_orders_left(text: str) -> None:
    assert not ORDER.search(printable(text).replace("\t", ""))


def test_a_console_keeps_its_own_colours_only() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200, color_system="standard")
    table = Table("model")
    table.add_row(EVIL)
    console.print(table)
    console.print(EVIL, style="bold", markup=False)
    left = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert not ORDER.search(left) and "gpj.exe" in left
    assert "\x1b[31m" not in out.getvalue() and "\x1b[1m" in out.getvalue()


def test_every_console_is_ours() -> None:
    made = re.compile(r"from rich(?:\.console)? import .*\b(?:Console|print)\b")
    found = [
        path.name for folder in ("harness", "cluster", "scenarios") for path in (ROOT / folder).rglob("*.py")
        if made.search(path.read_text()) and path.name != "console.py"
    ]  # fmt: skip
    assert found == []


def test_messages_are_cut() -> None:
    assert cut("a" * MOST_CHARS) == "a" * MOST_CHARS
    assert cut("a" * 10**6) == "a" * MOST_CHARS + " ... (996,000 more characters)"


@pytest.mark.parametrize("format_", ["text", "md", "json"])
def test_the_report_of_a_run_of_strangers(tmp_path: Path, format_: str) -> None:
    evil = EVIL.replace("\ud800", "")
    spec = replace(SPEC, model=evil, base_urls=[f"http://{evil}/v1"])
    path = write_run(tmp_path / f"run{evil[:5]}", [good(i) for i in range(40)], spec=spec, label=evil)
    done = harness("report", path, "--format", format_)
    assert done.returncode in (0, 3, 5), done.stderr
    assert not ORDER.search(done.stdout) and not ORDER.search(done.stderr)
    assert "Traceback" not in done.stderr
    if format_ == "json":
        json.loads(done.stdout)


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"tr\xffce\x1b[2J.jsonl")
    trace = tmp_path / name
    trace.write_text(
        '{"arrival_s": 0, "input_tokens": 4, "output_tokens": 2, "messages": [{"role": "user", "content": "a"}]}\n'
    )
    for args in (["trace", "inspect", trace], ["trace", "inspect", trace, "--format", "json"],
                 ["plan", trace, "-o", tmp_path / "p.arrow"], ["replay", trace, "--base-url", "http://127.0.0.1:1"],
                 ["report", tmp_path / name]):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "harness", *args], cwd=ROOT, capture_output=True, timeout=60, check=False
        )
        said = (done.stdout + done.stderr).decode()
        assert not ORDER.search(said) and "Traceback" not in said and "HARNESS_TRACEBACK" not in said, said
        assert done.returncode in (0, 1), said


def test_a_terminal_of_another_encoding_loses_no_figure(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [good(i) for i in range(40)], label="模型")
    done = harness("report", path, PYTHONIOENCODING="ascii")
    assert done.returncode in (0, 3, 5) and "Traceback" not in done.stderr
    assert "VALID" in done.stdout


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(24, "Too many open files", "x"), "x: Too many open files: raise the limit of open files"),
        (OSError(28, "No space left on device"), "free some space"),
        (RecursionError("maximum"), "nested too deeply"),
        (RuntimeError("can't start new thread"), "RuntimeError: can't start new thread: raise the limits of threads"),
        (ImportError("_x.so: failed to map segment from shared object"), "free some memory"),
        (OSError("libx.so: failed to map segment from shared object"), "free some memory"),
        (OSError(2, "No such file or directory", "failed to map segment"), "failed to map segment: No such file"),
        (ValueError("row 3: failed to map segment; can't start new thread"), "HARNESS_TRACEBACK=1"),
        (OSError(), "OSError (unknown place)"),
        (KeyError("x\ny"), "KeyError: 'x"),
    ],
)
def test_an_error_that_nobody_foresaw_is_a_sentence(error: Exception, words: str) -> None:
    said = sentence(error)
    assert words in said and "\n" not in said


def test_words_of_others_are_looked_for_where_there_is_no_number_alone() -> None:
    """They choose advice. An error with a number of its own, or of another kind, is not about what its words are."""
    for error in (OSError(2, "failed to map segment"), KeyError("can't start new thread"), RuntimeError("map segment")):
        assert "ulimit" not in sentence(error)


@pytest.mark.parametrize(("limit", "value"), [(resource.RLIMIT_NOFILE, 24), (resource.RLIMIT_AS, 300 << 20)])
def test_limits_of_the_machine_are_a_sentence(tmp_path: Path, limit: int, value: int) -> None:
    path = write_run(tmp_path / "run", [good(i) for i in range(40)])
    done = subprocess.run(
        [sys.executable, "-m", "harness", "report", path], cwd=ROOT, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)), check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode >= 0


def test_a_terminal_that_hangs_up_ends_the_verb_in_order(tmp_path: Path) -> None:
    """The question goes on, the terminal is gone: exit 130, nothing on the lost terminal fails."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        trace = tmp_path / "t.jsonl"
        trace.write_text('{"arrival_s": 0, "input_tokens": 1, "output_tokens": 1}\n')
        main_end, terminal = pty.openpty()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-m", "harness", "replay", str(trace), "--base-url", url, "--out", str(tmp_path)]
        process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it is ignored
        )  # fmt: skip
        os.close(terminal)
        connection, _ = silent.accept()
        os.close(main_end)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 130
        connection.close()
