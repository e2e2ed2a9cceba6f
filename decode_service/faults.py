"""Faults of a decode worker's pulls on demand, for chaos tests (servicekit/failpoints.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvtransfer.auth import Secret
from kvtransfer.landing import Landing
from kvtransfer.nixl_transport import NixlReader
from kvtransfer.prefill_client import DecodeIdentity, PrefillClient
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import BlockPuller, BlockRead, BlockTransport, Destination, OnRead, SourceBlock
from servicekit.failpoints import Failpoints


class FaultyPrefillClient(PrefillClient):
    """Loses half of a block, or dies, as blocks arrive; or comes with a ticket that was used before."""

    def __init__(
        self,
        address: str,
        identity: DecodeIdentity,
        secret: Secret,
        load: Callable[[], pb.WorkerLoad],
        failpoints: Failpoints,
        nixl: NixlReader | None,
        landing: Landing,
    ) -> None:
        super().__init__(address, identity, secret, load, nixl=nixl, landing=landing)
        self._failpoints = failpoints

    def _transports_for(self, worker: pb.WorkerInfo) -> list[BlockTransport]:
        return [_FaultyTransport(transport, self._failpoints) for transport in super()._transports_for(worker)]


class _FaultyTransport:
    def __init__(self, transport: BlockTransport, failpoints: Failpoints) -> None:
        self.name = transport.name
        self._transport = transport
        self._failpoints = failpoints
        self._last_ticket = b""

    async def warm_up(self) -> None:
        await self._transport.warm_up()

    async def open(self, ticket: bytes, boot_id: bytes) -> BlockPuller:
        if self._failpoints.due("replay-ticket"):
            ticket = self._last_ticket
        self._last_ticket = ticket
        return _FaultyPuller(await self._transport.open(ticket, boot_id), self._failpoints)

    async def aclose(self) -> None:
        await self._transport.aclose()


class _FaultyPuller:
    def __init__(self, puller: BlockPuller, failpoints: Failpoints) -> None:
        self._puller = puller
        self._failpoints = failpoints

    async def pull(self, blocks: Sequence[SourceBlock], destinations: Sequence[Destination], on_read: OnRead) -> None:
        def faulty(read: BlockRead) -> None:
            self._failpoints.kill_if_due("kill-after-block-pulled")
            if self._failpoints.due("truncate-pulled-block"):
                read = replace(read, num_bytes=read.num_bytes // 2)
            on_read(read)

        await self._puller.pull(blocks, destinations, faulty)

    async def aclose(self) -> None:
        await self._puller.aclose()
