"""What UCX, the library under NIXL, can use on this machine, and what this process lets it use.

`python -m kvtransfer.ucx` prints one resource a line.

NIXL does not tell, and its package has no ucx_info, so the library is asked itself; in a process of its own, for it
reads the environment once and may abort where a driver is broken.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from kvtransfer import nixl_agent
from kvtransfer.negotiation import AUTO, NIXL, NixlUse
from kvtransfer.nixl_agent import NOT_INSTALLED, PACKAGES, NixlError

log = logging.getLogger(__name__)

RDMA_TRANSPORTS = ("rc", "dc", "ud", "srd", "gga")
"""Begin the names of what reads another machine's memory without its processor (rc_verbs, dc_mlx5, ...)."""

_CUDA_TRANSPORTS = ("cuda_copy", "gdr_copy")

_DEVICES = Path("/sys/class/infiniband")
_ONLY_RDMA = "ib,cuda_copy,self"
_QUERY_S = 20.0
_FEATURES_FIELD, _RMA = 1, 2


def prepare(transports: Sequence[str], needs_rdma: bool) -> NixlUse:
    """Decide what this worker's agent may do, and tell UCX; before the first agent of the process.

    Raises: NixlError that names what is missing, where RDMA is needed.
    """
    if not needs_rdma and NIXL in transports:
        return NixlUse.ANY
    refusal = _why_no_rdma_here() if needs_rdma or AUTO in transports else "not asked for"
    if not refusal:
        os.environ.setdefault("UCX_TLS", _ONLY_RDMA)
        return NixlUse.RDMA
    if needs_rdma:
        raise NixlError(f"require_rdma: {refusal}")
    log.debug("no NIXL: %s", refusal)
    return NixlUse.NONE


def _why_no_rdma_here() -> str:
    """The kernel's list first: asking UCX takes a process of its own, and most machines have no such device."""
    try:
        if not nixl_agent.is_available():
            return NOT_INSTALLED
        if not _DEVICES.is_dir() or not any(_DEVICES.iterdir()):
            return f"{_DEVICES} names no RDMA device; UCX sees {', '.join(resources()) or 'nothing'}"
        return why_no_rdma(resources(), os.environ)
    except NixlError as error:
        return str(error)


def why_no_rdma(found: Sequence[str], environment: MutableMapping[str, str]) -> str:
    """Empty if RDMA, and only RDMA, will be used."""
    if not any(name.startswith(RDMA_TRANSPORTS) for name in found):
        there = ", ".join(found) or "nothing"
        return f"UCX sees no RDMA device (/dev/infiniband, a driver and an active port are needed); it sees {there}"
    allowed = environment.get("UCX_TLS", _ONLY_RDMA).split(",")
    if others := [name for name in allowed if not name.startswith((*RDMA_TRANSPORTS, "ib", "cuda", "self", "gdr"))]:
        return f"UCX_TLS allows {', '.join(others)}; leave it out, or name RDMA transports only"
    return ""


def why_no_device_memory(found: Sequence[str]) -> str:
    """Empty if UCX can move a GPU's memory; `found` as `resources` says."""
    if any(name.startswith(_CUDA_TRANSPORTS) for name in found):
        return ""
    return f"UCX sees no CUDA (it must be built with it, and find the driver); it sees {', '.join(found) or 'nothing'}"


def resources() -> tuple[str, ...]:
    """Such as ("tcp/eth0", "rc_mlx5/mlx5_0:1"). Raises: NixlError."""
    command = [sys.executable, "-m", "kvtransfer.ucx"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise NixlError(f"UCX did not say within {_QUERY_S:g} s what it sees") from error
    if asked.returncode:
        raise NixlError(asked.stderr.strip().rpartition("\n")[2][:200] or f"UCX ended with {asked.returncode}")
    return tuple(asked.stdout.split())


def _library() -> Path:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parents[1] / f"{package}.libs"
            for path in folder.glob("libucp-*.so*"):
                return path
    raise NixlError(NOT_INSTALLED)


def _print_resources() -> None:
    """ucp_context_print_info writes to a C stream: ours ends in a pipe."""
    ucp, libc = ctypes.CDLL(str(_library())), ctypes.CDLL(None)
    major, minor, release = ctypes.c_uint(), ctypes.c_uint(), ctypes.c_uint()
    ucp.ucp_get_version(ctypes.byref(major), ctypes.byref(minor), ctypes.byref(release))
    parameters = (ctypes.c_uint64 * 64)(_FEATURES_FIELD, _RMA)  # ucp_params_t: which fields are valid, the features
    config, context = ctypes.c_void_p(), ctypes.c_void_p()
    for status in (
        ucp.ucp_config_read(None, None, ctypes.byref(config)),
        ucp.ucp_init_version(major, minor, parameters, config, ctypes.byref(context)),
    ):
        if status:
            raise NixlError(f"UCX does not start: status {status}")
    libc.fdopen.restype = ctypes.c_void_p
    reader, writer = os.pipe()
    stream = ctypes.c_void_p(libc.fdopen(writer, b"w"))
    ucp.ucp_context_print_info(context, stream)
    libc.fclose(stream)
    with os.fdopen(reader) as text:
        print("\n".join(re.findall(r"^# +resource +\d+ .*-- (\S+)$", text.read(), re.MULTILINE)))


if __name__ == "__main__":
    try:
        _print_resources()
    except NixlError as error:
        raise SystemExit(str(error)) from error
