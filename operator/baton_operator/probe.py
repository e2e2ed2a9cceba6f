"""Ask a service's gateways at their internal port: whether a prompt gets through, and which revision they serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, cast

import aiohttp

from baton_operator.objects import INTERNAL_PORT, GatewayReport, Manifest, ProbeReport
from baton_operator.plan import Probe

_PROBE_TIMEOUT_S = 20.0  # the gateway gives up after 15
_STATUS_TIMEOUT_S = 5.0


class WrongSecret(Exception):
    """The gateway was shown another secret than its own: it was made anew, and is to be read again."""


class Gateways:
    """The gateways' internal ports. Proves itself by the service's secret; raises WrongSecret where that is refused."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def probe(self, addresses: Sequence[str], secret: str, probe: Probe) -> ProbeReport:
        """One short prompt through the first gateway: any of them knows every worker."""
        is_ok, message = await self._probe(addresses[0], secret, probe) if addresses else (False, "no gateway is ready")
        return ProbeReport(probe.revision, time.time(), is_ok, probe.is_remote, message)

    async def _probe(self, address: str, secret: str, probe: Probe) -> tuple[bool, str]:
        request = {"revision": probe.revision}
        try:
            status, answer = await self._call("POST", address, "probe", secret, request, _PROBE_TIMEOUT_S)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            return False, f"gateway {address}: {_say(error)}"
        if status == 401:
            raise WrongSecret
        if status == 200 and answer.get("ok") is True and answer.get("revision") == probe.revision:
            return True, describe(answer)
        return False, str(answer.get("error") or f"gateway {address} answered {status}")

    async def ask(self, addresses: Iterable[str], secret: str) -> tuple[GatewayReport, ...]:
        return tuple(await asyncio.gather(*(self._ask(address, secret) for address in addresses)))

    async def _ask(self, address: str, secret: str) -> GatewayReport:
        try:
            status, answer = await self._call("GET", address, "status", secret, None, _STATUS_TIMEOUT_S)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return GatewayReport(address, None)
        if status == 401:
            raise WrongSecret
        if status != 200:
            return GatewayReport(address, None)
        registry: dict[str, Any] = answer.get("registry") or {}
        return GatewayReport(
            address,
            answer.get("servingRevision"),
            answer.get("routedRevision"),
            is_registry_connected=registry.get("connected") is not False,
        )

    async def _call(
        self, method: str, address: str, what: str, secret: str, body: dict[str, Any] | None, timeout_s: float
    ) -> tuple[int, dict[str, Any]]:
        if self._session is None:  # here, because it belongs to the running loop
            self._session = aiohttp.ClientSession()
        async with self._session.request(
            method, f"http://{address}/internal/{what}", json=body, headers={"baton-secret": secret},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        ) as response:  # fmt: skip
            answer: Any = await response.json()
            if not isinstance(answer, dict):
                raise ValueError(f"expected an object, found {type(answer).__name__}")
            return response.status, cast("dict[str, Any]", answer)


def describe(answer: dict[str, Any]) -> str:
    """ "24.0 KiB in 3.1 ms over grpc, chat-prefill-... to chat-decode-..." """
    decode = answer.get("decodeWorker", "?")
    if not answer.get("prefillWorker"):
        return f"{answer.get('ttftMs', 0):.1f} ms to the first token through {decode}"
    moved = f"{answer.get('bytes', 0) / 1024:.1f} KiB in {answer.get('handoverMs', 0):.1f} ms"
    return f"{moved} over {answer.get('transport', '?')}, {answer['prefillWorker']} to {decode}"


def addresses_of(slices: Iterable[Manifest], service: str, *, only_ready: bool) -> list[str]:
    """Where the internal ports of a service's gateways are, from its EndpointSlices; sorted."""
    found: set[str] = set()
    for each in slices:
        if each["metadata"].get("labels", {}).get("kubernetes.io/service-name") != service:
            continue
        ports = {port.get("name"): port.get("port") for port in each.get("ports") or ()}
        port = ports.get("internal") or INTERNAL_PORT
        for endpoint in each.get("endpoints") or ():
            if endpoint.get("conditions", {}).get("ready", True) or not only_ready:
                found.update(_join(address, port) for address in endpoint["addresses"])
    return sorted(found)


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _say(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
