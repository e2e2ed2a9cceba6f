"""What NIXL is told of KV in a GPU's memory: region, device, kind. A recording agent stands in for NIXL."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import pytest

from kvtransfer.errors import TransportLost
from kvtransfer.nixl_agent import NixlError, ReadState, Region
from kvtransfer.nixl_transport import NixlMemory, NixlReader, _Stop
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import BlockRead, BlockSource, DeviceBlock, SourceBlock, address_of
from kvtransfer.ucx import why_no_device_memory

BLOCK_BYTES = 64
GPU = Region(0x7F00_0000_0000, 8 * BLOCK_BYTES, device_id=3)


class RecordingAgent:
    """Knows what it was told; reads of control words are answered out of `control`, whose memory is the host's."""

    def __init__(self, name: str, regions: Sequence[Region]) -> None:
        self.metadata = name.encode()
        self.regions = list(regions)
        self.prepared: list[tuple[str | None, int, int, int, int | None]] = []
        self.reads: list[tuple[int, list[int], int, list[int]]] = []
        self.control: dict[int, memoryview] = {}  # of a prepared list of words: what it lists

    def add_peer(self, metadata: bytes) -> str:
        return metadata.decode()

    def remove_peer(self, name: str) -> None: ...

    def prepare(self, peer: str | None, address: int, length: int, count: int, device_id: int | None = None) -> int:
        self.prepared.append((peer, address, length, count, device_id))
        return len(self.prepared) - 1

    def drop(self, descriptors: int) -> None: ...

    def post_read(self, local: int, local_ids: Sequence[int], remote: int, remote_ids: Sequence[int]) -> int:
        self.reads.append((local, list(local_ids), remote, list(remote_ids)))
        if remote in self.control:
            for to, source in zip(local_ids, remote_ids, strict=True):
                words = self.control[remote]
                self.control[local][8 * to : 8 * to + 8] = words[8 * source : 8 * source + 8]
        return len(self.reads)

    def state(self, read: int) -> ReadState:
        return ReadState.DONE

    def release(self, read: int) -> None: ...

    def close(self) -> None: ...


def test_blocks_go_from_gpu_to_gpu_and_generations_through_host_memory() -> None:
    agents = list[RecordingAgent]()

    def make(name: str, regions: Sequence[Region]) -> RecordingAgent:
        agents.append(RecordingAgent(name, regions))
        return agents[-1]

    source = BlockSource(8, BLOCK_BYTES, secrets.token_bytes(16))
    memory = NixlMemory(source, device=GPU, make_agent=make)
    table = source.generation_table
    assert agents[0].regions == [GPU, Region(table.address, table.num_bytes)]
    assert (memory.info.blocks_address, memory.info.device_id) == (GPU.address, 3)

    own = Region(0x7E00_0000_0000, 4 * BLOCK_BYTES, device_id=1)
    reader = NixlReader("d", own, BLOCK_BYTES, make_agent=make)
    agent = agents[1]
    assert agent.regions[0] == own
    assert agent.regions[1].device_id is None, "the scratch words are the host's"
    agent.control = {1: reader._scratch.data.cast("B"), 3: memoryview(bytearray(8 * 8 + 16))}
    source.open(b"t")
    blocks = [SourceBlock(0, 5, 70), SourceBlock(1, 6, 71)]
    source.publish(b"t", blocks)
    agent.control[3][:] = memoryview(table._map)[:]

    worker = pb.WorkerInfo(boot_id=source.boot_id, num_blocks=8, block_bytes=BLOCK_BYTES, nixl=memory.info)
    pair = reader.attach(worker)
    name = memory.info.agent_metadata.decode()
    assert agent.prepared == [
        (None, own.address, BLOCK_BYTES, 4, 1),
        (None, agent.regions[1].address, 8, reader._scratch.size, None),
        (name, GPU.address, BLOCK_BYTES, 8, 3),
        (name, table.address, 8, 8 + 2, None),
    ]
    reads = list[BlockRead]()
    pair.read(blocks, [DeviceBlock(2), DeviceBlock(0)], reads.append, _Stop())
    assert (0, [2, 0], 2, [5, 6]) in agent.reads, "own blocks 2 and 0 out of P's 5 and 6"
    assert [(read.generation, read.num_bytes) for read in reads] == [(70, BLOCK_BYTES), (71, BLOCK_BYTES)]
    with pytest.raises(AssertionError, match="not a block of the registered memory"):
        pair.read(blocks[:1], [DeviceBlock(4)], reads.append, _Stop())
    reader.close()


def test_a_worker_whose_reads_cannot_be_torn_down_ends_itself() -> None:
    """A read that may yet land makes every block of the process unsafe: the supervisor starts it anew."""

    class StuckAgent(RecordingAgent):
        def state(self, read: int) -> ReadState:
            return ReadState.RUNNING

        def close(self) -> None:
            raise NixlError("the agent is still in use and was not destroyed")

    reasons = list[str]()
    memory = memoryview(bytearray(4 * BLOCK_BYTES))
    reader = NixlReader("d", memory, BLOCK_BYTES, teardown_s=0.0, make_agent=StuckAgent, end_process=reasons.append)
    life, stop = reader._life, _Stop()
    assert life is not None
    read = reader.post(life, (0, [0]), (2, [1]), stop)
    assert reasons == []
    stop.request()
    assert reader.until_terminal(life, read, stop) is ReadState.FAILED
    assert len(reasons) == 1
    assert "could not be torn down" in reasons[0]
    with pytest.raises(TransportLost):
        reader.post(life, (0, [0]), (2, [1]), _Stop())


def test_host_memory_is_said_to_be_on_no_device() -> None:
    view = memoryview(bytearray(4 * BLOCK_BYTES))
    source = BlockSource(view, BLOCK_BYTES, bytes(16))
    memory = NixlMemory(source, make_agent=RecordingAgent)
    assert not memory.info.HasField("device_id")
    assert memory.info.blocks_address == address_of(view)


@pytest.mark.parametrize("found", [("tcp/lo", "cuda_copy/cuda"), ("rc_mlx5/mlx5_0:1", "gdr_copy/cuda")])
def test_ucx_with_cuda_moves_a_gpus_memory(found: tuple[str, ...]) -> None:
    assert why_no_device_memory(found) == ""


def test_ucx_without_cuda_says_what_it_has() -> None:
    assert why_no_device_memory(("tcp/lo", "rc_mlx5/mlx5_0:1")).endswith("it sees tcp/lo, rc_mlx5/mlx5_0:1")
    assert why_no_device_memory(()).endswith("it sees nothing")
