"""vLLM as a server process: its arguments, its environment, and what lines of its log mean (vLLM 0.11 to 0.32)."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from harness.cluster.catalogue.models import (
    DTYPE_BYTES,
    Model,
    for_tier,
    kv_bytes,
    model_config,
    model_kv_bytes_per_token,
    model_weight_bytes,
    tensor_parallel_sizes,
)
from harness.cluster.catalogue.number_formats import QUANTIZATIONS
from harness.cluster.catalogue.tiers import check_accelerators
from harness.cluster.catalogue.weights import ensure_weights, weights_facts
from harness.cluster.engines.protocol import WHOLE, Command, Part, State
from harness.cluster.process.process import Cause
from harness.errors import UsageError
from harness.record.manifest import Evidence, Tier

KEEP_ALIVE_S = 900
"""vLLM closes idle connections after 5 s by default; a client that reuses one then sees resets."""
MEMORY_SHARE = 0.9  # of the memory vLLM takes for weights and KV cache (its own default on accelerators)
CPU_PROCESSES_GIB = 2.5  # what the processes of one CPU server are taken to hold besides weights and KV cache
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmEngine:
    """A model of the catalogue on a tier, served by vLLM."""

    model: Model
    tier: Tier
    weights: Path  # on the driver's host; other hosts make their own copy when this path is not there
    evidence: Evidence = "measured"

    @property
    def name(self) -> str:
        """Kind of engine: "vllm" on accelerators, "vllm-cpu" without."""
        return engine_kind(self.tier)

    @property
    def served_model(self) -> str:
        """Model name as the server knows it."""
        return self.model.name

    @property
    def args(self) -> list[str]:
        """Engine arguments that shape the result, for the manifest."""
        return engine_args(self.model, self.tier)

    @property
    def hosts(self) -> int:
        """Machines of the tier that one replica spans (`hosts_per_replica`)."""
        return hosts_per_replica(self.model, self.tier)

    @property
    def memory_gib(self) -> float | None:
        """Main memory a server on a CPU tier takes, GiB; null on accelerators, whose own memory is the limit."""
        need = None if self.tier.accelerator_count else memory_need(self.model, self.tier)
        return need.total_gib if need else None

    def misfit(self, tier: Tier) -> str | None:
        """Why the model cannot be served on this tier (`misfit`)."""
        return misfit(self.model, tier)

    def facts(self) -> dict[str, str]:
        """Where the weights came from, their number format, and what of the tier they use."""
        facts = weights_facts(self.model, self.weights)
        model = for_tier(self.model, self.tier.accelerator)
        facts["dtype"] = model.dtype
        if (per_token := model_kv_bytes_per_token(model)) is not None:
            facts["kv_bytes_per_token"] = str(per_token)
        used = tensor_parallel_size(self.model, self.tier) * (pipeline := pipeline_parallel_size(self.model, self.tier))
        have = self.tier.accelerator_count * self.hosts
        if used < have:
            facts["accelerators_used"] = f"{used} of the tier's {have}"
        if pipeline > 1:
            facts["parallel"] = f"pipeline {pipeline} x tensor {used // pipeline} on {self.hosts} machines"
        return facts

    def prepare(self, say: Callable[[str], None]) -> Path:
        """The weights' folder on this host. Raises `ServerError` when its accelerators are not the tier's."""
        check_accelerators(self.tier)
        return self.weights if self.weights.exists() else ensure_weights(self.model, say=say)

    def command(self, host: str, port: int, api_key: str, part: Part = WHOLE) -> Command:
        """The server's command on this host."""
        weights = self.prepare(lambda text: None)
        return Command(
            argv=server_argv(self.model, self.tier, weights, host=host, port=port, part=part),
            env=server_env(self.model, self.tier, api_key, host=host if part.hosts > 1 else None),
        )

    def state(self, line: str) -> State | None:
        """What a line of its log says it begins."""
        return state(line)

    def explain(self, lines: Sequence[str]) -> Cause | None:
        """The cause of a death, from its log."""
        return explain(lines)


def for_processor(model: Model, tier: Tier, flags: AbstractSet[str]) -> tuple[Model, str | None]:
    """A model on a CPU tier as a processor with these extensions should serve it, and why, if not as it is.

    bfloat16 becomes float32 on x86 with AVX2 alone, where it is several times slower (no AVX-512); not where that does
    not fit the memory, and not for quantised weights. For the driver's own machine: it sees no other's processor.
    """
    if "avx2" not in flags or "avx512f" in flags or model.dtype != "bfloat16" or model.quantization:
        return model, None
    wide = replace(model, dtype="float32")
    need = memory_need(wide, tier)
    on_disk = model.path is not None and not model.dummy  # then the need is that of the files, which are half as large
    if need is not None and need.total_gib + on_disk * need.weights_gib > need.have_gib:
        return model, None
    return wide, "float32 in place of bfloat16, which is slow on this processor: it has no AVX-512"


def engine_kind(tier: Tier) -> str:
    """Kind of engine: "vllm" on a tier with accelerators, "vllm-cpu" without."""
    return "vllm" if tier.accelerator_count else "vllm-cpu"


def tensor_parallel_size(model: Model, tier: Tier) -> int:
    """Accelerators of one replica: what the model asks for, else as many of the tier's as it can be split over; 0 on a
    CPU tier. Raises `UsageError` when the model asks for more than the tier has.
    """
    model = for_tier(model, tier.accelerator)
    count, asked = tier.accelerator_count, model.tensor_parallel_size
    if count == 0:
        return 0
    if asked is not None:
        if asked > count:
            raise UsageError(f"model {model.name} wants {asked} {tier.accelerator}; tier {tier.name} has {count}")
        return asked
    config = model_config(model)
    return tensor_parallel_sizes(config, model.quantization, count)[-1] if config is not None else count


def pipeline_parallel_size(model: Model, tier: Tier) -> int:
    """Stages a replica is cut into, from the model's own ``--pipeline-parallel-size`` for this tier; 1 without."""
    args = for_tier(model, tier.accelerator).engine_args if tier.accelerator_count else ()
    for i, word in enumerate(args):
        name, _, value = word.partition("=")
        if name in ("--pipeline-parallel-size", "-pp"):
            value = value or (args[i + 1] if i + 1 < len(args) else "")
            if not value.isdigit() or int(value) < 1:
                raise UsageError(f"model {model.name}: {name} {value!r} is no number of pipeline stages")
            return int(value)
    return 1


def hosts_per_replica(model: Model, tier: Tier) -> int:
    """Machines of this tier that one replica spans. Raises `UsageError` when stages cannot be laid out evenly."""
    stages = pipeline_parallel_size(model, tier)
    if stages == 1:
        return 1
    parts = tensor_parallel_size(model, tier)
    per_host = max(1, tier.accelerator_count // parts)
    hosts = math.ceil(stages / per_host)
    if stages % hosts:
        raise UsageError(
            f"model {model.name}: {stages} pipeline stages of {parts} {tier.accelerator} do not spread evenly over "
            f"{hosts} x {tier.name}; choose a number of stages that {hosts} divides"
        )
    return hosts


def engine_args(model: Model, tier: Tier) -> list[str]:
    """Arguments that shape speed and answers, as this kind of hardware wants them."""
    model = for_tier(model, tier.accelerator)
    args = ["--dtype", model.dtype, "--max-model-len", str(model.max_model_len)]
    if tier.accelerator_count:
        args += ["--tensor-parallel-size", str(tensor_parallel_size(model, tier))]
    else:
        args += ["--enforce-eager"]  # compiling takes minutes on a CPU and gains little there
    if model.dummy:
        args += ["--load-format", "dummy", "--skip-tokenizer-init"]
    return [*args, *model.engine_args]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Memory one replica needs, GiB; of one accelerator, or of the whole machine on a CPU tier."""

    weights_gib: float
    kv_cache_gib: float  # for one request of ``max_model_len`` tokens, or what a CPU server is given for all of them
    processes_gib: float
    have_gib: float  # what the tier has, times `MEMORY_SHARE`

    @property
    def total_gib(self) -> float:
        """All of it."""
        return self.weights_gib + self.kv_cache_gib + self.processes_gib


def memory_need(model: Model, tier: Tier) -> MemoryNeed | None:
    """What a replica needs and the tier has; null when a size is not known."""
    model = for_tier(model, tier.accelerator)
    have = tier.accelerator_memory_gib if tier.accelerator_count else tier.memory_gib
    config, weights = model_config(model), model_weight_bytes(model)
    if config is None or weights is None or have is None:
        return None
    have *= MEMORY_SHARE
    if not tier.accelerator_count:
        return MemoryNeed(
            weights_gib=weights / GIB, kv_cache_gib=cpu_kv_cache_gib(model), processes_gib=CPU_PROCESSES_GIB,
            have_gib=have,
        )  # fmt: skip
    parts = tensor_parallel_size(model, tier)
    stages = pipeline_parallel_size(model, tier)  # each holds its share of the layers, so of weights and KV cache
    kv = kv_bytes(config, model.max_model_len, DTYPE_BYTES.get(model.dtype, 2), parts) / stages / GIB
    return MemoryNeed(weights_gib=weights / parts / stages / GIB, kv_cache_gib=kv, processes_gib=0.0, have_gib=have)


def check_fit(model: Model, tier: Tier) -> None:
    """Refuse, before anything is fetched or rented, what `misfit` finds. Raises `UsageError`."""
    if problem := misfit(model, tier):
        raise UsageError(problem)


def misfit(model: Model, tier: Tier) -> str | None:
    """Why a model cannot fit this tier or has no kernels there, with the numbers; null when it can or is not known."""
    model = for_tier(model, tier.accelerator)
    form = model.quantization
    if form in QUANTIZATIONS and tier.accelerator in QUANTIZATIONS[form].not_on:
        return (
            f"model {model.name} does not run on tier {tier.name}: vLLM has no {form} kernels for {tier.accelerator}; "
            f"choose another number format (fp8) or accelerator"
        )
    need = memory_need(model, tier)
    if need is None or need.total_gib <= need.have_gib:
        return None
    parts = tensor_parallel_size(model, tier)
    where = f"each of {parts} {tier.accelerator}" if parts else f"{tier.memory_gib:g} GiB of memory"
    processes = f" + {need.processes_gib:.1f} GiB of its processes" if need.processes_gib else ""
    total, have = need.total_gib, need.have_gib
    return (
        f"model {model.name} does not fit tier {tier.name}: {need.weights_gib:.1f} GiB of weights + "
        f"{need.kv_cache_gib:.1f} GiB of KV cache for {model.max_model_len} tokens{processes} = {total:.1f} GiB, and "
        f"{where} leaves {have:.1f} GiB ({MEMORY_SHARE:.0%}): {total - have:.1f} GiB are missing. "
        f"Choose a larger --tier, or a smaller or quantised --model"
    )


def cpu_kv_cache_gib(model: Model) -> int:
    """KV cache of a server on a CPU tier, whole GiB: what the model asks for, and at least one longest request."""
    config = model_config(model)
    if config is None:
        return model.cpu_kv_cache_gib
    longest = kv_bytes(config, model.max_model_len, DTYPE_BYTES.get(model.dtype, 2))
    return max(model.cpu_kv_cache_gib, math.ceil(longest / GIB))


def server_argv(model: Model, tier: Tier, weights: Path, *, host: str, port: int, part: Part = WHOLE) -> list[str]:
    """Command line of one server, or of one machine's part of it."""
    # Not the ``vllm`` script: that of vllm-cpu cannot find its own package. Only its main module knows headless parts.
    module = ["vllm.entrypoints.openai.api_server", "--model", str(weights)]
    if part.rank:
        module = ["vllm.entrypoints.cli.main", "serve", str(weights), "--headless"]
    argv = [sys.executable, "-m", *module, "--served-model-name", model.name]
    if not part.rank:
        argv += ["--host", host, "--port", str(port), "--disable-uvicorn-access-log"]
    if part.hosts > 1:
        argv += [
            "--nnodes", str(part.hosts), "--node-rank", str(part.rank), "--master-addr", part.master,
            "--master-port", str(part.master_port), "--distributed-executor-backend", "mp",
        ]  # fmt: skip
    return [*argv, *engine_args(model, tier)]


def server_env(model: Model, tier: Tier, api_key: str, *, host: str | None = None) -> dict[str, str | None]:
    """Environment of one server, as changes to its parent's. ``host``: this machine's address, for its other parts."""
    env: dict[str, str | None] = {
        "VLLM_API_KEY": api_key,
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the weights are a local folder by now
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": None,  # Ray sets 1 in its workers, which would give vLLM one thread
        **({"VLLM_HOST_IP": host} if host is not None else {}),
    }
    if not tier.accelerator_count:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(cpu_kv_cache_gib(for_tier(model, None)))
    return env


_STATES: tuple[tuple[str, State], ...] = (
    (r"Starting to load model|Loading (model )?weights|Loading .*checkpoint shards", "loading"),
    (
        r"Starting torch\.compile|vLLM's torch\.compile|Compiling a graph|Dynamo bytecode|apturing CUDA ?graph",
        "compiling",
    ),
)


def state(line: str) -> State | None:
    """The state of the start that a log line begins; null for most lines."""
    return next((name for pattern, name in _STATES if re.search(pattern, line)), None)


PORT_TAKEN = r"address already in use|\[Errno 98\]"
CAUSES: tuple[tuple[str, str], ...] = (
    (PORT_TAKEN, "port in use: another process took the port; start again"),
    (
        r"torchvision::nms does not exist",
        "torchvision does not fit this torch build: "
        "pip uninstall -y torchvision torchaudio torchcodec (text models do not need them)",
    ),
    (
        r"No package metadata was found for vllm",
        "vLLM's own package data is missing: reinstall the engine: the harness's [cpu] or [gpu] extra",
    ),
    (
        r"ModuleNotFoundError: No module named '?(?P<what>[\w.]+)",
        "Python package {what} is missing: "
        "install the harness with its [cpu] or [gpu] extra, in the environment that runs it",
    ),
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|Free memory on device .* is less than desired",
        "out of GPU memory: end other processes on the GPU, use a tier with more memory or a smaller model",
    ),
    (
        r"No available memory for the cache blocks|seq len \(\d+\), \(?[\d.]+ GiB KV cache is needed",
        "no room for the KV cache of one request: "
        "lower max_model_len, raise the KV cache, or use a tier with more memory",
    ),
    (
        r"Cannot allocate memory|DefaultCPUAllocator: can't allocate|^MemoryError|Available memory on node",
        "out of memory: "
        "end other processes, use fewer replicas or a smaller model (SmolLM2-135M needs about 4 GiB a replica)",
    ),
    (
        r"No CUDA GPUs are available|Found no NVIDIA driver|Failed to infer device type|libcuda\.so.*cannot open|"
        r"World size .* is larger than the number of available GPUs",
        "no GPU, or fewer than the tier has: run on a machine of this tier, or choose a tier without accelerators",
    ),
    (
        r"no kernel image is available|only supported on GPUs with compute capability",
        "this GPU is too old for the number format or the build: choose another dtype or a newer tier",
    ),
    (
        r"greater than the derived max_model_len|exceeds the model's .*max(imum)?_(model_len|position)",
        "max_model_len is larger than the model was trained for: lower it in the model's entry or engine arguments",
    ),
    (
        r"not supported for now|has no vLLM implementation|does not recognize this architecture|"
        r"Model architectures .* (are not supported|failed to be inspected)",
        "this vLLM does not support the model's architecture: "
        "check the model's config.json, or use another vLLM version",
    ),
    (
        r"SafetensorError|HeaderTooLarge|InvalidHeaderDeserialization|MetadataIncompleteBuffer|incomplete metadata|"
        r"Cannot find any model weights|size mismatch for|PytorchStreamReader failed",
        "the model's weights are damaged or incomplete: fetch them again (delete the model's folder in the cache)",
    ),
    (
        r"gated repo|GatedRepoError|401 Client Error|Access to model .* is restricted",
        "the hub wants an account that accepted the model's licence: accept it on the model's page and set HF_TOKEN",
    ),
    (
        r"not a local folder and is not a valid model identifier|Invalid repository ID or local directory|"
        r"not appear to have a file named|Can't load the configuration of|Repo id must|Error no file named|"
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer",
        "the model's folder is missing or is not a model: "
        "check the path: config.json, tokenizer and *.safetensors have to be there",
    ),
    (
        r"must be divisible by.*tensor.parallel|not divisible by .*tensor parallel",
        "the model's attention heads cannot be spread over the tier's accelerators: "
        "choose a tier with another number of accelerators",
    ),
    (
        r"error: (unrecognized arguments|argument|ambiguous option)",
        "vLLM does not know one of its arguments: check the model's engine_args against this vLLM version",
    ),
    (r"No space left on device", "the disk is full: free some space (also in /dev/shm and /tmp)"),
    (r"Permission denied", "no permission: see the log for the file or address"),
)
"""(pattern in a log line, cause and advice); the first one that occurs anywhere in the log's end counts."""


def explain(lines: Sequence[str]) -> Cause | None:
    """Why a server died, with advice, from the end of its log; null when no line is known."""
    for pattern, cause in CAUSES:
        if found := re.search(pattern, "\n".join(lines), re.IGNORECASE | re.MULTILINE):
            return Cause(cause.format(**found.groupdict()), port_taken=pattern == PORT_TAKEN)
    return None
