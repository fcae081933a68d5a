"""Write the JSON Schema of every machine-readable document anew: ``python -m tests.schemas``.

Schemas are made from the types that the documents are written from, into `harness/schemas`, which is installed. What a
version once promised (each path and its types) is kept in ``promised.json`` beside it: a document may get more
fields, but one that loses a field, or gives it another type, needs a new version; without it nothing is written.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema_rs
import msgspec
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = ROOT / "harness" / "schemas"
PROMISED = Path(__file__).with_name("promised.json")
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """A document: its name and version, its type as ``module:name``, and whether it is a file of its own."""

    schema: str
    type: str
    where: str
    """What writes it."""
    version_key: str | None = None
    """Of a file: the field that holds the version alone. ``schema`` stands in it when it is printed."""
    without: tuple[str, ...] = ()
    extra: Mapping[str, Schema] | None = None


_OPEN = {
    "file": {"type": "string"}, "format": {"type": "string"}, "sha256": {"type": ["string", "null"]},
    "rows_read": {"type": "integer"}, "rows_kept": {"type": "integer"},
    "rows_dropped": {"type": "object", "additionalProperties": {"type": "integer"}}, "rows_failed": {"type": "integer"},
    "examples": {"type": "object", "additionalProperties": {"type": "string"}}, "clock": {"type": ["string", "null"]},
    "blocks": {"type": ["string", "null"]}, "grid_s": {"type": ["number", "null"]},
    "notes": {"type": "array", "items": {"type": "string"}},
}  # fmt: skip
DOCUMENTS = (
    Document("harness.report/1", "harness.analysis.summary:Summary", "harness report RUN, run, replay, simulate",
             without=("sampled",)),
    Document("harness.runs/1", "harness.cli.documents:RunsReport", "harness report RUN RUN ..."),
    Document("harness.variant/1", "harness.cli.documents:VariantReport", "harness report --variant"),
    Document("harness.compare/1", "harness.analysis.compare.compare:Comparison", "harness compare"),
    Document("harness.capacity/1", "harness.cli.runner.capacity:CapacityReport", "harness capacity; capacity.json"),
    Document("harness.price/1", "harness.analysis.pricing.rate_card:PriceReport", "harness price"),
    Document("harness.fleet/1", "harness.analysis.capacity.fleet_plan:FleetPlan", "harness plan-fleet"),
    Document("harness.advice/1", "harness.cli.documents:Advice", "harness advise"),
    Document("harness.audit/1", "harness.analysis.audit.report:AuditReport", "harness audit; its report.json"),
    Document("harness.audit-plan/1", "harness.cli.documents:AuditPlan", "harness audit --dry-run"),
    Document("harness.audit-grades/1", "harness.cli.documents:AuditGrades", "harness audit grade"),
    Document("harness.lint/1", "harness.checks.lint:Lint", "harness audit lint", extra={"sound": {"type": "boolean"}}),
    Document("harness.sweep-plan/1", "harness.cli.documents:SweepPlan", "harness sweep --dry-run"),
    Document("harness.trace/1", "harness.trace.shape:TraceShape", "harness trace inspect", extra=_OPEN),
    Document("harness.tiers/1", "harness.cli.documents:TierList", "harness tiers"),
    Document("harness.tier-changes/1", "harness.cli.documents:TierChanges", "harness tiers refresh"),
    Document("harness.model-calibration/1", "harness.cluster.hardware.calibration:ModelCalibration",
             "harness calibrate-model; its file"),
    Document("harness.bundle/1", "harness.cluster.deploy.bundle:Bundle", "harness bundle; its manifest"),
    Document("harness.models/1", "harness.cli.documents:ModelList", "harness models"),
    Document("harness.doctor/1", "harness.cli.machines:Doctor", "harness doctor"),
    Document("harness.processes/1", "harness.cli.documents:ProcessList", "harness ps"),
    Document("harness.clusters/1", "harness.cli.documents:ClusterList", "harness cluster status"),
    Document("harness.run/1", "harness.record.manifest:RunManifest", "run.json", version_key="schema_version"),
    Document("harness.plan/2", "harness.plan.file:PlanInfo", "harness plan; in plan.arrow",
             version_key="schema_version"),
    Document("harness.sweep/1", "harness.sweep.state:SweepState", "harness sweep; sweep.json",
             version_key="schema_version"),
    Document("harness.audit-state/1", "harness.audit.asked:AuditState", "audit.json", version_key="schema_version"),
    Document("harness.calibration/1", "harness.calibration:Calibration", "harness calibrate; its file in the cache",
             version_key="schema_version"),
)  # fmt: skip
TABLES = {
    "rows": ("harness.record.results:SCHEMA", "results-*.arrows"),
    "plan-rows": ("harness.plan.file:SCHEMA", "plan.arrow"),
    "workers": ("harness.record.samples:WORKER_SCHEMA", "worker-*.arrows"),
    "server-metrics": ("harness.record.samples:SERVER_SCHEMA", "server-metrics-*.arrows"),
    "server-processor": ("harness.record.samples:PROCESSOR_SCHEMA", "server-processor-*.arrows"),
    "host": ("harness.record.samples:HOST_SCHEMA", "host-*.arrows"),
}
"""Columns of Arrow files: name, schema and file."""


def file_name(schema: str) -> str:
    """``harness.report/1`` is in ``report-1.json``."""
    name, version = schema.removeprefix("harness.").split("/")
    return f"{name}-{version}.json"


def made() -> dict[str, Schema]:
    """Every file of `harness/schemas` by its name."""
    files = {file_name(document.schema): schema_of(document) for document in DOCUMENTS}
    return files | {f"{name}.arrow.json": columns_of(*table) for name, table in TABLES.items()}


def schema_of(document: Document) -> Schema:
    """The JSON Schema of one document. What it says of a field is the type's own docstring."""
    (body,), definitions = msgspec.json.schema_components(
        [_found(document.type)], schema_hook=_plain, ref_template="#/$defs/{name}"
    )
    name = body["$ref"].rpartition("/")[2]
    body = definitions.pop(name)
    properties = {key: value for key, value in body["properties"].items() if key not in document.without}
    version = document.schema.rpartition("/")[2]
    required = [key for key in body.get("required", ()) if key in properties]
    if document.version_key is None:
        properties = {"schema": {"const": document.schema}} | {k: v for k, v in properties.items() if k != "schema"}
        properties |= document.extra or {}
        required = list(properties)
        for definition in definitions.values():
            if "properties" in definition:  # all fields are written, those with defaults among them
                definition["required"] = list(definition["properties"])
    else:
        properties = {"schema": {"const": document.schema}} | properties | {document.version_key: {"const": version}}
        required = list(dict.fromkeys([*required, document.version_key]))
    return {
        "$schema": DIALECT, "$id": document.schema, "title": document.schema, "description": f"Of {document.where}.",
        "type": "object", "properties": properties, "required": required, "$defs": dict(sorted(definitions.items())),
    }  # fmt: skip


def columns_of(place: str, file: str) -> Schema:
    """The columns of an Arrow file; the version is in the file's own metadata."""
    schema: pa.Schema = _found(place)
    about = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    columns = [{"name": field.name, "type": str(field.type), "nullable": field.nullable} for field in schema]
    return {"file": file, "metadata": about, "columns": columns}


def _plain(kind: type) -> Schema:
    if kind is object:
        return {"type": ["array", "boolean", "null", "number", "object", "string"]}
    if issubclass(kind, Path):
        return {"type": "string"}
    raise NotImplementedError


def _found(place: str) -> Any:
    module, name = place.split(":")
    return getattr(_complete(importlib.import_module(module), set()), name)


def _complete(module: ModuleType, seen: set[str]) -> ModuleType:
    """Give a module the names that it imports for type checkers alone: its annotations name them."""
    if module.__name__ in seen or not module.__name__.startswith("harness"):
        return module
    seen.add(module.__name__)
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for one in node.body:
                if isinstance(one, ast.ImportFrom) and one.module and one.module.startswith("harness"):
                    source = _complete(importlib.import_module(one.module), seen)
                    for alias in one.names:
                        vars(module).setdefault(alias.asname or alias.name, getattr(source, alias.name))
    return module


Promise = str | dict[str, "Promise"]
"""Types of a value, ``null|number``; of what has parts each part, and the types under the empty name."""


def promises(schema: Schema) -> Promise:
    """What a reader may count on: each field and its types. ``[]`` is an element of a list, ``*`` any key."""
    if "columns" in schema:
        return {column["name"]: column["type"] for column in schema["columns"]}
    return _promise(schema, schema, ())


def _promise(node: Schema, whole: Schema, above: tuple[str, ...]) -> Promise:
    kinds: set[str] = set()
    parts: dict[str, Promise] = {}
    for part in node.get("anyOf", [node]):
        name = part.get("$ref", "").rpartition("/")[2]
        target = whole["$defs"][name] if name else part
        kinds |= _kinds(target)
        if name in above:
            continue
        inside = {**target.get("properties", {}), "[]": target.get("items"), "*": target.get("additionalProperties")}
        inside |= {f"[{k}]": child for k, child in enumerate(target.get("prefixItems", ()))}
        for key, child in inside.items():
            if isinstance(child, dict):
                parts[key] = _promise(child, whole, (*above, name) if name else above)
    words = "|".join(sorted(kinds))
    return {"": words, **parts} if parts else words


def _kinds(part: Schema) -> set[str]:
    kind = part.get("type")
    if kind is None:
        values = [part["const"]] if "const" in part else part["enum"]
        named = {type(None): "null", str: "string", bool: "boolean", int: "integer", float: "number"}
        return {named[type(value)] for value in values}
    return {kind} if isinstance(kind, str) else set(kind)


def broken(promised: Promise, now: Promise, path: str = "$") -> list[str]:
    """What a version promised and does not hold any more."""
    before, after = (one if isinstance(one, dict) else {"": one} for one in (promised, now))
    faults = []
    for key, was in before.items():
        where = f"{path}.{key}" if key else path
        if key not in after:
            faults.append(f"{where} is gone")
        elif key:
            faults += broken(was, after[key], where)
        elif not set(str(after[key]).split("|")) <= set(str(was).split("|")):
            faults.append(f"{where} was {was}, is {after[key]}")
    return faults


def check(document: Schema, *, closed: bool = True) -> None:
    """Hold a document against its installed schema; ``closed``: it has no field that the schema does not name."""
    schema = json.loads((SCHEMAS / file_name(document["schema"])).read_text())
    for part in (schema, *schema["$defs"].values()):
        if closed and "properties" in part:
            part["additionalProperties"] = False
    errors = jsonschema_rs.validator_for(schema).iter_errors(document)
    assert [f"{error.instance_path}: {error.message}"[-300:] for error in errors] == []


def text(value: object) -> str:
    """As it is written."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write all, unless a version would break what it promised."""
    files = made()
    promised: dict[str, Promise] = json.loads(PROMISED.read_text()) if PROMISED.exists() else {}
    now = {name: promises(schema) for name, schema in files.items()}
    faults = [f"{name}: {fault}" for name in now.keys() & promised for fault in broken(promised[name], now[name])]
    if faults:
        print(
            *sorted(faults),
            "a reader of that version would break: give it a new version",
            sep="\n",
        )
        return 1
    SCHEMAS.mkdir(exist_ok=True)
    for name, schema in files.items():
        (SCHEMAS / name).write_text(text(schema))
    lines = [
        f"{json.dumps(name)}: {json.dumps(kept, separators=(',', ':'))}"
        for name, kept in sorted((promised | now).items())
    ]
    PROMISED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
