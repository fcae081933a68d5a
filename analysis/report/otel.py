"""Runs as OpenTelemetry traces over OTLP/HTTP: a span for each run, and for each request one linked to it.

Where they go and with which headers is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT and others).
Attributes are those of the GenAI conventions, and ``harness.*``. No prompt and no answer is sent.
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from harness.analysis.flat import figures
from harness.analysis.report.export import iter_batches
from harness.analysis.rows.read import Run
from harness.analysis.summary import Summary
from harness.errors import HarnessError
from harness.install import require

BATCH = 512
FIGURES = ("ttft_s", "tpot_s", "e2e_s", "lag_s")
Attributes = dict[str, str | float | int | bool]


class OtelExporter:
    """Sends runs; a context manager. Raises `HarnessError` where a package is missing, or the receiver refuses."""

    def __init__(self) -> None:
        trace: Any = require("opentelemetry.trace", extra="otel")
        sdk: Any = require("opentelemetry.sdk.trace", extra="otel")
        resources: Any = require("opentelemetry.sdk.resources", extra="otel")
        otlp: Any = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", extra="otel")
        self._trace, self._exporter = trace, otlp.OTLPSpanExporter()
        self._sent: list[Any] = []
        provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": "harness"}))
        provider.add_span_processor(_Collected(self._sent, sdk.SpanProcessor))
        self._tracer = provider.get_tracer("harness")

    def __enter__(self) -> OtelExporter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._exporter.shutdown()

    def send(self, run: Run, summary: Summary, label: str) -> int:
        """All spans of a run; their number."""
        start_ns = run.manifest.start_unix_ns
        if start_ns is None:
            raise HarnessError(f"{run.path}: never started, so it has no times")
        rows, end_ns, sent = 0, start_ns + (run.manifest.end_ns or 0), 0
        context = self._trace.set_span_in_context(self._trace.INVALID_SPAN)
        root = self._tracer.start_span(
            f"harness run {label}", context=context, start_time=start_ns, attributes=_of_run(summary, label)
        )
        link = self._trace.Link(root.get_span_context())
        operation = "chat" if run.manifest.spec.endpoint == "chat" else "text_completion"
        kind, failed = self._trace.SpanKind.CLIENT, self._trace.Status(self._trace.StatusCode.ERROR)
        for batch in iter_batches(run, label):
            for row in _sent_rows(batch):
                span = self._tracer.start_span(
                    f"{operation} {summary.model}", context=context, kind=kind, links=[link],
                    start_time=start_ns + row["sent_ns"], attributes=_of_request(row, operation, summary, label),
                )  # fmt: skip
                if row["error"] is not None:
                    span.set_status(failed)
                ended_ns = start_ns + (row["finished_ns"] if row["finished_ns"] is not None else row["sent_ns"])
                end_ns = max(end_ns, ended_ns)
                span.end(end_time=ended_ns)
                rows += 1
            sent += self._flush(BATCH)
        root.end(end_time=end_ns)
        return sent + self._flush(1)

    def _flush(self, least: int) -> int:
        sent = 0
        while len(self._sent) >= least:
            some = self._sent[:BATCH]
            del self._sent[:BATCH]
            if self._exporter.export(some).name != "SUCCESS":
                raise HarnessError(
                    "the OTLP receiver did not take the spans; where they go is said by OTEL_EXPORTER_OTLP_ENDPOINT "
                    "(default http://localhost:4318)"
                )
            sent += len(some)
        return sent


def _Collected(into: list[Any], base: Any) -> Any:  # noqa: N802 - a class, of a base that is not always installed
    """A processor that keeps ended spans: the SDK's own drops those that come faster than they are sent."""

    class Collected(base):  # type: ignore[misc]
        def on_end(self, span: Any) -> None:
            into.append(span)

    return Collected()


def _sent_rows(batch: pa.RecordBatch) -> Iterator[Mapping[str, Any]]:
    some = batch.select(
        ["request_id", "replica", "sent_ns", "finished_ns", "input_tokens", "output_tokens", "finish_reason",
         "http_status", "error", "retries", "measured", *FIGURES]
    )  # fmt: skip
    return (row for row in some.to_pylist() if row["sent_ns"] is not None)


def _of_run(s: Summary, label: str) -> Attributes:
    found: Attributes = {
        "harness.run": label, "harness.run_id": s.run_id, "harness.verdict": s.verdict,
        "harness.evidence": s.evidence, "gen_ai.request.model": s.model,
    }  # fmt: skip
    if s.verdict != "INVALID":  # else they prove nothing
        found |= {f"harness.{name}": q.value for name, q in figures(s).items() if q.value is not None}
    return found


def _of_request(row: Mapping[str, Any], operation: str, s: Summary, label: str) -> Attributes:
    reason = row["finish_reason"]
    known = {
        "harness.run": label, "harness.request_id": row["request_id"], "harness.replica": row["replica"],
        "harness.measured": row["measured"], "harness.retries": row["retries"],
        **{f"harness.{name}": row[name] for name in FIGURES},
        "gen_ai.operation.name": operation, "gen_ai.request.model": s.model,
        "gen_ai.usage.input_tokens": row["input_tokens"], "gen_ai.usage.output_tokens": row["output_tokens"],
        "gen_ai.response.finish_reasons": None if reason is None else [reason],
        "http.response.status_code": row["http_status"], "error.type": row["error"],
    }  # fmt: skip
    return {name: value for name, value in known.items() if value is not None}
