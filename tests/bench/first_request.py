"""How long after the command the first request of a load leaves, against a server that is there: ``first_request.py``.

A relay before the known-truth server notes when each POST with a stream arrives; the first of them is the load's (what
is asked before, the models and one request for one token, is no stream). CPU seconds are of the whole process tree, to
its end, so they can be compared on a machine that does other work as well.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent.parent
TRACE = ROOT / "scenarios" / "traces" / "azure-conv-2023.csv"
STREAM = b'"stream":true'


class Relay:
    """Passes bytes on to ``port`` and keeps when the first request for a stream came."""

    def __init__(self, port: int) -> None:
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.first_s: float | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(("127.0.0.1", self._port))
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.first_s is None and STREAM in data.replace(b" ", b""):
                    self.first_s = time.monotonic()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def main() -> None:
    """Print the seconds of each try and their median."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=5)
    tries = parser.parse_args().tries
    server = subprocess.Popen(
        [sys.executable, "-m", "harness.cluster.engines.fake.server", "--ttft", "0.01", "--itl", "0.001"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    relay = Relay(int(server.stdout.readline().rsplit(":", 1)[1].split("/")[0]))
    command = [sys.executable, "-m", "harness", "replay", str(TRACE), "--limit", "8", "--concurrency", "4",
               "--base-url", f"http://127.0.0.1:{relay.port}/v1"]  # fmt: skip
    seconds: list[float] = []
    try:
        for _ in range(tries):
            relay.first_s, begun, used = None, time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([*command, "--out", folder], cwd=ROOT, capture_output=True, timeout=120, check=False)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert relay.first_s is not None, "no request came"
            seconds.append(relay.first_s - begun)
            cpu_s = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
            print(f"first request after {seconds[-1]:.2f} s; {cpu_s:.2f} s of CPU to the end of the report")
    finally:
        server.kill()
    print(f"median {median(seconds):.2f} s on {os.cpu_count()} processors; largest process {after.ru_maxrss >> 10} MiB")


if __name__ == "__main__":
    main()
