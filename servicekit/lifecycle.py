"""How a process begins and ends: ids, its secret, drain on SIGTERM, death of the parent."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

EXIT_PARENT_GONE = 75  # EX_TEMPFAIL: nothing is wrong with this process, nobody is left to serve


def new_boot_id() -> bytes:
    """16 random bytes that name this run of the process; compared for equality only."""
    return secrets.token_bytes(16)


def read_secret(path: Path) -> str:
    """The service's secret from its file.

    Raises: ValueError naming what is wrong with the file, never its content.
    """
    if stat.S_IMODE(path.stat().st_mode) & 0o007:
        log.warning("secret file is readable by everyone on this host", extra={"path": str(path)})
    secret = path.read_text().strip()
    if not secret:
        raise ValueError(f"secret file {path} is empty")
    return secret


def write_atomically(path: Path, data: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


# ---------------------------------------------------------------- the end


def watch_parent(fd: int | None, on_gone: Callable[[], None] | None = None) -> None:
    """Exit the process when the other end of pipe `fd` closes: nothing survives kill -9 of `baton up`.

    The watcher is a thread that only reads; it works however busy or stuck the rest of the process is.
    """
    if fd is None:
        return

    def watch() -> None:
        while True:
            try:
                if not os.read(fd, 1):
                    break
            except OSError:
                break
        (on_gone or (lambda: os._exit(EXIT_PARENT_GONE)))()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


class DrainSignal:
    """SIGTERM or SIGINT asks for a drain; a second one ends the process at once."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def install(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def request(self) -> None:
        self._event.set()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()

    def _on_signal(self, number: int) -> None:
        if self._event.is_set():
            os._exit(128 + number)
        log.info("drain requested", extra={"signal": signal.Signals(number).name})
        self._event.set()
