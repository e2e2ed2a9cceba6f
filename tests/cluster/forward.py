"""Carry TCP connections from a loopback port of this machine to an address that only a node's namespace knows.

`python -m tests.cluster.forward PID HOST:PORT [--listen PORT]` prints the port it listens on. The listening socket is
made first and stays in this machine's network; then the process moves over, so that what it dials is dialled in there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.processes import end_with_parent

REPOSITORY = Path(__file__).parents[2]
_CLONE_NEWNET = 0x40000000
_CHUNK_BYTES = 1 << 16


def forward_command(pid: int, target: str, port: int = 0) -> list[str]:
    return [sys.executable, "-m", "tests.cluster.forward", str(pid), target, "--listen", str(port)]


@contextmanager
def forwarded(pid: int, target: str) -> Iterator[int]:
    """A loopback port that leads to `target` in the network of process `pid`, for as long as the block runs."""
    with subprocess.Popen(
        forward_command(pid, target), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def carry_all(listening: socket.socket, host: str, port: int) -> None:
    # asyncio itself holds the task of a connection by weak references alone: collected, it would cut the connection.
    carrying: set[asyncio.Task[None] | None] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carrying.add(asyncio.current_task())
        with contextlib.suppress(OSError):
            there_reader, there_writer = await asyncio.open_connection(host, port)
            await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))
        writer.close()
        carrying.discard(asyncio.current_task())

    server = await asyncio.start_server(carry, sock=listening)
    async with server:
        await server.serve_forever()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the end of what is read, which is passed on. A broken connection ends both directions."""
    try:
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()


def _move_to_network_of(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.forward", description=__doc__)
    parser.add_argument("pid", type=int)
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="0: any free one")
    options = parser.parse_args()
    host, _, port = options.target.rpartition(":")
    with socket.create_server(("127.0.0.1", options.listen), backlog=128) as listening:
        _move_to_network_of(options.pid)
        print(listening.getsockname()[1], flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(carry_all(listening, host, int(port)))


if __name__ == "__main__":
    main()
