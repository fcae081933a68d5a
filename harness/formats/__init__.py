"""Trace formats. A new one is a module with a `Reader` class here and one line in `FORMATS`."""

from __future__ import annotations

from harness.formats.access_log import Envoy, Nginx
from harness.formats.azure import Azure
from harness.formats.bailian import Bailian
from harness.formats.burstgpt import BurstGPT
from harness.formats.chat import Chat
from harness.formats.columnar import Columnar
from harness.formats.jsonl import Jsonl
from harness.formats.langfuse import Langfuse
from harness.formats.litellm import LiteLLM
from harness.formats.mooncake import Mooncake
from harness.formats.openai import OpenAI
from harness.formats.otel import OTel
from harness.formats.ragpulse import RagPulse
from harness.formats.row import Reader
from harness.formats.table import Table
from harness.formats.vllm_log import VllmLog

FORMATS: dict[str, type[Reader]] = {
    "azure": Azure,
    "bailian": Bailian,
    "burstgpt": BurstGPT,
    "chat": Chat,
    "columnar": Columnar,
    "envoy": Envoy,
    "jsonl": Jsonl,
    "langfuse": Langfuse,
    "litellm": LiteLLM,
    "mooncake": Mooncake,
    "nginx": Nginx,
    "openai": OpenAI,
    "otel": OTel,
    "ragpulse": RagPulse,
    "table": Table,
    "vllm-log": VllmLog,
}
"""Name (as given to ``--trace-format``) -> reader."""
