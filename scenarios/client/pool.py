"""The connection pool: which endpoint a request goes to, and the idle keep-alive connections of each."""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic_ns
from typing import get_args

import gevent

from harness.errors import UsageError
from harness.record.run_spec import Balance
from harness.scenarios.client.completion import clean
from harness.scenarios.client.connection import Connection, Owner
from harness.scenarios.client.endpoint import Endpoint
from harness.scenarios.client.in_flight import InFlight

BALANCES: tuple[Balance, ...] = get_args(Balance)
"""How a request finds its server: "least", the one with the least of this client's requests in flight; "round-robin",
each in turn; "session", server ``session % servers``, so that the turns of a session meet the same prefix cache."""
_OPENING = 128  # connections being opened at the same time: below any server's listen backlog


class Pool:
    """Connections to ``endpoints`` for the requests of ``owner``. Not thread-safe."""

    def __init__(self, owner: Owner, endpoints: Sequence[Endpoint], balance: str, connect_timeout_ns: int) -> None:
        if balance not in BALANCES:
            raise UsageError(f"unknown balance {balance!r}: valid: {', '.join(BALANCES)}")
        self._owner = owner
        self._endpoints = endpoints
        self._balance = balance
        self._connect_timeout_ns = connect_timeout_ns
        self._next = 0
        self.idle: dict[Endpoint, dict[Connection, None]] = {endpoint: {} for endpoint in endpoints}
        """By endpoint, as an ordered set: the last was used last."""
        self._opening: set[Connection] = set()
        self._failed: dict[Endpoint, str] = {}

    def choose(self, session: int) -> Endpoint:
        """The endpoint of the next request, which belongs to this session."""
        endpoints = self._endpoints
        n = len(endpoints)
        if n == 1:
            return endpoints[0]
        if self._balance == "session":
            return endpoints[session % n]
        best = self._next
        if self._balance == "least":  # ties in turn
            best = min(range(best, best + n), key=lambda i: endpoints[i % n].in_flight) % n
        self._next = (best + 1) % n
        return endpoints[best]

    def send(self, request: InFlight) -> None:
        """Send on an idle connection, or on a new one."""
        connection = self.take(request.endpoint, request.tried_ns)
        if connection is None:
            Connection(self._owner, request.endpoint).open(request)
        else:
            connection.send(request)

    def take(self, endpoint: Endpoint, now_ns: int) -> Connection | None:
        """The most recently used idle connection that the server is unlikely to be closing."""
        idle = self.idle[endpoint]
        while idle:
            connection, _ = idle.popitem()
            if not connection.used or now_ns - connection.idle_ns < endpoint.idle_limit_s * 1e9:
                return connection
            connection.close()
        return None

    def add(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        self._opening.discard(connection)
        connection.idle_ns = monotonic_ns()
        self.idle[connection.endpoint][connection] = None

    def drop(self, connection: Connection, trouble: str = "") -> None:
        """Forget an idle connection that ended, or one that could not be opened ahead."""
        self._opening.discard(connection)
        if trouble:
            self._failed[connection.endpoint] = trouble
        self.idle[connection.endpoint].pop(connection, None)

    def open_ahead(self, wanted: int, timeout_s: float | None = None) -> str | None:
        """Open connections until ``wanted`` are idle, spread over the endpoints; the reason if some failed.

        Waits for them at most ``timeout_s`` (default: the connect timeout). A failure here is not an error of the run:
        the requests themselves will tell.
        """
        self._failed.clear()
        n = len(self._endpoints)
        share = [wanted // n + (i < wanted % n) for i in range(n)]
        todo = [e for e, k in zip(self._endpoints, share, strict=True) for _ in range(k - len(self.idle[e]))]
        deadline = monotonic_ns() + (self._connect_timeout_ns if timeout_s is None else int(timeout_s * 1e9))
        while (todo or self._opening) and monotonic_ns() < deadline:
            while todo and len(self._opening) < _OPENING:
                endpoint = todo.pop()
                if endpoint in self._failed:
                    continue
                connection = Connection(self._owner, endpoint)
                self._opening.add(connection)
                connection.open(None)
            gevent.sleep(0.001)
        for connection in list(self._opening):
            connection.close()
            self._failed[connection.endpoint] = f"{connection.endpoint.authority}: no connection in time"
        self._opening.clear()
        return clean("; ".join(self._failed.values())) or None

    def close_idle(self, now_ns: int) -> None:
        """Close connections that their servers are about to close."""
        for endpoint, idle in self.idle.items():
            limit_ns = endpoint.idle_limit_s * 1e9
            for connection in [c for c in idle if c.used and now_ns - c.idle_ns > limit_ns]:
                del idle[connection]
                connection.close()

    def close(self) -> None:
        """Close every idle connection."""
        for idle in self.idle.values():
            for connection in idle:
                connection.close()
            idle.clear()
