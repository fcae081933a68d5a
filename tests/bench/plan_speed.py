"""Speed and memory of planning: ``python tests/bench/plan_speed.py [ROWS [TOKENS [KIND ...]]]`` prints figures.

Default: a million rows, prompts of a thousand tokens, all of `KINDS`. Makes one trace per kind from a seed in a
temporary folder (the plan of a million rows is large: set TMPDIR) and plans each in a process of its own, so that peak
memory is that of the one.
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
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = 64
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def lengths(rows: int, tokens: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    arrival_s = 0.0
    for _ in range(rows):
        arrival_s += rng.expovariate(20)
        into = rng.randrange(tokens // 2, tokens * 3 // 2)
        yield {"arrival_s": round(arrival_s, 6), "input_tokens": into, "output_tokens": rng.randrange(1, 500)}


def sessions(rows: int, tokens: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(lengths(rows, tokens, rng)):
        yield row | {"session_id": f"session-{max(0, i - rng.randrange(2000)) // 4}"}


def blocks(rows: int, tokens: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    fresh = 10**6
    for row in lengths(rows, tokens, rng):
        count = -(-row["input_tokens"] // BLOCK)
        shared = rng.randrange(count)
        ids = [*range(shared), *range(fresh, fresh + count - shared)]
        fresh += count
        yield row | {"prefix_ids": ids, "block_tokens": BLOCK}


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lengths": (lengths, {}),
    "sessions": (sessions, {}),
    "prefix blocks": (blocks, {}),
    "lengths, thinned to 0.5": (lengths, {"grow": 0.5}),
    "lengths, superposed to 1.5": (lengths, {"grow": 1.5}),
    "sessions, superposed to 1.5": (sessions, {"grow": 1.5}),
    "lengths, as text": (lengths, {"as_text": True}),
    "lengths, as chat": (lengths, {"as_text": True, "template": TEMPLATE}),
    "sessions, as chat": (sessions, {"as_text": True, "template": TEMPLATE}),
}


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    print(f"{'trace':28} {'requests':>9} {'seconds':>8} {'requests/s':>10} {'plan MB':>8} {'peak MB':>8}")
    with tempfile.TemporaryDirectory(prefix="harness-bench-") as folder:
        for name, (make, spec) in ((kind, KINDS[kind]) for kind in sys.argv[3:] or KINDS):
            path = Path(folder, "trace.jsonl")
            with path.open("w") as file:
                file.writelines(json.dumps(row) + "\n" for row in make(rows, tokens, random.Random(1)))
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(path), json.dumps(spec)],
                cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600,
            )  # fmt: skip
            if done.returncode:
                sys.exit(done.stderr)
            facts = json.loads(done.stdout)
            print(
                f"{name:28} {facts['requests']:9} {facts['seconds']:8.1f} "
                f"{facts['requests'] / facts['seconds']:10.0f} {facts['plan_mb']:8.0f} {facts['peak_mb']:8.0f}",
                flush=True,
            )


def one(path: str, spec: dict[str, Any]) -> None:
    sys.path.insert(0, str(ROOT))
    from harness.plan.build import build_plan
    from harness.plan.prompts import Vocabulary
    from harness.plan.spec import PlanSpec
    from harness.trace.io import open_trace

    vocabulary = Vocabulary.from_ids(range(100, 49_000))
    if spec.get("as_text"):
        model = Path(path).with_name("model")
        model.mkdir(exist_ok=True)
        template = spec.pop("template", None)
        (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        vocabulary = Vocabulary.from_tokenizer(words(model / "tokenizer.json"))
    out = Path(path).with_suffix(".plan")
    began = time.perf_counter()
    info = build_plan(open_trace(path), out, PlanSpec(closed=False, **spec), vocabulary)
    seconds = time.perf_counter() - began
    plan_mb = out.stat().st_size / 1e6
    out.unlink()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"requests": info.requests, "seconds": seconds, "plan_mb": plan_mb, "peak_mb": peak_mb}))


def words(path: Path) -> Path:
    """A byte-level tokenizer, as most models have, of a few thousand words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(2)
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in "aeiou"]
    known = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(8000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(rng.choices(known, k=50)) for _ in range(4000)], trainer)
    tokenizer.save(str(path))
    return path


if __name__ == "__main__":
    one(sys.argv[2], json.loads(sys.argv[3])) if sys.argv[1:2] == ["--one"] else main()
