"""A real S3 server on loopback (SeaweedFS), and a proxy before it that refuses, cuts and tampers."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from conftest import wait_for

from harness import aws

WEED = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))

SECRET = "a-secret-that-no-message-shows"
ADMIN = {"aws_access_key_id": "admin-id", "aws_secret_access_key": "admin-secret", "region_name": "us-east-1"}
BUCKET = "runs-and-traces"


@dataclass(frozen=True)
class S3Server:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)  # loopback
    except urllib.error.HTTPError as e:
        return e.code < 500
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS on loopback: it checks signatures, checksums and If-None-Match as S3 does."""
    folder = tmp_path_factory.mktemp("weed")
    user = {"name": "user", "credentials": [{"accessKey": "user-id", "secretKey": SECRET}]}
    admin = {"name": "admin", "credentials": [{"accessKey": "admin-id", "secretKey": "admin-secret"}]}
    identities = [
        user | {"actions": ["Read", "Write", "List"]},
        admin | {"actions": ["Admin", "Read", "Write", "List"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    names = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(names))
    flags = [f"-{name}.port={port}" for name, port in zip(names, ports, strict=False)]
    flags += [f"-{name}.port.grpc={port}" for name, port in zip(names, ports[len(names) :], strict=True)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(WEED), "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
             "-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-master.telemetry=false",
             "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0", "-volume.max=20", *flags],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        found = S3Server(ports[3], process)
        wait_for(lambda: answers(found.url) or process.poll() is not None, 60, "SeaweedFS answers")
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        make_bucket(found, BUCKET)
        yield found
    finally:
        process.kill()  # on SIGTERM it lingers
        process.wait(120)


def make_bucket(server: S3Server, name: str) -> None:
    admin = boto3.client("s3", endpoint_url=server.url, **ADMIN)

    def made() -> bool:
        try:
            admin.create_bucket(Bucket=name)
            # It answers before its volumes are ready.
            admin.put_object(Bucket=name, Key="ready", Body=b"1")
        except Exception:
            return False
        return True

    wait_for(made, 60, "a bucket can be written")


class Proxy:
    """Between us and the server: passes bytes on, and can refuse, cut and tamper."""

    def __init__(self, port: int) -> None:
        self.refuse = False
        self.cut_up_after: int | None = None
        """Cut a connection that has sent this many bytes to the server."""
        self.cut_down_after: list[int] = []
        """Cut the next connections when this many bytes came back, one entry each."""
        self.replace_up: tuple[bytes, bytes] | None = None
        self.replace_down: tuple[bytes, bytes] | None = None
        self.passed_down = 0
        self._upstream = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse:
                client.close()
                continue
            upstream = socket.create_connection(("127.0.0.1", self._upstream))
            for args in ((client, upstream, True), (upstream, client, False)):
                threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        total = 0
        try:
            while data := source.recv(1 << 16):
                total += len(data)
                replace = self.replace_up if up else self.replace_down
                if replace is not None:
                    data = data.replace(*replace)
                if up and self.cut_up_after is not None and total > self.cut_up_after:
                    break
                if not up:
                    self.passed_down += len(data)
                    if self.cut_down_after and total > self.cut_down_after[0]:
                        self.cut_down_after.pop(0)
                        break
                if self.refuse:
                    break
                target.sendall(data)
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def s3_env(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The user's environment, and a place of this test's own in the bucket."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/{tmp_path.name}-{time.time_ns()}"


@pytest.fixture
def proxy(server: S3Server, s3_env: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    through = Proxy(server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", through.url)
    monkeypatch.setattr(aws, "ATTEMPTS", 2)
    monkeypatch.setattr("harness.store.objects.BREAKS", 2)
    yield through
    through.close()
