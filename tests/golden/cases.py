"""What the command line prints of the run directories in ``run_dirs/``, beside what it printed when it was accepted."""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from harness.cli import cli

HERE = Path(__file__).parent
RUNS, EXPECTED = HERE / "run_dirs", HERE / "expected"
SINGLE = ("alone", "cache", "closed", "counted", "failures", "invalid", "live", "open", "sessions", "vllm")
VARIANTS = ("vllm-bench", "guidellm", "aiperf")
PRICE = "price --list-prices list-prices.json --format json"
"""The extract that is shipped grows old, this one is."""

CASES: dict[str, str] = {
    **{f"report-{run}": f"report {run} --format json" for run in SINGLE},
    "report-other-slo": "report open --slo ttft_p99=31ms,e2e=120ms --attain 90% --ratio 3 --min-requests 500 "
    "--format json",
    **{f"variant-{tool}": f"report open --variant {tool} --format json" for tool in VARIANTS},
    "report-repeats": "report a1 a2 a3 --format json",
    "report-sweep": "report sweep --format json",
    "report-search": "report capacity --format json",
    **{f"price-{run}": f"{PRICE} {run}" for run in ("closed", "failures", "invalid", "open", "sweep", "vllm")},
    "price-search": f"{PRICE} capacity",
    "price-repeats": f"{PRICE} a1 a2 a3",
    "price-phase-time": f"{PRICE} alone cache --split phase-time --ratio 1:4:0.1",
    "price-step-model": f"{PRICE} counted vllm --split step-model",
    "price-terms": f"{PRICE} sweep --margin 55% --utilisation 45% --ratio 1:5 --volume 0,1e9:-10%,1e10:-20% "
    "--batch-discount 50% --against gpt-5-mini --tier-price aws-g6.xlarge=0.62@contract@2026-01-20@reserved",
    "compare-repeats": "compare a? b? --fail-if e2e_p50>+5% --format json",
    "compare-one": "compare a1 b1 --format json",
    "compare-refused": "compare open closed --format json",
    "fleet-sweep": "plan-fleet chat.jsonl sweep --grow 3x --headroom 1.2 --availability 99.9% --format json",
    "fleet-search": "plan-fleet chat.jsonl capacity --start 60s --format json",
    "search-resumed": "capacity chat.jsonl --base-url {url} --model fake --tier aws-g6.xlarge --slo ttft_p90=200ms "
    "--probe 3s --tolerance 50% --seed 3 --resume capacity --format json",
    "sweep-resumed": "sweep --resume sweep --format json",
}
"""Command lines by name; the word {url} stands for the server that a search was made at."""

CLOCK = frozenset({"made", "revision", "writer"})
"""Fields that say when and by which process something was printed."""
AGE = re.compile(r"\b\d+ days ago\b")


@contextmanager
def unpacked(folder: Path) -> Iterator[None]:
    """All run directories side by side in ``folder``, which is the working directory meanwhile."""
    for file in RUNS.iterdir():
        if file.suffix == ".xz":
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def printed(case: str) -> dict[str, Any]:
    """The exit status of a case, and the JSON document that it prints. Called where the runs are unpacked."""
    with _server(Path("capacity/sweep.json")) if case == "search-resumed" else nullcontext("") as url:
        done = CliRunner().invoke(cli, CASES[case].replace("{url}", url).split(), standalone_mode=False)
    assert done.exception is None, (done.exception, done.stderr)
    return {"command": CASES[case], "exit": done.return_value, "printed": json.loads(done.stdout)}


@contextmanager
def _server(state: Path) -> Iterator[str]:
    """The server that a search was made at, as far as it is asked again by one that is resumed: its list of models.

    It is at another port now, and ``state`` says so afterwards.
    """

    class Models(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"object": "list", "data": [{"id": "fake", "object": "model"}]}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        (was,) = json.loads(state.read_text())["spec"]["base_url"]
        state.write_text(state.read_text().replace(was, url))
        try:
            yield url
        finally:
            server.shutdown()
            thread.join()


def expected(case: str) -> dict[str, Any]:
    """What it printed when it was last accepted."""
    found: dict[str, Any] = json.loads((EXPECTED / f"{case}.json").read_text())
    return found


def differences(was: Any, now: Any, at: str = "") -> Iterator[tuple[str, bool]]:
    """What ``was`` there and is gone or is another now, and whether a figure (or a short word, like a verdict) is
    concerned: anything but prose. New fields of an object are no difference; new items of a list are one.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was.keys() - CLOCK:
            if key in now:
                yield from differences(was[key], now[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}: is gone, was {was[key]!r}", True
    elif isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            yield f"{at}: {len(was)} items -> {len(now)}", True
        for k, (one, other) in enumerate(zip(was, now, strict=False)):
            yield from differences(one, other, f"{at}[{k}]")
    elif isinstance(was, str) and isinstance(now, str):
        if AGE.sub("N days ago", was) != AGE.sub("N days ago", now):
            yield f"{at}: {was!r} -> {now!r}", not (_prose(was) and _prose(now))
    elif _number(was) and _number(now):
        if not math.isclose(was, now, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{at}: {was!r} -> {now!r}", True
    elif type(was) is not type(now) or was != now:
        yield f"{at}: {was!r} -> {now!r}", True


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _prose(text: str) -> bool:
    return len(text) > 20 and " " in text
