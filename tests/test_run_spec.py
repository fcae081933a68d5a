"""Whoever starts a load, and however: what was not asked for is the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import pytest

from harness.cli import replay
from harness.cli.verb import Verb
from harness.cluster.deploy.load_workers import worker_spec
from harness.record.manifest import RunDir
from harness.record.run_spec import DEFAULTS, RunSpec, WorkerSpec

ROOT = Path(__file__).resolve().parent.parent
LOCUST = """
import sys
from locust import argument_parser
from harness.scenarios import locust_user as user
from harness.scenarios.client.client import Client
user.run_as_locustfile(timed=True)
options = argument_parser.parse_options(["--plan", "p", "--host", "http://127.0.0.1:1"])
spec = user.asked(options, options.host, timed=True)
client = Client(spec, lambda row: None)
assert (client._stall_ns, client._timeout_ns) == (spec.stall_s * 1e9, spec.timeout_s * 1e9)
assert (client.retries, client.pool._balance, client._stream) == (spec.retries, spec.balance, spec.stream)
import msgspec
sys.stdout.write("\\n" + msgspec.json.encode(spec).decode())
"""


@pytest.mark.parametrize("verb", [replay.replay, replay.run], ids=lambda verb: str(verb.name))
def test_the_command_line_asks_for_the_defaults(verb: Verb) -> None:
    found = verb.make_context(verb.name, ["/dev/null"]).params
    same = {f.name for f in fields(RunSpec)} & found.keys() - {"endpoint", "model", "base_urls"}
    assert {"timeout_s", "stall_s", "min_requests", "balance", "retries", "length_field", "key_header"} <= same
    for name in same:
        default = getattr(DEFAULTS, name)
        assert found[name] == default or (not found[name] and name in ("headers", "header_env", "slo", "output_lengths",
                                                                      "workers")), name  # fmt: skip
    assert found["no_stream"] is not DEFAULTS.stream and found["no_counters"] is not DEFAULTS.counters


def test_locust_asks_for_the_defaults() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCUST], cwd=ROOT, capture_output=True, timeout=120, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    spec = msgspec.json.decode(done.stdout.splitlines()[-1], type=RunSpec)
    assert spec == replace(DEFAULTS, model="default", base_urls=["http://127.0.0.1:1/v1"])


def test_a_worker_does_what_its_run_was_asked(tmp_path: Path) -> None:
    """Its file holds every field of the run's spec, and a field that is left out there has the same default."""
    made = worker_spec(replace(DEFAULTS, base_urls=["u"]), RunDir(tmp_path), 0)
    least = {"worker": 0, "plan": made.plan, "results": made.results, "observations": made.observations,
             "answers": made.answers, "mode": "open", "model": "", "base_urls": ["u"]}  # fmt: skip
    assert msgspec.convert(least, WorkerSpec) == made


def test_the_spec_costs_no_import() -> None:
    code = "import sys, harness.record.run_spec; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert not {"pyarrow", "numpy", "msgspec", "psutil", "click", "http.client"} & set(done.stdout.split())
