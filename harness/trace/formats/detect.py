"""Which format a file has, from its first record; and what it is instead, when it has none.

A new format is a `Reader` and a line in `FORMATS`.
"""

from __future__ import annotations

import re
from collections import Counter

import msgspec

from harness.errors import TraceError
from harness.trace.formats.columnar import is_columnar, schema_of
from harness.trace.formats.gateways import AzureGateway, Caddy, Cloudflare, Envoy, Kong, LiteLLM, Nginx, Traefik
from harness.trace.formats.jsonl import Columnar, Jsonl
from harness.trace.formats.logs import Bedrock, Dynamo, SGLang, VllmLog
from harness.trace.formats.messages import ChatLog, ClaudeCode, Codex, OpenAI
from harness.trace.formats.published import Azure, Bailian, BurstGPT, Mooncake, RagPulse
from harness.trace.formats.record import Reader, attempt, safe
from harness.trace.formats.table import TableReader
from harness.trace.formats.tracing import Langfuse, OTel
from harness.trace.formats.values import header_of, split
from harness.trace.source import TraceFile, magic, records
from harness.trace.sources import Sources

FORMATS: dict[str, type[Reader]] = {
    "azure": Azure,
    "azure-gateway": AzureGateway,
    "bailian": Bailian,
    "bedrock": Bedrock,
    "burstgpt": BurstGPT,
    "caddy": Caddy,
    "chat": ChatLog,
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
    "table": TableReader,
    "traefik": Traefik,
    "vllm-log": VllmLog,
}

_HEAD_RECORDS = 20_000
"""A log is recognised by one of this many first lines: servers print a banner before the first request."""
_HEAD_OBJECTS = 200
"""The same of a file of JSON objects: the session of an agent begins with others than its calls."""


def detect(source: TraceFile) -> str:
    """Name of the format that the first record shows.

    Raises `TraceError` when none or several do, with what the file looks like.
    """
    if is_columnar(source):
        header = ",".join(schema_of(source).names).encode()
        return next((name for name, reader in FORMATS.items() if reader.columnar and reader.sniff(header)), "columnar")
    first, line, found = b"", None, list[str]()
    for at, (number, record) in enumerate(records(source)):
        if not at:
            first, line = record, number
        found = claims(record, logs_only=at > 0)
        if len(found) == 1:
            return found[0]
        if found or at + 1 == (_HEAD_OBJECTS if first.lstrip()[:1] == b"{" else _HEAD_RECORDS):
            break
    if not first:
        raise TraceError(source.name, None, "is empty: no line with anything on it")
    seen = first[:100].decode("utf-8", "replace").rstrip("\r\n")
    problem = f"could be {' or '.join(found)}" if found else f"format not recognised{_looks_like(first)}"
    formats = "".join(f"\n  {name:9} {reader.summary}" for name, reader in FORMATS.items())
    raise TraceError(source.name, line, f"{problem}. First line: {seen!r}. --trace-format NAME forces one of:{formats}")


def claims(record: bytes, *, logs_only: bool = False) -> list[str]:
    """The formats that a record shows; any table only when it is in no other."""
    found = [name for name, reader in FORMATS.items() if (reader.log or not logs_only) and reader.sniff(record)]
    return [name for name in found if FORMATS[name] is not TableReader] or found


def detect_all(sources: Sources) -> tuple[Sources, str, list[str]]:
    """(the files to read, their one format, what to say of those left out): of several files all must have one format.

    Files of a folder that are empty or in no known format are left out; files that the user named are not.

    Raises `TraceError` as `detect` does, and for several formats.
    """
    if len(sources.files) == 1:
        return sources, detect(sources.files[0]), []
    formats: dict[int, str] = {}
    problems: dict[int, TraceError] = {}
    for at, file in enumerate(sources.files):
        try:
            formats[at] = detect(file)
        except TraceError as e:
            problems[at] = e
    names = Counter(formats.values())
    if not names:
        raise next(iter(problems.values()))
    if len(names) > 1:
        counts = ", ".join(f"{name} ({count} files)" for name, count in names.most_common())
        raise TraceError(sources.name, None, f"holds files of several formats: {counts}. Name those of one")
    (format_,) = names
    gone = {at for at in problems if not sources.files[at].named or magic(sources.files[at], 1) == b""}
    if issubclass(FORMATS[format_], TableReader):  # the second part of a table that was cut has no header
        goes_on = {at for at in problems if _goes_on(sources.files[at], sources.files[min(formats)])}
        problems = {at: e for at, e in problems.items() if at not in goes_on}
        gone -= goes_on
    if named := [e for at, e in problems.items() if at not in gone]:
        raise named[0]
    if not gone:
        return sources, format_, []
    listed = ", ".join(safe(sources.files[at].name, 100) for at in sorted(gone)[:5])
    more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
    return (
        Sources(sources.name, tuple(file for at, file in enumerate(sources.files) if at not in gone)),
        format_,
        [f"{len(gone)} files are empty or in no known format, and not read: {listed}{more}"],
    )


def _goes_on(file: TraceFile, first: TraceFile) -> bool:
    """Whether a file without a header has as many fields in its first line as another has in its header."""
    (_, header), (_, line) = (next(iter(records(each)), (0, b"")) for each in (first, file))
    mark, names = header_of(header)
    fields = attempt(lambda record: split(record, mark), line)
    return not line.lstrip().startswith(b"{") and isinstance(fields, list) and len(fields) == len(names)


_MAGIC = {
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 first (iconv)",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 first (iconv)",
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"<": "HTML or XML, perhaps an error page saved as a file",
}


_SERVEGEN = re.compile(
    rb'\d+,[\d.]+,[\d.]+,(Gamma|Weibull)?,[\d.e-]+,[\d.e-]+\s*$|\{\s*"\d+": \{\s+"\w+_(tokens|ratio)"'
)


_TOTALS = frozenset({"usage_input_tokens_no_cache", "n_context_tokens_total", "n_generated_tokens_total"})
"""Columns of a provider's usage export, whose rows add up the calls of a day."""


def _looks_like(first: bytes) -> str:
    if _TOTALS & set(header_of(first[:10_000])[1]):
        return (
            "; it looks like a provider's usage export: totals of days, in which there is no request. Use a log of "
            "calls, or draw a trace with these totals: 'harness trace synth'"
        )
    if _SERVEGEN.match(first):
        return "; it looks like a ServeGen client model, not requests: 'harness trace synth --servegen' draws a trace"
    line = first.partition(b"\r")[0]
    for name, reader in FORMATS.items():
        if reader.sniff(line) and not first.startswith(b"{"):
            return f"; it looks like {name} with lines that end in a carriage return: convert it (tr '\\r' '\\n')"
    if first.startswith(b"{"):
        try:
            msgspec.json.decode(first)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
            return f"; it is no JSON object on one line ({e})"
    return next((f"; it looks like {what}" for magic, what in _MAGIC.items() if first.startswith(magic)), "")
