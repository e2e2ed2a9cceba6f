"""When NIXL may be told to use RDMA, and what is said where it may not."""

from __future__ import annotations

import pytest

from kvtransfer import nixl_agent, ucx
from kvtransfer.nixl_agent import NixlError, Region
from kvtransfer.transport import address_of

RDMA = ("self/memory", "tcp/eth0", "rc_mlx5/mlx5_0:1")


def test_a_machine_without_rdma_is_told_what_is_missing_and_what_is_there() -> None:
    refusal = ucx.why_no_rdma(("tcp/eth0", "cma/memory"), {})
    assert "no RDMA device" in refusal
    assert "tcp/eth0, cma/memory" in refusal


@pytest.mark.parametrize("allowed", ["rc,cuda_copy", "ib,self", "dc_mlx5"])
def test_rdma_transports_alone_are_accepted(allowed: str) -> None:
    assert ucx.why_no_rdma(RDMA, {"UCX_TLS": allowed}) == ""


@pytest.mark.parametrize("allowed", ["tcp", "rc,tcp", "all", "^rc", "shm"])
def test_settings_that_let_ucx_use_anything_else_are_refused_by_name(allowed: str) -> None:
    assert allowed.split(",")[-1] in ucx.why_no_rdma(RDMA, {"UCX_TLS": allowed})


@pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")
def test_ucx_names_the_resources_of_this_machine() -> None:
    assert any(name.startswith("tcp/") for name in ucx.resources())


@pytest.mark.skipif(not nixl_agent.is_available(), reason="needs the extra nixl")
def test_agent_metadata_is_bounded_before_native_code_reads_it() -> None:
    memory = memoryview(bytearray(4096))
    agent = nixl_agent.open_agent("bounded", [Region(address_of(memory), 4096)])
    with pytest.raises(NixlError, match="the limit is"):
        agent.add_peer(bytes(nixl_agent.MAX_METADATA_BYTES + 1))
    agent.close()
