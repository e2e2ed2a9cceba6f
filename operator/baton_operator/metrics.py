"""What the operator says of itself at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics


class Metrics:
    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        disable_created_metrics()  # as in the services: a second series beside each counter, which nobody asks for
        self.registry = registry = registry or CollectorRegistry()
        self.reconciles = Counter(
            "baton_operator_reconciles", "Passes over an LLMService by outcome", ["outcome"], registry=registry
        )
        self.reconcile_seconds = Histogram(
            "baton_operator_reconcile_duration_seconds", "Time of a pass, calls and probes included",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30), registry=registry,
        )  # fmt: skip
        self.errors = Counter(
            "baton_operator_reconcile_errors", "Passes that ended early or left something undone, by error", ["error"],
            registry=registry,
        )  # fmt: skip
        self.queue = Gauge(
            "baton_operator_queue_depth", "LLMServices that are due or being looked at", registry=registry
        )
        self.managed = Gauge(
            "baton_operator_managed_objects", "Objects in the cache by kind", ["kind"], registry=registry
        )
        self.api_calls = Counter(
            "baton_operator_api_calls", "Calls to the API server, watches excepted", ["verb", "kind", "code"],
            registry=registry,
        )  # fmt: skip
        self.writes = Counter(
            "baton_operator_writes", "Changes made, by kind and step", ["kind", "step"], registry=registry
        )
        self.watch_events = Counter("baton_operator_watch_events", "Watch events by kind", ["kind"], registry=registry)
        self.missed = Counter(
            "baton_operator_missed_changes", "Changes that a list showed and no watch event had", ["kind"],
            registry=registry,
        )  # fmt: skip
        self.last_event = Gauge("baton_operator_last_watch_event_timestamp_seconds", "When", registry=registry)
        self.last_reconcile = Gauge("baton_operator_last_reconcile_timestamp_seconds", "When", registry=registry)
        self.last_resync = Gauge(
            "baton_operator_last_resync_timestamp_seconds", "When everything was last listed", registry=registry
        )
