"""Which way of moving KV a pair of workers takes: the whole table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from decode_service.config import DecodeConfig
from kvtransfer import nixl_agent, ucx
from kvtransfer.negotiation import Choice, Missing, NixlUse, PairFacts, check_ways, choose_ways
from kvtransfer.nixl_agent import NixlError
from servicekit.config import ConfigError, build

NONE, ANY, RDMA = NixlUse.NONE, NixlUse.ANY, NixlUse.RDMA


@pytest.mark.parametrize(
    ("shares_memory", "decode", "prefill", "ways"),
    [
        (True, NONE, NONE, "shm grpc"),
        (False, NONE, NONE, "grpc"),
        (False, NONE, RDMA, "grpc"),
        (False, RDMA, NONE, "grpc"),
        (False, RDMA, RDMA, "nixl grpc"),
        (True, RDMA, RDMA, "nixl shm grpc"),
        (False, RDMA, ANY, "nixl grpc"),
        (False, ANY, RDMA, "nixl grpc"),
        (True, ANY, ANY, "shm grpc"),
    ],
)
def test_auto_takes_rdma_then_shared_memory_then_grpc(
    shares_memory: bool, decode: NixlUse, prefill: NixlUse, ways: str
) -> None:
    assert choose_ways(("auto",), False, PairFacts(shares_memory, decode, prefill)).ways == tuple(ways.split())


def test_auto_without_rdma_here_missed_nothing_and_with_rdma_here_it_says_what_it_missed() -> None:
    assert choose_ways(("auto",), False, PairFacts(False, NONE, RDMA)).missing == ()
    expected = (Missing("nixl", "not offered by the prefill worker"),)
    assert choose_ways(("auto",), False, PairFacts(False, RDMA, NONE)).missing == expected


def test_auto_that_needs_rdma_never_means_grpc() -> None:
    assert choose_ways(("auto",), True, PairFacts(True, RDMA, RDMA)).ways == ("nixl", "shm")
    nothing = choose_ways(("auto",), True, PairFacts(False, RDMA, NONE))
    assert nothing == Choice((), (Missing("nixl", "not offered by the prefill worker"),))


@pytest.mark.parametrize(
    ("wanted", "shares_memory", "decode", "prefill", "choice"),
    [
        ("nixl", True, ANY, ANY, Choice(("nixl",))),
        ("nixl", True, ANY, NONE, Choice((), (Missing("nixl", "not offered by the prefill worker"),))),
        ("nixl,grpc", True, NONE, ANY, Choice(("grpc",), (Missing("nixl", "no agent here"),))),
        ("grpc", True, RDMA, RDMA, Choice(("grpc",))),
        ("shm,grpc", False, NONE, NONE, Choice(("grpc",))),
        ("grpc,shm", True, NONE, NONE, Choice(("grpc", "shm"))),
    ],
)
def test_names_stand_as_they_are_and_one_alone_falls_back_to_nothing(
    wanted: str, shares_memory: bool, decode: NixlUse, prefill: NixlUse, choice: Choice
) -> None:
    assert choose_ways(tuple(wanted.split(",")), False, PairFacts(shares_memory, decode, prefill)) == choice


@pytest.mark.parametrize(
    ("wanted", "needs_rdma", "words"),
    [
        ((), False, "empty"),
        (("auto", "grpc"), False, "auto stands alone"),
        (("grpc",), True, "require_rdma needs transports nixl or auto"),
        (("nixl", "grpc"), True, "no room for grpc"),
    ],
)
def test_wishes_that_contradict_themselves_are_refused(wanted: tuple[str, ...], needs_rdma: bool, words: str) -> None:
    assert words in (check_ways(wanted, needs_rdma) or "")


def test_a_worker_refuses_them_by_the_name_of_the_setting() -> None:
    needed = ["--model", "/m", "--worker-id", "d0", "--secret-file", "/s"]
    assert build(DecodeConfig, needed, {}).transports == ("auto",)
    with pytest.raises(ConfigError, match="require_rdma needs transports nixl or auto"):
        build(DecodeConfig, [*needed, "--transports", "grpc", "--require-rdma"], {})


# ---------------------------------------------------------------- what a worker's own agent may do


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, bool], None]:
    """A machine whose UCX sees these resources, with or without devices in the kernel's list."""

    def make(resources: str, has_devices: bool) -> None:
        if has_devices:
            (tmp_path / "mlx5_0").mkdir()
        monkeypatch.setattr(ucx, "_DEVICES", tmp_path)
        monkeypatch.setattr(ucx, "resources", lambda: tuple(resources.split()))
        monkeypatch.setattr(nixl_agent, "is_available", lambda: True)
        monkeypatch.setattr(ucx.os, "environ", {})

    return make


def test_auto_on_a_machine_with_rdma_uses_it_and_nothing_else(machine: Callable[[str, bool], None]) -> None:
    machine("tcp/eth0 rc_mlx5/mlx5_0:1", True)
    assert ucx.prepare(("auto",), False) is RDMA
    assert "tcp" not in ucx.os.environ["UCX_TLS"]


@pytest.mark.parametrize(("resources", "has_devices"), [("tcp/eth0", False), ("tcp/eth0", True)])
def test_auto_on_a_machine_without_rdma_makes_no_agent(
    machine: Callable[[str, bool], None], resources: str, has_devices: bool
) -> None:
    machine(resources, has_devices)
    assert ucx.prepare(("auto",), False) is NONE
    assert ucx.os.environ == {}


@pytest.mark.parametrize("wanted", ["auto", "nixl"])
def test_required_rdma_that_is_not_there_ends_the_start_and_names_what_is(
    machine: Callable[[str, bool], None], wanted: str
) -> None:
    machine("tcp/eth0", False)
    with pytest.raises(NixlError, match=r"require_rdma.*tcp/eth0"):
        ucx.prepare((wanted,), True)


def test_nixl_by_name_takes_what_ucx_finds_and_grpc_by_name_takes_no_agent(
    machine: Callable[[str, bool], None],
) -> None:
    machine("tcp/eth0", False)
    assert ucx.prepare(("nixl",), False) is ANY
    assert ucx.prepare(("shm", "grpc"), False) is NONE
