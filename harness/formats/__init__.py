"""Trace formats. A new one is a module with a `Reader` class here and one line in `FORMATS`."""

from __future__ import annotations

from harness.formats.access_log import Envoy, Nginx
from harness.formats.agent_sessions import ClaudeCode, Codex
from harness.formats.azure import Azure
from harness.formats.bailian import Bailian
from harness.formats.bedrock import Bedrock
from harness.formats.burstgpt import BurstGPT
from harness.formats.chat import Chat
from harness.formats.columnar import Columnar
from harness.formats.dynamo import Dynamo
from harness.formats.gateways import AzureGateway, Caddy, Cloudflare, Kong, Traefik
from harness.formats.jsonl import Jsonl
from harness.formats.langfuse import Langfuse
from harness.formats.litellm import LiteLLM
from harness.formats.mooncake import Mooncake
from harness.formats.openai import OpenAI
from harness.formats.otel import OTel
from harness.formats.ragpulse import RagPulse
from harness.formats.row import Reader
from harness.formats.sglang import SGLang
from harness.formats.table import Table
from harness.formats.vllm_log import VllmLog

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
