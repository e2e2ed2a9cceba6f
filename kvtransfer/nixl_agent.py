"""The few parts of NIXL that we use, with types: one agent, registered memory, one-sided reads.

What measurement showed of nixl 1.5.1 over UCX 1.23 (docs/transport.md has how), and what this file therefore does:

    - releasing the handle of a read under way, removing its peer or deregistering its destination does NOT keep the
      read from landing later: `release` is only for reads that are terminal, and `close` is the one way to end others;
    - destroying the agent does end them: its progress thread is joined and its connections are closed. The destructor
      runs when the last reference to the native object goes, which `close` proves before it lets go;
    - runs of neighbouring descriptors on both sides become one transfer by themselves.

NIXL's serialised descriptor lists are pickles: none is made, sent or read here. Agent metadata is a format of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import sys
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import numpy as np

MAX_METADATA_BYTES = 64 << 10
"""Of another agent's metadata: 450 bytes on a machine with two networks; read by native code, so bounded before."""

PACKAGES = ("nixl_cu13", "nixl_cu12")
NOT_INSTALLED = "NIXL is not installed: pip install 'baton-serving[nixl]'"
_REFERENCES_AT_CLOSE = 2  # the local name and getrefcount's argument

Rows = np.ndarray[Any, np.dtype[np.uint64]]  # [n, 3]: address, length, device


class NixlError(Exception):
    """NIXL refused or failed; its message as text."""


@dataclass(frozen=True, slots=True)
class Region:
    """Memory to register: of this process, or of a GPU by its number."""

    address: int
    num_bytes: int
    device_id: int | None = None


class ReadState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # as terminal as DONE: nothing lands any more


class NixlAgent(Protocol):
    """One process's end. Thread-safe. Descriptors and reads are opaque numbers of this agent."""

    @property
    def metadata(self) -> bytes: ...

    def add_peer(self, metadata: bytes) -> str:
        """Know another agent; returns its name. Raises: NixlError."""
        ...

    def remove_peer(self, name: str) -> None: ...

    def prepare(self, peer: str | None, address: int, length: int, count: int, device_id: int | None = None) -> int:
        """A list of `count` neighbouring descriptors of `length` bytes, ours without a peer. Raises: NixlError."""
        ...

    def drop(self, descriptors: int) -> None: ...

    def post_read(self, local: int, local_ids: Sequence[int], remote: int, remote_ids: Sequence[int]) -> int:
        """Start to read; from here on the destinations are not ours until `state` is terminal. Raises: NixlError."""
        ...

    def state(self, read: int) -> ReadState: ...

    def release(self, read: int) -> None:
        """Forget a terminal read."""
        ...

    def close(self) -> None:
        """Destroy the agent: whatever is under way ends here. Raises: NixlError if that cannot be proved."""
        ...


def is_available() -> bool:
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


@functools.cache
def _api() -> Any:
    """NIXL's Python API. Its logger writes to stdout and stops there; here it is one among ours.

    Raises: NixlError.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            continue
        try:
            module = importlib.import_module(f"{package}._api")
        except (ImportError, OSError) as error:
            raise NixlError(f"{package} does not load: {error}") from error
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
        return module
    raise NixlError(NOT_INSTALLED)


def open_agent(name: str, regions: Sequence[Region]) -> NixlAgent:
    """An agent over UCX that has registered these regions, once.

    Raises: NixlError.
    """
    return _UcxAgent(name, regions)


class _UcxAgent:
    def __init__(self, name: str, regions: Sequence[Region]) -> None:
        api = _api()
        config = api.nixl_agent_config(
            enable_prog_thread=True,  # answers others' reads where the fabric does not; P's Python may be busy
            backends=["UCX"],
            sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        with _translating():
            self._agent: Any = api.nixl_agent(name, config)
            if "UCX" not in self._agent.backends:
                raise NixlError("NIXL has no UCX here")
            for region in regions:
                described = (region.address, region.num_bytes, region.device_id or 0, "")
                self._agent.register_memory([described], _kind(region.device_id))
            self.metadata: bytes = self._agent.get_agent_metadata()
        self._lists: dict[int, Any] = {}
        self._reads: dict[int, Any] = {}

    def add_peer(self, metadata: bytes) -> str:
        if len(metadata) > MAX_METADATA_BYTES:
            raise NixlError(f"{len(metadata)} bytes of agent metadata, the limit is {MAX_METADATA_BYTES}")
        with _translating():
            name = self._agent.add_remote_agent(metadata)
            name = name.decode() if isinstance(name, bytes) else str(name)
            self._agent.make_connection(name)
            return name

    def remove_peer(self, name: str) -> None:
        with _translating():
            self._agent.remove_remote_agent(name)

    def prepare(self, peer: str | None, address: int, length: int, count: int, device_id: int | None = None) -> int:
        rows: Rows = np.zeros((count, 3), np.uint64)
        rows[:, 0] = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(length)
        rows[:, 1] = length
        rows[:, 2] = device_id or 0
        with _translating():
            prepared = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT" if peer is None else peer, rows, _kind(device_id))
        self._lists[id(prepared)] = prepared
        return id(prepared)

    def drop(self, descriptors: int) -> None:
        with _translating():
            self._lists.pop(descriptors).release()

    def post_read(self, local: int, local_ids: Sequence[int], remote: int, remote_ids: Sequence[int]) -> int:
        with _translating():
            read = self._keep(
                self._agent.make_prepped_xfer(
                    "READ", self._lists[local], list(local_ids), self._lists[remote], list(remote_ids)
                )
            )
            try:
                self._agent.transfer(self._reads[read])
            except BaseException:
                self.release(read)
                raise
            return read

    def _keep(self, read: Any) -> int:
        """Its number; no frame that an error could keep holds the handle itself."""
        self._reads[id(read)] = read
        return id(read)

    def state(self, read: int) -> ReadState:
        try:
            return _STATES[self._agent.check_xfer_state(self._reads[read])]
        except KeyError:
            raise
        except Exception:  # the peer is gone, or the network to it
            return ReadState.FAILED

    def release(self, read: int) -> None:
        with _translating():
            self._reads.pop(read).release()

    def close(self) -> None:
        agent, self._agent = self._agent, None
        with _translating():
            for handles in (self._reads, self._lists):
                while handles:
                    handles.popitem()[1].release()
        native = agent.agent
        del agent.agent
        if sys.getrefcount(native) != _REFERENCES_AT_CLOSE:
            raise NixlError("the agent is still in use and was not destroyed")
        del native


def _kind(device_id: int | None) -> str:
    """NIXL's word for where memory is."""
    return "DRAM" if device_id is None else "VRAM"


_STATES = {"PROC": ReadState.RUNNING, "DONE": ReadState.DONE, "ERR": ReadState.FAILED}


@contextlib.contextmanager
def _translating() -> Generator[None]:
    """Raises: NixlError for whatever the bindings raise."""
    try:
        yield
    except NixlError:
        raise
    except Exception as error:  # the bindings' errors have no common base
        # Whoever keeps the error keeps the bindings' frames, these keep handles, and those the native agent alive.
        traceback.clear_frames(error.__traceback__)
        raise NixlError(f"{type(error).__name__}: {error}"[:200]) from error
