"""Speed and memory of reading traces: ``python tests/bench/trace_speed.py [ROWS]`` (default a million) prints figures.

Makes one trace per format that big traces come in, from a seed, in a temporary folder, and inspects each in a process
of its own, so that peak memory is that of the one.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def azure(rows: int, rng: random.Random) -> Iterator[str]:
    yield "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    ns = 0
    for _ in range(rows):
        ns += int(rng.expovariate(10) * 1e7)
        second = ns // 10**7
        yield (
            f"2024-05-{10 + second // 86_400:02} {second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}."
            f"{ns % 10**7:07},{rng.randrange(1, 8000)},{rng.randrange(1, 500)}\r\n"
        )


def mooncake(rows: int, rng: random.Random) -> Iterator[str]:
    fresh = 0
    for i in range(rows):
        blocks = rng.randrange(1, 48)
        shared = min(blocks, rng.randrange(12))
        ids = [*range(shared), *range(1000 + fresh, 1000 + fresh + blocks - shared)]
        fresh += blocks - shared
        row = {"timestamp": i // 10 * 3000, "input_length": blocks * 512 - 7, "output_length": 9, "hash_ids": ids}
        yield json.dumps(row) + "\n"


def jsonl(rows: int, rng: random.Random) -> Iterator[str]:
    for i in range(rows):
        row = {"arrival_s": i / 8, "input_tokens": rng.randrange(1, 9000), "output_tokens": rng.randrange(1, 500)}
        yield json.dumps(row | {"session_id": f"s{i % (rows // 4 + 1)}"}) + "\n"


def litellm(rows: int, rng: random.Random) -> Iterator[str]:
    yield "request_id,call_type,total_tokens,prompt_tokens,completion_tokens,startTime,status,cache_hit,session_id,"
    yield "metadata\n"
    for i in range(rows):
        second = rows // 8 - i // 8
        into, out = rng.randrange(1, 9000), rng.randrange(1, 500)
        yield (
            f"r{i},acompletion,{into + out},{into},{out},2026-09-{1 + second // 86_400:02} {second // 3600 % 24:02}:"
            f'{second // 60 % 60:02}:{second % 60:02}.125,success,False,s{i % 1000},"{{""a"": 1}}"\n'
        )


MAKERS = {"azure.csv": azure, "mooncake.jsonl": mooncake, "ours.jsonl": jsonl, "litellm.csv": litellm}


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(f"{'trace':16} {'rows':>9} {'MB':>6} {'seconds':>8} {'rows/s':>9} {'peak MB':>8}")
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        for name, make in MAKERS.items():
            path = Path(folder, name)
            with path.open("w", newline="") as file:
                file.writelines(make(rows, random.Random(1)))
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(path)],
                cwd=ROOT, capture_output=True, text=True, check=True, timeout=900,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            facts = json.loads(done.stdout)
            assert facts["rows"] == rows, facts
            print(
                f"{name:16} {rows:9} {path.stat().st_size / 1e6:6.0f} {seconds:8.1f} {rows / seconds:9.0f} "
                f"{facts['peak_mb']:8.0f}",
                flush=True,
            )
            path.unlink()


def one(path: str) -> None:
    sys.path.insert(0, str(ROOT))
    from harness.trace.io import open_trace
    from harness.trace.shape import measure

    shape = measure(open_trace(path))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"rows": shape.rows, "peak_mb": peak_mb}))


if __name__ == "__main__":
    one(sys.argv[2]) if sys.argv[1:2] == ["--one"] else main()
