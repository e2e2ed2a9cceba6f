"""The Grafana dashboards: panels as data, written to helm/baton/dashboards by `scripts/write_chart.py`.

Every metric and label in a query is checked against the code that registers it (tests/unit/test_chart.py). Series of a
service carry `namespace` from the scrape and the two labels that the operator's ServiceMonitor copies from the
Services: which LLMService it is, and which component.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SERVICE_LABEL = "serving_baton_dev_service"
COMPONENT_LABEL = "app_kubernetes_io_component"
_OF_SERVICE = f'namespace="$namespace",{SERVICE_LABEL}="$service"'
_AT_GATEWAY = f'{_OF_SERVICE},{COMPONENT_LABEL}="gateway"'
_AT_WORKERS = f'{_OF_SERVICE},{COMPONENT_LABEL}=~"prefill|decode"'


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]  # PromQL and legend
    help: str = ""


def rate(metric: str, where: str) -> str:
    return f"sum(rate({metric}{{{where}}}[$__rate_interval]))"


def rates(metric: str, where: str, *by: str) -> tuple[tuple[str, str], ...]:
    """One line for each value of these labels."""
    query = f"sum by ({', '.join(by)}) (rate({metric}{{{where}}}[$__rate_interval]))"
    return ((query, " ".join(f"{{{{{label}}}}}" for label in by)),)


def quantiles(metric: str, where: str) -> tuple[tuple[str, str], ...]:
    buckets = f"sum by (le) (rate({metric}_bucket{{{where}}}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {buckets})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99))


def gauge(metric: str, where: str, by: str) -> tuple[str, str]:
    return f"sum by ({by}) ({metric}{{{where}}})", f"{{{{{by}}}}}"


SERVICE = (
    Panel("Requests", "reqps", rates("vllm:request_success_total", _AT_GATEWAY, "finished_reason")),
    Panel("First token", "s", quantiles("vllm:time_to_first_token_seconds", _AT_GATEWAY), "What a user waits for."),
    Panel("Gap between tokens", "s", quantiles("vllm:inter_token_latency_seconds", _AT_GATEWAY)),
    Panel("End to end", "s", quantiles("vllm:e2e_request_latency_seconds", _AT_GATEWAY)),
    Panel(
        "Requests at the gateway",
        "short",
        (
            (f"sum(vllm:num_requests_running{{{_AT_GATEWAY}}})", "running"),
            (f"sum(vllm:num_requests_waiting{{{_AT_GATEWAY}}})", "waiting for a first token"),
        ),
    ),
    Panel(
        "Tokens",
        "short",
        (
            (rate("vllm:prompt_tokens_total", _AT_GATEWAY), "in"),
            (rate("vllm:prompt_tokens_cached_total", _AT_GATEWAY), "in, cached"),
            (rate("vllm:generation_tokens_total", _AT_GATEWAY), "out"),
        ),
    ),
    Panel(
        "The four queues of a P/D system",
        "short",
        (
            (f"sum(baton_prefill_queue_requests{{{_OF_SERVICE}}})", "not yet computed (P)"),
            (f"sum(baton_prefill_held_requests{{{_OF_SERVICE}}})", "KV published, not taken (P)"),
            (f"sum(baton_decode_promised_requests{{{_OF_SERVICE}}})", "waits for P (D)"),
            (f"sum(baton_decode_filling_requests{{{_OF_SERVICE}}})", "KV arriving (D)"),
        ),
        "The first two growing: too little prefill. The last two: too little decode memory, or a slow transport.",
    ),
    Panel(
        "Where prompts are prefilled", "reqps", rates("baton_gateway_prefill_path_total", _AT_GATEWAY, "path", "reason")
    ),
    Panel("KV hand-over", "s", quantiles("baton_transfer_seconds", _OF_SERVICE), "End of prefill to KV committed."),
    Panel("KV moved", "Bps", rates("baton_transfer_bytes_total", _OF_SERVICE, "transport")),
    Panel("KV in use", "percentunit", (gauge("vllm:kv_cache_usage_perc", _AT_WORKERS, "engine"),)),
    Panel(
        "Prefix cache hit rate",
        "percentunit",
        (
            (
                rate("vllm:prefix_cache_hits_total", _AT_WORKERS)
                + " / "
                + rate("vllm:prefix_cache_queries_total", _AT_WORKERS),
                "of prompt tokens",
            ),
        ),
    ),
    Panel(
        "Workers that the gateways see",
        "short",
        (
            (f"min(baton_gateway_prefill_workers{{{_AT_GATEWAY}}})", "prefill"),
            (f"min(baton_gateway_decode_workers{{{_AT_GATEWAY}}})", "decode"),
        ),
    ),
    Panel(
        "What went wrong",
        "short",
        (
            (rate("baton_gateway_failovers_total", _AT_GATEWAY), "failovers"),
            (rate("baton_prefill_fallbacks_total", _OF_SERVICE), "prefill given up"),
            (rate("baton_verification_failures_total", _OF_SERVICE), "KV refused"),
            (rate("vllm:admission_rejections_total", _AT_GATEWAY), "turned away"),
        ),
    ),
    Panel("Preemptions", "short", rates("vllm:num_preemptions_total", _AT_WORKERS, "engine")),
    Panel("Start of workers", "s", ((f"max by (phase) (baton_startup_phase_seconds{{{_AT_WORKERS}}})", "{{phase}}"),)),
)


_OF_OPERATOR = 'namespace="$namespace"'

OPERATOR = (
    Panel("Passes over LLMServices", "ops", rates("baton_operator_reconciles_total", _OF_OPERATOR, "outcome")),
    Panel("Time of a pass", "s", quantiles("baton_operator_reconcile_duration_seconds", _OF_OPERATOR)),
    Panel("Errors", "ops", rates("baton_operator_reconcile_errors_total", _OF_OPERATOR, "error")),
    Panel("LLMServices that are due", "short", ((f"sum(baton_operator_queue_depth{{{_OF_OPERATOR}}})", "queue"),)),
    Panel(
        "Writes",
        "ops",
        rates("baton_operator_writes_total", _OF_OPERATOR, "kind", "step"),
        "Zero while nothing changes.",
    ),
    Panel("Calls to the API server", "ops", rates("baton_operator_api_calls_total", _OF_OPERATOR, "verb", "code")),
    Panel("Objects", "short", (gauge("baton_operator_managed_objects", _OF_OPERATOR, "kind"),)),
    Panel(
        "Age of the last pass, event and list",
        "s",
        (
            (f"time() - max(baton_operator_last_reconcile_timestamp_seconds{{{_OF_OPERATOR}}})", "pass"),
            (f"time() - max(baton_operator_last_watch_event_timestamp_seconds{{{_OF_OPERATOR}}})", "watch event"),
            (f"time() - max(baton_operator_last_resync_timestamp_seconds{{{_OF_OPERATOR}}})", "list of everything"),
        ),
    ),
    Panel(
        "Changes that no watch event had",
        "short",
        rates("baton_operator_missed_changes_total", _OF_OPERATOR, "kind"),
        "Found by a later list. Above zero now and then is harmless, always is a broken watch.",
    ),
)


def dashboards() -> dict[str, dict[str, Any]]:
    choices = [
        _variable("namespace", "label_values(baton_gateway_decode_workers, namespace)"),
        _variable("service", f'label_values(baton_gateway_decode_workers{{namespace="$namespace"}}, {SERVICE_LABEL})'),
    ]
    where = [_variable("namespace", "label_values(baton_operator_queue_depth, namespace)")]
    return {
        "service": _dashboard("baton-service", "Baton / Service", SERVICE, choices),
        "operator": _dashboard("baton-operator", "Baton / Operator", OPERATOR, where),
    }


def _dashboard(uid: str, title: str, panels: tuple[Panel, ...], variables: list[dict[str, Any]]) -> dict[str, Any]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "uid": uid,
        "title": title,
        "tags": ["baton"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, *variables]},
        "panels": [_panel(i, panel) for i, panel in enumerate(panels)],
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _panel(i: int, panel: Panel) -> dict[str, Any]:
    """Two beside each other."""
    return {
        "id": i + 1,
        "type": "timeseries",
        "title": panel.title,
        **({"description": panel.help} if panel.help else {}),
        "datasource": _SOURCE,
        "gridPos": {"x": 12 * (i % 2), "y": 8 * (i // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": query, "legendFormat": legend}
            for n, (query, legend) in enumerate(panel.queries)
        ],
    }
