"""Write the tables of docs/{metrics,configuration,llmservice}.md from the code, so that they cannot rot.

    python scripts/write_docs.py           writes them
    python scripts/write_docs.py --check   exits with 1 if they are not up to date (a test runs this)

Prose around the tables is written by hand; a table lies between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "operator")]
PAGES = ("metrics", "configuration", "llmservice")
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> int:
    stale = [page for page in PAGES if not write_page(ROOT / "docs" / f"{page}.md", only_check="--check" in sys.argv)]
    if stale and "--check" in sys.argv:
        print(f"not up to date: {', '.join(stale)}; run `python scripts/write_docs.py`")
        return 1
    return 0


def write_page(path: Path, *, only_check: bool) -> bool:
    """Fill the page's tables; False if it was not up to date."""
    old = path.read_text()
    new = _MARKED.sub(lambda found: found[1] + render(found[2]) + found[3], old)
    if new != old and not only_check:
        path.write_text(new)
    return new == old


def render(table: str) -> str:
    if table == "metrics":
        head = ("Name", "Type", "Labels", "Process", "Meaning")
        rows = [
            (f"`{m.name}`", m.type, ", ".join(f"`{label}`" for label in m.labels), m.process, m.meaning)
            for m in merged(all_metrics())
        ]
    elif table == "llmservice":
        head, rows = ("Field", "Values", "Default", "Read by", "Meaning"), list(resource_rows())
    else:
        head, rows = ("Flag", "Default", "Meaning"), list(flag_rows(table))
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


# ---------------------------------------------------------------- metrics


@dataclass(frozen=True)
class MetricRow:
    name: str  # as on the wire: counters end in _total
    type: str
    labels: tuple[str, ...]
    process: str
    meaning: str


def all_metrics() -> list[MetricRow]:
    """What each kind of process registers, asked of the code that registers it."""
    registries = {"gateway": _gateway_registry(), **_worker_registries(), "operator": _operator_registry()}
    return [row for process, registry in registries.items() for row in _rows_of(registry, process)]


def merged(rows: Iterable[MetricRow]) -> list[MetricRow]:
    """One row where several processes mean the same; `vllm:` names first."""
    processes: dict[MetricRow, list[str]] = {}
    for row in rows:
        processes.setdefault(dataclasses.replace(row, process=""), []).append(row.process)
    joined = [dataclasses.replace(row, process=", ".join(names)) for row, names in processes.items()]
    return sorted(joined, key=lambda row: (not row.name.startswith("vllm:"), row.name, row.process))


def _gateway_registry() -> Any:
    from gateway.admission import Admission, AdmissionLimits
    from gateway.metrics import GatewayMetrics
    from gateway.process import add_gauges

    metrics = GatewayMetrics("m")
    table = types.SimpleNamespace(statuses=lambda: [])
    pool: Any = types.SimpleNamespace(connections={}, prefill={}, table=table)
    add_gauges(metrics, Admission(AdmissionLimits(1, 1), time.monotonic), pool)
    return metrics.registry


def _worker_registries() -> dict[str, Any]:
    from servicekit.metrics import Metrics
    from workerkit.metrics import (
        DecodeQueueMetrics,
        EngineMetrics,
        PrefillQueueMetrics,
        StagingMetrics,
        count_startup,
        show_registries,
    )

    found: dict[str, Any] = {}
    for process, queues in (("prefill", PrefillQueueMetrics), ("decode", DecodeQueueMetrics)):
        metrics = Metrics("m", f"{process}-0")
        facts: Any = types.SimpleNamespace(
            block_size=16, block_bytes=0, num_blocks=1, kv_dtype="", kernels="", device=""
        )
        EngineMetrics(metrics, facts)
        StagingMetrics(metrics)
        queues(metrics)
        count_startup(metrics, {})
        show_registries(metrics, ())
        found[process] = metrics.registry
    return found


def _operator_registry() -> Any:
    from baton_operator.metrics import Metrics

    return Metrics().registry


def _rows_of(registry: Any, process: str) -> Iterable[MetricRow]:
    for collector in list(registry._collector_to_names):  # its only list of label names that have no value yet
        for family in collector.collect():
            labels = getattr(collector, "_labelnames", None)
            if labels is None:
                labels = [name for name in family.samples[0].labels if name != "le"]
            name = family.name + ("_total" if family.type == "counter" else "")
            yield MetricRow(name, family.type, tuple(sorted(labels)), process, family.documentation)


# ---------------------------------------------------------------- settings


def flag_rows(process: str) -> Iterable[tuple[str, str, str]]:
    from decode_service.config import DecodeConfig
    from gateway.config import GatewayConfig
    from prefill_service.config import PrefillConfig
    from workerkit.config import WorkerConfig

    own: dict[str, Any] = {"gateway": GatewayConfig, "prefill": PrefillConfig, "decode": DecodeConfig}
    shared = {field.name: field for field in dataclasses.fields(WorkerConfig)}
    config = own.get(process, WorkerConfig)
    for field in dataclasses.fields(config):
        if process in ("prefill", "decode") and field == shared.get(field.name):
            continue  # in the table of what workers share
        if process in ("prefill", "decode") and _is_same_option(field, shared.get(field.name)):
            continue
        yield _flag_row(field)


def _is_same_option(field: Any, other: Any) -> bool:
    return other is not None and field.default == other.default and field.metadata["option"] == other.metadata["option"]


def _flag_row(field: Any) -> tuple[str, str, str]:
    from servicekit.config import limits_text

    note = field.metadata["option"]
    default = field.default
    if default is dataclasses.MISSING:
        shown = "required"
    elif isinstance(default, Enum):
        shown = f"`{default.value}`"
    elif isinstance(default, tuple):
        shown = f"`{':'.join(map(str, default)) if note.metavar == 'HOST:PORT' else ','.join(map(str, default))}`"
        shown = "" if shown == "``" else shown
    else:
        shown = "" if default in (None, "") else f"`{str(default).lower() if isinstance(default, bool) else default}`"
    choices = f": {', '.join(note.choices)}" if note.choices else ""
    return f"`--{field.name.replace('_', '-')}`", shown, note.help + choices + limits_text(note)


def resource_rows() -> Iterable[tuple[str, str, str, str, str]]:
    from baton_operator.resources import LLMService

    yield from _fields_of(LLMService, "")


def _fields_of(part: Any, path: str) -> Iterable[tuple[str, str, str, str, str]]:
    from baton_operator.resources import Pools, scope_of

    if part is Pools:  # both have the same fields
        yield from _fields_of(_model_in(part.model_fields["decode"].annotation), f"{path}*.")
        return
    schema = part.model_json_schema(by_alias=True)
    for name, field in part.model_fields.items():
        alias = field.alias or name
        inner = _model_in(field.annotation)
        if inner is not None:
            is_list = typing.get_origin(field.annotation) is tuple
            yield from _fields_of(inner, f"{path}{alias}{'[]' if is_list else ''}.")
            continue
        default = (
            ""
            if field.is_required() or field.default is None
            else _default(field.get_default(call_default_factory=True))
        )
        yield (
            f"`{path}{alias}`",
            _values(schema["properties"][alias], field.annotation),
            default,
            {"cluster": "cluster", "local": "local mode"}.get(scope_of(field.json_schema_extra), "both"),
            field.description or "",
        )


def _model_in(annotation: Any) -> Any:
    """The model itself, or that of an optional one or of a list."""
    choices = (annotation, *typing.get_args(annotation))
    return next((c for c in choices if isinstance(c, type) and hasattr(c, "model_fields")), None)


def _default(value: Any) -> str:
    return "" if value in ((), {}, "") else f"`{_plain(value)}`"


def _values(schema: dict[str, Any], annotation: Any) -> str:
    """What may stand there, in words."""
    limits = next(choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null")
    members = next((a for a in (annotation, *typing.get_args(annotation)) if _is_enum(a)), None)
    if members is not None:
        return ", ".join(f"`{member.value}`" for member in members)
    if "enum" in limits or "const" in limits:
        return ", ".join(f"`{value}`" for value in limits.get("enum", [limits.get("const")]))
    if limits.get("x-kubernetes-int-or-string"):
        return "amount (`500m`, `512Mi`, `2Gi`)"
    if "ms|s|m|h" in limits.get("pattern", ""):
        return "duration (`500ms`, `2s`, `1m30s`)"
    if limits["type"] == "object":
        values = limits.get("additionalProperties")
        return f"names, each with {_values(values, None)}" if isinstance(values, dict) else "as in a pod"
    if limits["type"] == "array":
        return f"list of {_values(limits['items'], None)}"
    kind = {"integer": "whole number", "boolean": "true or false", "string": "text"}[limits["type"]]
    low, high = limits.get("minimum"), limits.get("maximum")
    if low is not None:
        kind += f", {low} to {high}" if high is not None else f", at least {low}"
    return kind + (f", at most {limits['maxLength']} characters" if "maxLength" in limits else "")


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Enum)


def _plain(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, float):
        return f"{value:g}s"  # the only ones are durations
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
