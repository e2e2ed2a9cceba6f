"""Scenes of tests/integration/test_nixl_faults.py: `python -m tests.nixl_scenes NAME`, one a process.

D is this process, at the seam (NixlReader and its pairs), P is a child that registers memory and obeys signals.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import subprocess
import sys
import threading
import time

import numpy as np

from kvtransfer import nixl_agent, nixl_transport
from kvtransfer.errors import PullError
from kvtransfer.nixl_agent import ReadState
from kvtransfer.nixl_transport import NixlMemory, NixlReader, Pair, _Stop
from kvtransfer.protocol import baton_pb2 as pb
from kvtransfer.transport import BlockRead, BlockSource, SourceBlock

BLOCK_BYTES, NUM_BLOCKS = 4 << 20, 16  # four groups: two are read while two wait
PATIENCE_S = 20.0
NUM_RESTARTS, HANDOVERS_PER_RESTART = 100, 10
BLOCKS = [SourceBlock(index, index, 7) for index in range(NUM_BLOCKS)]


def serve() -> None:
    """P: says where its memory is, waits for the end of its input."""
    kept = publish()
    print(kept[-1].SerializeToString().hex(), flush=True)
    sys.stdin.read()


def serve_many() -> None:
    """A P in a process of its own for each line of input; says where it is, and when it has ended.

    Forked, for a hundred imports take minutes: this process has NIXL's libraries, but neither an agent nor a thread.
    """
    nixl_agent._api()
    _end_with_parent()
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            _end_with_parent()
            kept = publish()
            print(os.getpid(), kept[-1].SerializeToString().hex(), flush=True)
            signal.pause()
        os.waitpid(child, 0)
        print("ended", flush=True)


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def publish() -> tuple[BlockSource, NixlMemory, pb.WorkerInfo]:
    """P's memory, registered and open to whoever is told where it is."""
    memory = memoryview(bytearray(NUM_BLOCKS * BLOCK_BYTES))
    np.frombuffer(memory, np.uint8)[:] = 5
    source = BlockSource(memory, BLOCK_BYTES, secrets.token_bytes(16))
    registered = NixlMemory(source)
    source.open(bytes(16))
    source.publish(bytes(16), BLOCKS)
    return source, registered, worker_info(source, registered)


def worker_info(source: BlockSource, registered: NixlMemory) -> pb.WorkerInfo:
    return pb.WorkerInfo(boot_id=source.boot_id, num_blocks=NUM_BLOCKS, block_bytes=BLOCK_BYTES, nixl=registered.info)


class Peer:
    """The P process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.nixl_scenes", "serve"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.info = pb.WorkerInfo.FromString(bytes.fromhex(self._process.stdout.readline().strip()))

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


class Peers:
    """P, started again and again: kill -9, so that it takes leave of nothing."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.nixl_scenes", "serve-many"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._pid = 0

    def start(self) -> pb.WorkerInfo:
        assert self._process.stdin is not None
        self._process.stdin.write("start\n")
        self._process.stdin.flush()
        pid, info = self._read().split()
        self._pid = int(pid)
        return pb.WorkerInfo.FromString(bytes.fromhex(info))

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        assert self._read() == "ended"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Decode:
    """D's memory and reader."""

    def __init__(self, teardown_s: float) -> None:
        self.memory = memoryview(bytearray(NUM_BLOCKS * BLOCK_BYTES))
        self.reader = NixlReader("scene", self.memory, BLOCK_BYTES, teardown_s)
        self.blocks = [self.memory[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES] for i in range(NUM_BLOCKS)]

    def pull(self, pair: Pair, stop: _Stop, name_of_end: list[str]) -> None:
        try:
            pair.read(BLOCKS, self.blocks, lambda read: None, stop)
            name_of_end.append("read")
        except PullError as error:
            name_of_end.append(type(error).__name__)


def in_flight(decode: Decode, peer: Peer, pair: Pair) -> tuple[threading.Thread, _Stop, list[str]]:
    """A pull whose block reads are posted to a stopped P. P stops when D has its generations and posts the blocks."""
    post = decode.reader.post
    num_posts = 0

    def stop_before_blocks(*how: object) -> int:
        nonlocal num_posts
        num_posts += 1
        if num_posts == 2:  # the first is the generations
            peer.signal(signal.SIGSTOP)
        return post(*how)  # type: ignore[arg-type]

    decode.reader.post = stop_before_blocks  # type: ignore[method-assign]
    stop, ended = _Stop(), []
    pulling = threading.Thread(target=decode.pull, args=(pair, stop, ended))
    pulling.start()
    until(lambda: num_posts >= 3)  # two groups are under way
    return pulling, stop, ended


def until(condition: object) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def reuse(teardown_s: float, stopped_s: float, has_quarantine: bool = True) -> str:
    """P stops under a read; D gives up and writes into its blocks; P continues."""
    if not has_quarantine:
        wait = NixlReader.until_terminal

        def do_not_wait(reader: NixlReader, life: object, read: int, stop: _Stop) -> ReadState:
            return ReadState.FAILED if stop.is_requested() else wait(reader, life, read, stop)  # type: ignore[arg-type]

        nixl_transport.NixlReader.until_terminal = do_not_wait  # type: ignore[method-assign]
    peer, decode = Peer(), Decode(teardown_s)
    pair = decode.reader.attach(peer.info)
    pulling, stop, ended = in_flight(decode, peer, pair)
    if not has_quarantine:  # the thread waits in the real function already: leave it there and take its blocks
        ended.append("TransportLost")
    stop.request()
    if has_quarantine and stopped_s < teardown_s:
        time.sleep(stopped_s)
        assert pulling.is_alive(), "its destinations were given back while a read was in flight"
        peer.signal(signal.SIGCONT)
    if has_quarantine:
        pulling.join(PATIENCE_S)
    for block in decode.blocks:
        block[:] = b"\xaa" * BLOCK_BYTES
    peer.signal(signal.SIGCONT)
    time.sleep(2.0)  # a stale read lands within milliseconds
    overwritten = sum(bytes(block) != b"\xaa" * BLOCK_BYTES for block in decode.blocks)
    num_agents = decode.reader.num_agents
    if has_quarantine:
        other = Peer()
        again = decode.reader.attach(other.info)  # and D can still read
        end: list[str] = []
        decode.pull(again, _Stop(), end)
        assert end == ["read"], end
        num_agents = decode.reader.num_agents
        other.end()
    peer.end()
    return f"ended by {ended[0]}, {num_agents} agents, {overwritten} blocks overwritten"


def kill() -> str:
    decode, ends = Decode(5.0), []
    peer = Peer()
    pair = decode.reader.attach(peer.info)
    peer.end()
    decode.pull(pair, _Stop(), ends)
    pair.leave()
    peer = Peer()
    pulling, _, during = in_flight(decode, peer, decode.reader.attach(peer.info))
    peer.end()
    pulling.join(PATIENCE_S)
    decode.reader.close()
    return f"before: {ends[0]}, during: {during[0]}"


def restart() -> str:
    """A new P whose agent is found where D looks for the old one: the boot id in its memory tells."""
    decode, ends = Decode(5.0), []
    peer = Peer()
    impostor = pb.WorkerInfo()
    impostor.CopyFrom(peer.info)
    impostor.boot_id = bytes(16)
    try:
        decode.reader.attach(impostor)
        ends.append("read")
    except PullError as error:
        ends.append(type(error).__name__)
    decode.pull(decode.reader.attach(peer.info), _Stop(), ends)
    peer.end()
    decode.reader.close()
    return f"old boot id: {ends[0]}, new boot id: {ends[1]}"


def leaks() -> str:
    """Both ends in one process: P's agent is made anew a hundred times, ten hand-overs each."""
    memory = memoryview(bytearray(NUM_BLOCKS * BLOCK_BYTES))
    decode, seen = Decode(5.0), Seen()
    for _ in range(NUM_RESTARTS):
        source = BlockSource(memory, BLOCK_BYTES, secrets.token_bytes(16))
        registered = NixlMemory(source)
        source.open(bytes(16))
        source.publish(bytes(16), BLOCKS)
        pair = decode.reader.attach(worker_info(source, registered))
        hand_over(decode, pair, seen)
        pair.leave()
        registered.close()
        source.generation_table.close()
        seen.look(decode)
    return seen.told(decode)


def restarts(num_restarts: int) -> str:
    """D lives, P is another process each time and is killed: nothing of the dead stays with D."""
    decode, seen, peers = Decode(5.0), Seen(), Peers()
    for _ in range(num_restarts):
        pair = decode.reader.attach(peers.start())
        hand_over(decode, pair, seen)
        peers.kill()
        pair.leave()
        seen.look(decode)
    peers.end()
    return seen.told(decode)


class Seen:
    """What D held after each restart: threads, descriptors, mappings."""

    def __init__(self) -> None:
        self.num_read = 0
        self._looks: list[tuple[int, int, int]] = []

    def count(self, read: BlockRead) -> None:
        self.num_read += 1

    def look(self, decode: Decode) -> None:
        assert decode.reader.num_peers == 0
        self._looks.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), _num_mappings()))

    def told(self, decode: Decode) -> str:
        # Libraries keep pools from the first rounds; any round may count a descriptor that is just being closed.
        early, late = (
            [min(kind) for kind in zip(*looks, strict=True)] for looks in (self._looks[10:20], self._looks[-10:])
        )
        assert late == early, f"threads, descriptors, mappings: {early}, then {late}"
        decode.reader.close()
        return f"{self.num_read} hand-overs, {len(self._looks)} restarts: nothing left"


def hand_over(decode: Decode, pair: Pair, seen: Seen) -> None:
    for _ in range(HANDOVERS_PER_RESTART):
        pair.read(BLOCKS[:1], decode.blocks[:1], seen.count, _Stop())


def _num_mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


SCENES = {
    "reuse": lambda: reuse(teardown_s=1.0, stopped_s=5.0),
    "reuse-without-quarantine": lambda: reuse(teardown_s=60.0, stopped_s=0.0, has_quarantine=False),
    "continue": lambda: reuse(teardown_s=15.0, stopped_s=1.0),
    "kill": kill,
    "restart": restart,
    "leaks": leaks,
    "restarts": lambda: restarts(30),
    "many-restarts": lambda: restarts(NUM_RESTARTS),
}

if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    elif sys.argv[1] == "serve-many":
        serve_many()
    else:
        print(SCENES[sys.argv[1]](), flush=True)
        os._exit(0)
