"""Which ways of moving KV a pair of workers uses, best first. Pure: what the pair has is found out by others.

auto    NIXL where both ends have it and one at least does RDMA alone, then shared memory on one host, then gRPC
names   as they stand; who names only one has nothing to fall back to
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

AUTO, SHM, GRPC, NIXL = "auto", "shm", "grpc", "nixl"
WAYS = (AUTO, SHM, GRPC, NIXL)


class NixlUse(Enum):
    """What a worker's NIXL agent may do."""

    NONE = "none"  # there is no agent
    ANY = "any"  # whatever UCX finds, TCP included
    RDMA = "rdma"  # RDMA and nothing else


@dataclass(frozen=True, slots=True)
class PairFacts:
    """A decode worker and a prefill worker."""

    shares_memory: bool
    decode_nixl: NixlUse
    prefill_nixl: NixlUse


@dataclass(frozen=True, slots=True)
class Missing:
    """A way that was wanted and that this pair does not have."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    ways: tuple[str, ...]  # best first; each may still turn out not to work
    missing: tuple[Missing, ...] = ()


def check_ways(wanted: Sequence[str], needs_rdma: bool) -> str | None:
    """What is wrong with a worker's wishes, or None."""
    if not wanted:
        return "transports is empty; say auto"
    if AUTO in wanted and len(wanted) > 1:
        return f"transports = {','.join(wanted)}; auto stands alone: it chooses among all of them"
    if needs_rdma and AUTO not in wanted and NIXL not in wanted:
        return f"require_rdma needs transports nixl or auto; {','.join(wanted)} cannot use RDMA"
    if needs_rdma and GRPC in wanted:
        return f"transports = {','.join(wanted)}: require_rdma leaves no room for grpc, which is TCP; leave one out"
    return None


def choose_ways(wanted: Sequence[str], needs_rdma: bool, pair: PairFacts) -> Choice:
    """What a pair may use of what is wanted. With `needs_rdma`, auto never means gRPC: that is TCP."""
    if AUTO in wanted:
        return _automatic(needs_rdma, pair)
    reasons = {name: _why_not(name, needs_rdma, pair) for name in wanted}
    ways = tuple(name for name, reason in reasons.items() if not reason)
    # Workers on two hosts have no shared memory, and nobody expected it: that is no fall-back.
    missing = tuple(Missing(name, reason) for name, reason in reasons.items() if reason and name != SHM)
    return Choice(ways, missing)


def _automatic(needs_rdma: bool, pair: PairFacts) -> Choice:
    why_no_nixl = _why_not(NIXL, True, pair)
    ways = [
        *([] if why_no_nixl else [NIXL]),
        *([SHM] if pair.shares_memory else []),
        *([] if needs_rdma else [GRPC]),
    ]
    was_expected = needs_rdma or pair.decode_nixl is NixlUse.RDMA  # we have RDMA: a pair without it is worth a word
    return Choice(tuple(ways), (Missing(NIXL, why_no_nixl),) if why_no_nixl and was_expected else ())


def _why_not(name: str, needs_rdma: bool, pair: PairFacts) -> str:
    if name == SHM and not pair.shares_memory:
        return "not on one host"
    if name != NIXL:
        return ""
    if pair.decode_nixl is NixlUse.NONE:
        return "no agent here"
    if pair.prefill_nixl is NixlUse.NONE:
        return "not offered by the prefill worker"
    if needs_rdma and NixlUse.RDMA not in (pair.decode_nixl, pair.prefill_nixl):
        return "neither end is limited to RDMA"
    return ""
