"""Trace formats. A new one is a module with a `Reader` class here and one line in `FORMATS`."""

from __future__ import annotations

from harness.trace.formats.access_log import Envoy, Nginx
from harness.trace.formats.agent_sessions import ClaudeCode, Codex
from harness.trace.formats.azure import Azure
from harness.trace.formats.bailian import Bailian
from harness.trace.formats.bedrock import Bedrock
from harness.trace.formats.burstgpt import BurstGPT
from harness.trace.formats.chat import Chat
from harness.trace.formats.columnar import Columnar
from harness.trace.formats.dynamo import Dynamo
from harness.trace.formats.gateways import AzureGateway, Caddy, Cloudflare, Kong, Traefik
from harness.trace.formats.jsonl import Jsonl
from harness.trace.formats.langfuse import Langfuse
from harness.trace.formats.litellm import LiteLLM
from harness.trace.formats.mooncake import Mooncake
from harness.trace.formats.openai import OpenAI
from harness.trace.formats.otel import OTel
from harness.trace.formats.ragpulse import RagPulse
from harness.trace.formats.record import Reader
from harness.trace.formats.sglang import SGLang
from harness.trace.formats.table import Table
from harness.trace.formats.vllm_log import VllmLog

FORMATS: dict[str, type[Reader]] = {
    "azure": Azure,
    "azure-gateway": AzureGateway,
    "bailian": Bailian,
    "bedrock": Bedrock,
    "burstgpt": BurstGPT,
    "caddy": Caddy,
    "chat": Chat,
    "claude-code": ClaudeCode,
    "cloudflare": Cloudflare,
    "codex": Codex,
    "columnar": Columnar,
    "dynamo": Dynamo,
    "envoy": Envoy,
    "jsonl": Jsonl,
    "kong": Kong,
    "langfuse": Langfuse,
    "litellm": LiteLLM,
    "mooncake": Mooncake,
    "nginx": Nginx,
    "openai": OpenAI,
    "otel": OTel,
    "ragpulse": RagPulse,
    "sglang-log": SGLang,
    "table": Table,
    "traefik": Traefik,
    "vllm-log": VllmLog,
}
"""Name (as given to ``--trace-format``) -> reader."""
