"""What this gateway knows, for the operator: which revision serves, who is there, whether the registry answers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gateway import revisions
from gateway.worker_pool import WorkerPool


def status_of(pool: WorkerPool) -> dict[str, Any]:
    """The answer of GET /internal/status. `servingRevision` is what the routing file said last, null if it never did;
    `routedRevision` is where a request would go now, null if it would have to wait."""
    decode, prefill = pool.decode_states(), pool.prefill_states()
    able = [worker for worker in decode if not worker.is_draining]
    sources = pool.table.statuses()
    return {
        "gateway": pool.hello.caller_id,
        "servingRevision": pool.routing_file.serving,
        "routedRevision": revisions.choose(pool.preference, able, prefill),
        "revisions": {name: asdict(count) for name, count in sorted(revisions.count(decode, prefill).items())},
        "registry": {
            "connected": all(source.is_connected for source in sources),
            "sources": [
                {
                    "name": source.name,
                    "connected": source.is_connected,
                    "ageSeconds": None if source.age_s is None else round(source.age_s, 3),
                    "members": source.num_members,
                    "error": source.error,
                }
                for source in sources
            ],
        },
    }
