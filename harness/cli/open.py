"""Look through a folder of runs in a browser: open."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import click

from harness.cli.output import say
from harness.cli.verb import command
from harness.errors import EXIT_VALID, HarnessError, UsageError, sentence


@command(
    name="open",
    epilog="""\b
Examples:
  harness open runs
  harness open sweeps/azure --port 8200

Only this machine can reach it (127.0.0.1), nothing is written, and Ctrl-C ends it. From another machine:
  ssh -L 8200:127.0.0.1:8200 HOST harness open runs --port 8200""",
)
@click.argument("folder", metavar="RESULTS", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port to listen on (default: one that is free).")
def open_(folder: Path, port: int) -> int:
    """Serve a folder of runs as pages: a list to sort, a page for each run, several runs side by side."""
    with serve(folder, port) as server:
        print(server.url, flush=True)
        say(f"{folder}: open {server.url} in a browser on this machine; Ctrl-C ends it")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("closed")
    return EXIT_VALID


ADDRESS = "127.0.0.1"

ANSWER_WITHIN_S = 30.0
"""A browser that says nothing for so long is hung up on."""

FIRST_LOOK_S = 2.0
"""The list waits so long for figures, so that a small folder is complete at once."""


def serve(folder: Path, port: int = 0) -> ResultsServer:
    """A server of the pages of ``folder`` on the loopback address, listening; port 0: one that is free.

    Raises `ResultsError` when it is no folder, `UsageError` when the port cannot be had.
    """
    from analysis.report.browse import Results

    results = Results(folder)
    try:
        return ResultsServer(results, port)
    except OSError as e:
        raise UsageError(f"port {port}: {e.strerror}; give another --port, or none for one that is free") from e


class ResultsServer(ThreadingHTTPServer):
    """Serves pages and analyses runs in the background, newest first, until it is closed."""

    daemon_threads = True

    def __init__(self, results: Any, port: int) -> None:
        self.results = results
        self._closing, self._wanted = threading.Event(), threading.Event()
        super().__init__((ADDRESS, port), Handler)
        self.port = int(self.server_address[1])
        self.url = f"http://{ADDRESS}:{self.port}/"
        self._analysing = threading.Thread(target=self._analyse, name="analyse", daemon=True)
        self._analysing.start()

    def list_page(self) -> str:
        """The list of runs, with the figures that are known within `FIRST_LOOK_S`."""
        self._wanted.set()
        end = time.monotonic() + FIRST_LOOK_S
        while self.results.waiting() and time.monotonic() < end:
            time.sleep(0.2)
        return str(self.results.list_page())

    def server_close(self) -> None:
        """Stop listening, and do not begin another run."""
        self._closing.set()
        self._wanted.set()
        super().server_close()

    def _analyse(self) -> None:
        while not self._closing.is_set():
            self._wanted.wait()  # for whoever looks at the list, or for the end: the owner of the process sets it
            self._wanted.clear()
            for key in self.results.waiting():
                if self._closing.is_set():
                    return
                try:
                    self.results.view(key)
                except HarnessError:
                    continue  # the list says what is wrong with it


class Handler(BaseHTTPRequestHandler):
    """GET of the list, a run, a comparison. Nothing is written, and no path is built from what was asked for."""

    server: ResultsServer
    timeout = ANSWER_WITHIN_S
    server_version = "harness"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with a page."""
        from analysis.report.browse import problem_page

        # A name that an attacker points at this address arrives with that name here: DNS rebinding ends at this line.
        if self.headers.get("Host") not in (f"{ADDRESS}:{self.server.port}", f"localhost:{self.server.port}"):
            self._answer(421, problem_page("Wrong address", f"This is {self.server.url} and answers to no other name."))
            return
        try:
            page = self._page()
        except UsageError as e:
            self._answer(400, problem_page("Not like this", str(e)))
        except HarnessError as e:
            self._answer(404, problem_page("Not readable", str(e)))
        except Exception as e:  # the others can still be looked at
            self._answer(500, problem_page("Not readable", sentence(e)))
        else:
            if page is None:
                self._answer(404, problem_page("Not found", "There is no such page."))
            else:
                self._answer(200, page)

    def _page(self) -> str | None:
        asked, results = urlsplit(self.path), self.server.results
        if asked.path == "/":
            return self.server.list_page()
        if asked.path == "/compare":
            return str(results.compare_page(parse_qs(asked.query).get("run", [])))
        if asked.path.startswith("/run/"):
            return str(results.run_page(unquote(asked.path.removeprefix("/run/"), errors="surrogateescape")))
        return None

    def _answer(self, status: int, page: str) -> None:
        body = page.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body))),
            # what else a page may do stands in the page itself (analysis/report/page.py); these a page cannot say
            ("Content-Security-Policy", "frame-ancestors 'none'"), ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
            ("Cross-Origin-Resource-Policy", "same-origin"), ("Cross-Origin-Opener-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the base class
        """Say nothing: the terminal belongs to whoever typed the command."""
