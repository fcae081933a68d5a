"""CPU per event of clients in turns on one server: checkouts of this project, or rivals.

python tests/bench/in_turns.py --streams 200 --repeats 6 . ../before "vllm-rs bench serve"

The speed of a machine changes within minutes; what is measured within the same half minute can be compared. Each round
runs every client once, in an order that turns, on the load of the client benchmark (closed loop, 128 tokens in and out,
a token each 10 ms). Printed: each client's figures, median and least, and the median of its ratio to the first one in
the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from measure import Client, Cores, Work, fast_server, measure
from peers import RIVALS, Harness


def client_of(name: str) -> Client:
    """A rival by its name; else a checkout, which must have its own ``_reader*.so`` to run compiled."""
    for rival in RIVALS:
        if rival.name == name:
            return rival
    tree = Path(name).resolve()
    if not (tree / "scenarios/worker.py").is_file():
        raise SystemExit(f"{name}: neither a rival ({', '.join(r.name for r in RIVALS)}) nor a checkout")
    if not any(tree.glob("scenarios/**/_rea*.so")):
        print(f"{name}: not compiled: the client in Python is measured", file=sys.stderr)
    return Harness(tree=tree)


def main() -> None:
    """Parse arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="+", metavar="CHECKOUT|RIVAL")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    clients = [client_of(name) for name in options.clients]
    found: list[list[float]] = [[] for _ in clients]
    cores = Cores.split()
    with fast_server(cores, processes=max(len(cores.server), 1)) as server:
        requests = round(options.streams * (options.seconds / server.answer_s(Work("", 0)) + 2))
        for turn in range(options.repeats):
            for k in (*range(turn % len(clients), len(clients)), *range(turn % len(clients))):
                work = Work(server.url, requests, streams=options.streams)
                one = measure(clients[k], work, server, cores, deadline_s=2 * options.seconds + 6)
                found[k].append(one.cpu_us_per_event)
                print(
                    f"{options.clients[k]}: {one.cpu_us_per_event:.2f} us/event, {one.events_per_s:,.0f} events/s"
                    f"{'' if one.kept_up else ', BEHIND'}{', server-bound' if one.server_bound else ''}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    for name, values in zip(options.clients, found, strict=True):
        ratio = statistics.median(value / first for value, first in zip(values, found[0], strict=True))
        print(
            f"{name}: median {statistics.median(values):.2f}, least {min(values):.2f} us/event; {ratio:.3f} of the "
            f"first ({' '.join(f'{value:.2f}' for value in values)})"
        )


if __name__ == "__main__":
    main()
