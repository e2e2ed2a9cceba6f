"""An HTTP proxy between the operator and the API server that records every call and breaks chosen ones.

It stands where Sieve instruments a client: what was committed and what the operator came to know can be told apart.
Runs in a thread of the test; the operator talks plain HTTP to it with its own token.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host"}
_MUTATING = {"create", "update", "patch", "delete", "deletecollection"}


@dataclass(frozen=True)
class Call:
    """One request as RBAC sees it."""

    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    number: int = 0
    """Of the mutating calls but those on Events, from 1; 0 for all others."""

    @property
    def is_mutating(self) -> bool:
        return self.verb in _MUTATING

    @property
    def permission(self) -> tuple[str, str, str]:
        """API group, resource (with subresource), verb; the resource is '' for discovery."""
        return self.group, f"{self.resource}/{self.subresource}" if self.subresource else self.resource, self.verb

    def __str__(self) -> str:
        return f"#{self.number} {self.verb} {self.permission[1]} {self.name}"


@dataclass
class Fault:
    """What happens to the mutating call of this number.

    `commits`: it reaches the API server. `code`: what is answered instead; 0: the connection is reset.
    `then`: called before the operator can learn anything (to kill it, say).
    """

    number: int
    commits: bool = True
    code: int = 0
    retry_after_s: int | None = None
    then: Callable[[], None] | None = None
    was_hit: bool = False


@dataclass
class WatchFault:
    """What happens to the events of one resource's watches: those that `hides` says are not passed on.

    `ends_with`: at a hidden event the watch breaks: "reset" (connection lost), "gone" (410), "bookmark" (goes on, and
    says how far it is: an honest API server never says so of what it has not shown) or "" (goes on).
    """

    resource: str
    hides: Callable[[dict[str, Any]], bool]
    ends_with: str = ""
    only_once: bool = False
    num_hidden: int = 0


@dataclass
class Recording:
    calls: list[Call] = field(default_factory=list)
    num_mutating: int = 0
    created: Counter[str] = field(default_factory=Counter)
    """How often each object was made; Events excepted."""

    @property
    def mutating(self) -> list[Call]:
        return [call for call in self.calls if call.number]


class ApiProxy:
    """Use as a context manager; `url` is what the operator's kubeconfig names."""

    def __init__(self, upstream: str, ca_file: Path) -> None:
        self._upstream = upstream
        self._tls = ssl.create_default_context(cafile=str(ca_file))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="api-proxy", daemon=True)
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        self._port = 0
        self._lists: dict[str, bytes] = {}
        self._is_stale = False
        self._healed = asyncio.Event()
        self.recording = Recording()
        self.faults: list[Fault] = []
        self.watch_faults: list[WatchFault] = []
        self.repeats_events = False
        """Every event of every watch comes twice, the second time after the one that follows it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def forget_calls(self) -> None:
        """Count from 1 again."""
        self.recording = Recording()

    def go_stale(self) -> None:
        """From now on answer lists as the last time they were asked for, and show no event, until `heal`."""
        self._loop.call_soon_threadsafe(self._healed.clear)
        self._is_stale = True

    def heal(self) -> None:
        """Show the present again; watches that hung in the past end with 410, as an API server's would."""
        self._is_stale = False
        self._loop.call_soon_threadsafe(self._healed.set)

    def _run(self, work: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(30.0)

    async def _start(self) -> None:
        self._healed.set()
        self._session = aiohttp.ClientSession(auto_decompress=True, connector=aiohttp.TCPConnector(limit=0))
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        assert self._runner is not None
        assert self._session is not None
        await self._runner.cleanup()
        await self._session.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}  # watches that hang
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = self._record(request)
        fault = next((fault for fault in self.faults if fault.number == call.number and not fault.was_hit), None)
        try:
            if call.verb == "watch":
                return await self._watch(request, call)
            if call.verb == "list":
                return await self._list(request)
            if call.number and fault is not None:
                return await self._break(request, call, fault)
            return _answer(*await self._commit(request, call))
        except (aiohttp.ClientError, ConnectionError):
            return _reset(request)

    def _record(self, request: web.Request) -> Call:
        call = parse_call(request.method, request.path, is_watch="watch" in request.query)
        number = 0
        if call.is_mutating and call.resource != "events":
            self.recording.num_mutating += 1
            number = self.recording.num_mutating
        call = Call(call.verb, call.group, call.resource, call.subresource, call.namespace, call.name, number)
        self.recording.calls.append(call)
        return call

    async def _commit(self, request: web.Request, call: Call) -> tuple[int, dict[str, str], bytes]:
        """Forward it and note what it made: an apply of what was not there needs the right to create it."""
        answer = await self._forward(request)
        if answer[0] == 201 and call.number:
            self.recording.created[f"{call.resource}/{call.name or json.loads(answer[2])['metadata']['name']}"] += 1
            self.recording.calls.append(replace(call, verb="create", number=0))
        return answer

    async def _break(self, request: web.Request, call: Call, fault: Fault) -> web.StreamResponse:
        fault.was_hit = True
        if fault.commits:
            await self._commit(request, call)
        if fault.then is not None:
            await asyncio.to_thread(fault.then)
        if not fault.code:
            return _reset(request)
        headers = {} if fault.retry_after_s is None else {"Retry-After": str(fault.retry_after_s)}
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": fault.code, "message": "injected"}
        return web.json_response(status, status=fault.code, headers=headers)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        key = str(request.rel_url)
        if self._is_stale and key in self._lists:
            return web.Response(body=self._lists[key], content_type="application/json")
        status, headers, body = await self._forward(request)
        if status == 200:
            self._lists[key] = body
        return _answer(status, headers, body)

    async def _watch(self, request: web.Request, call: Call) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if self._is_stale:
            await response.prepare(request)
            await self._healed.wait()
            await response.write(_GONE)
            return response
        async with self._send(request) as upstream:
            if upstream.status != 200:
                return _answer(upstream.status, dict(upstream.headers), await upstream.read())
            await response.prepare(request)
            # An event may be larger than a line that aiohttp would read.
            pending = last = b""
            async for chunk in upstream.content.iter_any():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    ending = self._ending(call, line)
                    if self._is_stale or ending == "gone":
                        await self._healed.wait()
                        await response.write(_GONE)
                        return response
                    if ending == "reset":
                        return _reset(request)
                    if ending == "bookmark":
                        await response.write(_bookmark(line))
                    if ending is None:
                        await response.write(line + b"\n" + (last if self.repeats_events else b""))
                        last = line + b"\n"
        return response

    def _ending(self, call: Call, line: bytes) -> str | None:
        """How the watch goes on after this event: None: passed on; '': hidden; else how it ends."""
        faults = [fault for fault in self.watch_faults if fault.resource == call.resource]
        event = json.loads(line) if faults else {}
        for fault in faults:
            is_spent = fault.only_once and fault.num_hidden > 0
            if event.get("type") != "BOOKMARK" and not is_spent and fault.hides(event):
                fault.num_hidden += 1
                return fault.ends_with
        return None

    async def _forward(self, request: web.Request) -> tuple[int, dict[str, str], bytes]:
        async with self._send(request, await request.read()) as upstream:
            return upstream.status, dict(upstream.headers), await upstream.read()

    def _send(self, request: web.Request, body: bytes | None = None) -> Any:
        assert self._session is not None
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        return self._session.request(
            request.method, self._upstream + str(request.rel_url), data=body or None, headers=headers, ssl=self._tls,
            timeout=aiohttp.ClientTimeout(total=None),
        )  # fmt: skip


def _bookmark(line: bytes) -> bytes:
    """What an API server sends to say that a watch has come as far as this event."""
    shown = json.loads(line)["object"]
    metadata = {"resourceVersion": shown["metadata"]["resourceVersion"]}
    bookmark = {"apiVersion": shown["apiVersion"], "kind": shown["kind"], "metadata": metadata}
    return json.dumps({"type": "BOOKMARK", "object": bookmark}).encode() + b"\n"


_GONE = (
    json.dumps({
        "type": "ERROR",
        "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410,
                   "message": "too old resource version"},
    }).encode() + b"\n"
)  # fmt: skip


def parse_call(method: str, path: str, *, is_watch: bool) -> Call:
    """What RBAC makes of a request."""
    parts = [part for part in path.split("/") if part]
    group = parts[1] if parts[:1] == ["apis"] and len(parts) > 3 else ""
    rest = parts[3:] if parts[:1] == ["apis"] else parts[2:]
    namespace = ""
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    resource, name, subresource = (*rest, "", "", "")[:3]
    if not resource:
        return Call("discover", "", "", "", "", path)
    verb = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method, "get")
    if verb == "get" and not name:
        verb = "watch" if is_watch else "list"
    if verb == "delete" and not name:
        verb = "deletecollection"
    return Call(verb, group, resource, subresource, namespace, name)


def _answer(status: int, headers: dict[str, str], body: bytes) -> web.StreamResponse:
    kept = {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}
    return web.Response(status=status, headers=kept, body=body)


def _reset(request: web.Request) -> web.StreamResponse:
    """End the connection without an answer."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
