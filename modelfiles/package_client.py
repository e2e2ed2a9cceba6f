"""Downloading one wheel with the package client that this machine has.

The client brings its own configuration: index, proxy, certificates, credentials. We name no host.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelfiles.cache import ENVIRONMENT_VARIABLE
from modelfiles.errors import ClientMissing, FetchError, NoDiskSpace

_POLL_S = 0.1
_PROBE_S = 30.0
_CREDENTIALS = re.compile(r"//[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class WheelRequest:
    """`requirement` names one version; `file_name` is what the index calls its wheel."""

    requirement: str
    file_name: str


def find_client() -> list[str]:
    """The command line of a `pip`: this interpreter's, the one on PATH, or the one that uv can run."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        pip = shutil.which(name)
        if pip is not None and _works(pip):
            return [pip]
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, "tool", "run", "pip"]  # uv itself has no `download`
    raise ClientMissing(
        "neither pip nor uv was found to download the model with; install one of them (python -m ensurepip)"
    )


def _works(pip: str) -> bool:
    """A version manager's shim is on PATH even where no Python behind it has pip."""
    return subprocess.run([pip, "--version"], capture_output=True, check=False, timeout=_PROBE_S).returncode == 0


def download_wheel(
    request: WheelRequest, folder: Path, lock: int, on_bytes: Callable[[int], None], client: list[str] | None = None
) -> Path:
    """Download into `folder` and return the wheel's path.

    The client inherits the file descriptor `lock`: if this process is killed, the lock stays held until the client
    ends, so nobody starts a second download beside it, and the next caller finds what it brought.
    Raises: FetchError, NoDiskSpace, ClientMissing.
    """
    command = [*(client or find_client()), "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar", "off", "--dest", str(folder), request.requirement]
    # Below the cache, so that its size can be watched, its disk is the one that was checked, and the sweep finds it.
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    log = temporary / "client.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
            pass_fds=(lock,),
        )
    _watch(process, lambda: on_bytes(downloaded_bytes(request, folder)))
    wheel = folder / request.file_name
    if process.returncode != 0 or not wheel.is_file():
        raise _explain(request, folder, log.read_text(errors="replace"))
    return wheel


def downloaded_bytes(request: WheelRequest, folder: Path) -> int:
    """What has arrived. pip writes the wheel below TMPDIR under its own name, then moves it into the folder.

    Another process may own the download: files and folders can go while we look.
    """
    sizes = [0]
    for parent, _, names in os.walk(folder):  # unlike rglob it passes over a folder that is gone
        if request.file_name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(os.stat(os.path.join(parent, request.file_name)).st_size)
    return max(sizes)


def _watch(process: subprocess.Popen[bytes], report: Callable[[], None]) -> None:
    """Report until the client ends; end it when we are interrupted."""
    try:
        while True:
            try:
                process.wait(_POLL_S)
                return
            except subprocess.TimeoutExpired:
                report()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _explain(request: WheelRequest, folder: Path, log: str) -> FetchError | NoDiskSpace:
    """The client's last error line, and what to do about it. Credentials in URLs are cut out."""
    lines = [_CREDENTIALS.sub("//***@", line.strip()) for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")] or lines
    reason = errors[-1] if errors else "it said nothing"
    if "no space left" in log.lower():
        return NoDiskSpace(
            f"no space left on the disk of {folder} while downloading {request.requirement}; free some, or set "
            f"{ENVIRONMENT_VARIABLE} to another disk"
        )
    return FetchError(
        f"the package client could not download {request.requirement}: {reason}. Check the network and the client's "
        f"index and proxy settings, then try again; or copy {request.file_name} into {folder}"
    )
