"""What a decode worker remembers of one attempt of a request, from its acceptance to its end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from decode_service.placement import PrefillPath
from decode_service.stream import GatewayStream
from engine.messages import BlockSlot, EngineRequest, PrefixMatch, RequestStats
from kvtransfer.protocol import baton_pb2 as pb


@dataclass(slots=True)
class RemoteOutcome:
    """What a committed hand-over cost."""

    worker_id: str
    transport: str
    num_bytes: int
    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    transfer_s: float


@dataclass(slots=True)
class Attempt:
    """Assigned by decode_service/attempts.py only."""

    engine_key: int
    stream: GatewayStream
    message: pb.GenerateRequest
    request: EngineRequest
    received_at: float
    path: PrefillPath | None = None
    path_reason: str = ""
    remote: RemoteOutcome | None = None
    is_ended: bool = False
    is_handed_over: bool = False  # cancelled by our own drain: another worker may replay it
    task: asyncio.Task[None] | None = None
    promised: asyncio.Future[PrefixMatch] | None = field(default=None, repr=False)
    reserved: asyncio.Future[tuple[BlockSlot, ...]] | None = field(default=None, repr=False)

    @property
    def gateway_key(self) -> int:
        return self.message.key

    def stats(self, stats: RequestStats) -> pb.AttemptStats:
        """The engine's account and the hand-over's, as the gateway is told."""
        remote = self.remote
        return pb.AttemptStats(
            num_cached_tokens=max(stats.num_cached_tokens, remote.num_cached_tokens if remote else 0),
            prefill_path=self.path.value if self.path else "",
            path_reason=self.path_reason,
            prefill_worker_id=remote.worker_id if remote else "",
            queue_s=stats.queue_s + (remote.queue_s if remote else 0.0),
            prefill_s=remote.prefill_s if remote else stats.prefill_s,
            transfer_s=remote.transfer_s if remote else 0.0,
            transfer_bytes=remote.num_bytes if remote else 0,
            transport=remote.transport if remote else "",
        )
