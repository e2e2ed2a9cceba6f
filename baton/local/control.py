"""Commands to a running supervisor: one JSON line each way over the run's unix socket.

Both sides bound what they read; a line that is no command is answered with what is wrong, and changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, cast

from baton.local.errors import ControlError, LocalError, NotRunning
from baton.local.rundir import RunDir, bind_control, socket_address

MAX_LINE_BYTES = 65536
READ_TIMEOUT_S = 10.0


class Verb(Enum):
    PS = "ps"
    SCALE = "scale"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Command:
    verb: Verb
    pool: str = ""
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class ProcessView:
    """One row of `baton ps`."""

    worker_id: str
    role: str
    state: str
    pid: int | None
    uptime_s: float
    num_restarts: int
    phase: str
    percent: float
    threads: int | None
    kv_bytes: int | None
    transports: tuple[str, ...]
    http: str
    log: str


@dataclass(frozen=True, slots=True)
class Reply:
    error: str = ""
    message: str = ""
    service: str = ""
    state: str = ""
    url: str = ""
    pid: int = 0
    processes: tuple[ProcessView, ...] = ()


def parse_command(line: bytes) -> Command:
    """Raises: ControlError naming what is wrong."""
    try:
        raw: object = json.loads(line)
    except ValueError as error:
        raise ControlError(f"a command is one line of JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ControlError("a command is a JSON object")
    fields = cast("dict[str, Any]", raw)
    unknown = sorted(set(fields) - {"verb", "pool", "replicas"})
    if unknown:
        raise ControlError(f"unknown key {', '.join(unknown)}; known: verb, pool, replicas")
    try:
        verb = Verb(fields.get("verb"))
    except ValueError as error:
        raise ControlError(f"verb = {fields.get('verb')!r}; known: {', '.join(v.value for v in Verb)}") from error
    pool, replicas = fields.get("pool", ""), fields.get("replicas", 0)
    if not isinstance(pool, str) or isinstance(replicas, bool) or not isinstance(replicas, int):
        raise ControlError("pool is a string, replicas a whole number")
    return Command(verb, pool, replicas)


async def serve_control(run: RunDir, handle: Callable[[Command], Awaitable[Reply]]) -> asyncio.Server:
    """Answer commands until the server is closed."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            reply = await _reply_to(reader, handle)
            writer.write(json.dumps(asdict(reply)).encode() + b"\n")
            await writer.drain()
        except ConnectionError:
            pass  # the command line that asked is gone; what it asked for stands
        finally:
            writer.close()

    return await asyncio.start_unix_server(answer, sock=bind_control(run.control), limit=MAX_LINE_BYTES)


async def _reply_to(reader: asyncio.StreamReader, handle: Callable[[Command], Awaitable[Reply]]) -> Reply:
    try:
        line = await asyncio.wait_for(reader.readline(), READ_TIMEOUT_S)
        return await handle(parse_command(line))
    except (ValueError, TimeoutError) as error:  # readline: longer than the limit
        return Reply(error=f"no command within {MAX_LINE_BYTES} bytes and {READ_TIMEOUT_S:g} s: {error}")
    except LocalError as error:
        return Reply(error=str(error))


def send_command(run: RunDir, command: Command, *, timeout_s: float) -> Reply:
    """Ask the supervisor of `run` and wait for its answer.

    Raises: NotRunning if nobody listens, ControlError if it refused or did not answer in time.
    """
    asked = {"verb": command.verb.value, "pool": command.pool, "replicas": command.replicas}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with socket_address(run.control) as address:
                connection.connect(address)
            connection.sendall(json.dumps(asked).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline(16 * MAX_LINE_BYTES)
        except TimeoutError as error:
            raise ControlError(f"service {run.name!r} did not answer within {timeout_s:g} s; see {run.logs}") from error
        except OSError as error:
            raise NotRunning(f"no service named {run.name!r} is up; start one with `baton up`") from error
    if not line:
        raise ControlError(f"service {run.name!r} ended before it answered; see {run.logs}")
    fields: dict[str, Any] = json.loads(line)
    views = tuple(ProcessView(**view | {"transports": tuple(view["transports"])}) for view in fields.pop("processes"))
    reply = Reply(**fields, processes=views)
    if reply.error:
        raise ControlError(reply.error)
    return reply
