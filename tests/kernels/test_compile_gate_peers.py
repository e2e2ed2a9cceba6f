"""Other projects' kernels beside ours: imported without their dependencies, told apart from ours, one row each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench.compile_gate import docs
from bench.compile_gate.__main__ import Verdict
from bench.compile_gate.cases import Job, collect, shipped_modules
from bench.compile_gate.compiler import Compiled
from bench.compile_gate.peer_cases import MODULES, PEERS
from bench.compile_gate.peer_sources import find_kernel, peer_package
from bench.compile_gate.peers import HEAD, Line, table
from bench.compile_gate.sass import Counts, Disassembly
from engine.kernels.compile_case import CompileCase, CompileConfig

SOURCE = """
import torch
import {package}.envs as envs
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from {package}.registry import register
from {package}.ops.helpers import twice

LOGGER = envs.make_logger(__name__)
LIMITS = torch.finfo(current_platform.fp8_dtype())


@register("name")
def launcher():
    return "not replaced"


@triton.autotune(configs=[triton.Config({{"BLOCK": 16}})], key=[])
@triton.jit
def tuned(x, BLOCK: tl.constexpr):
    tl.store(x, twice(BLOCK))
"""
HELPERS = """
from vllm.triton_utils import triton


@triton.jit
def twice(n):
    return 2 * n
"""


def test_kernels_come_out_of_sources_whose_dependencies_are_missing(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "ops"
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('is not executed')")
    (folder / "kernels.py").write_text(SOURCE.format(package="vllm"))
    (folder / "helpers.py").write_text(HELPERS)
    with peer_package("vllm", tmp_path, ("vllm.ops.kernels", "vllm.ops.helpers")):
        kernel = find_kernel("vllm.ops.kernels", "tuned")
        assert kernel.__name__ == "tuned"
        assert kernel.fn.__globals__["twice"].__name__ == "twice"
        assert kernel.fn.__globals__["launcher"]() == "not replaced"
        assert kernel.fn.__globals__["LIMITS"].max == 448
    assert not [name for name in sys.modules if name.split(".")[0] == "vllm"]


def test_a_kernel_that_a_version_no_longer_has_is_an_error_of_its_own(tmp_path: Path) -> None:
    with peer_package("vllm", tmp_path, ("vllm.ops.kernels",)):
        with pytest.raises(FileNotFoundError):
            find_kernel("vllm.ops.kernels", "tuned")
        (tmp_path / "vllm" / "ops").mkdir(parents=True)
        (tmp_path / "vllm" / "ops" / "kernels.py").write_text("")
        with pytest.raises(AttributeError):
            find_kernel("vllm.ops.kernels", "tuned")


def test_every_peer_stands_beside_a_case_that_ships() -> None:
    shipped = {(job.op, job.case.name, job.case.shape, job.arch) for job in collect(shipped_modules())}
    assert {(*peer.ours, arch) for peer in PEERS for arch in peer.case.archs} <= shipped
    assert {peer.package for peer in PEERS} == set(MODULES)


def test_the_page_has_a_row_for_every_peer() -> None:
    text = docs.PAGE.read_text().split("<!-- table: peers -->")[1].split("<!-- end -->")[0]
    rows = [row.split(" | ")[0].strip("| ") for row in text.splitlines()]
    assert {f"`{peer.case.name}`" for peer in PEERS} <= set(rows)
    assert {f"**`{peer.ours[1]}`**, {peer.ours[2]}" for peer in PEERS} <= set(rows)


def test_a_cell_holds_a_number_per_architecture_where_they_differ() -> None:
    case = CompileCase(
        name="k", kernel=lambda: None, shape="S", signature={}, aligned=(), flops=10**6, bytes=1, has_dot=True,
        config=lambda arch: CompileConfig(constants={"BLOCK_M": 16, "BLOCK_N": arch}),
    )  # fmt: skip
    loop = Counts(total=100, tensor=4, wide_loads=0, narrow_loads=0, wide_load_bytes=0, narrow_load_bytes=0, local=0,
                  special=0)  # fmt: skip
    code = Disassembly(Counts(300, 8, 5, 6, 80, 24, 0, 0), loop, "HGMMA")
    good = Compiled(registers=64, spill_bytes=0, shared_bytes=1024, num_warps=4, code=code)
    bad = Compiled(error="no")
    line = Line("vllm", (Verdict(Job("vllm", case, 90), good, ()), Verdict(Job("vllm", case, 100), bad, ())))
    head, _, row = table([line]).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("|").split(" | "), strict=True))
    assert tuple(cells) == HEAD
    assert cells["Tile"] == "16 x 90 / 16 x 100"
    assert cells["Registers"] == "64 / does not compile: no"
    assert cells["Instructions per tile"].split(" / ")[0] == "400"
    assert cells["per MFLOP"].split(" / ")[0] == "400"
    assert cells["Tensor instructions"].split(" / ")[0] == "4 HGMMA"
    assert cells["Loads 128 bits : narrower"].split(" / ")[0] == "5:6"
