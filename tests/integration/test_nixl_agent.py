"""One agent of the real NIXL: what it holds on to, and that it lets go."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest

from kvtransfer import nixl_agent
from kvtransfer.nixl_agent import NixlAgent, NixlError, Region, open_agent

pytestmark = pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")

MEMORY = np.zeros(1024, np.uint64)
NUM_DESCRIPTORS = 8


@pytest.fixture
def prefill() -> Generator[NixlAgent]:
    agent = open_agent("prefill", [Region(MEMORY.ctypes.data, MEMORY.nbytes)])
    yield agent
    agent.close()


def test_an_agent_is_destroyed_though_somebody_keeps_the_error_of_a_read(prefill: NixlAgent) -> None:
    """Its frames kept handles, and they the agent: a decode worker took its reads for alive and ended itself."""
    own = np.zeros(1024, np.uint64)
    decode = open_agent("decode", [Region(own.ctypes.data, own.nbytes)])
    theirs = decode.prepare(decode.add_peer(prefill.metadata), MEMORY.ctypes.data, 64, NUM_DESCRIPTORS)
    ours = decode.prepare(None, own.ctypes.data, 64, NUM_DESCRIPTORS)
    with pytest.raises(NixlError, match="INVALID_PARAM") as kept:
        decode.post_read(ours, [0], theirs, [NUM_DESCRIPTORS])
    decode.close()
    assert kept.value.__cause__ is not None
