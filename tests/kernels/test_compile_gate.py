"""The compile gate: every kernel that ships passes it, and kernels made to be refused are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile_gate import compiler
from bench.compile_gate.compiler import Compiled
from bench.compile_gate.sass import Counts, Disassembly, read_disassembly
from bench.devices import Occupancy, occupancy

ROOT = Path(__file__).parents[2]
pytest.importorskip("triton")

KERNELS = """
import triton
import triton.language as tl
from engine.kernels.compile_case import CompileCase, CompileConfig


@triton.jit
def matmul(a, b, c, n, BLOCK: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, DEPTH):
        left = tl.load(a + rows[:, None] * n + (k + depth)[None, :])
        right = tl.load(b + (k + depth)[:, None] * BLOCK + rows[None, :])
        if DOT:
            total = tl.dot(left, right, total)
        else:
            total += tl.sum(left.to(tl.float32), 1)[:, None] * tl.sum(right.to(tl.float32), 0)[None, :]
    tl.store(c + rows[:, None] * BLOCK + rows[None, :], total.to(tl.bfloat16))


def case(name, *, block=64, warps=4, stages=2, dot=True, aligned=("a", "b", "c", "n"), programs=1, archs=(80, 90, 100)):
    return CompileCase(
        name=name,
        kernel=lambda: matmul,
        shape="S",
        signature={"a": "*bf16", "b": "*bf16", "c": "*bf16", "n": "i32"},
        aligned=aligned,
        config=lambda arch: CompileConfig(
            constants={"BLOCK": block, "DEPTH": 64, "DOT": dot}, num_warps=warps, num_stages=stages
        ),
        flops=2 * block * block * 64,
        bytes=4 * block * 64,
        has_dot=True,
        programs_per_sm=programs,
        archs=archs,
    )


"""


CASES = """
def dies(arch):
    import multiprocessing, os

    if multiprocessing.parent_process() is not None:
        os.abort()
    return CompileConfig(constants={"unknown": 1})


COMPILE_CASES = (
    case("good"),
    case("spilling", block=128, warps=1, archs=(80,)),
    case("without-tensor-cores", dot=False, archs=(90,)),
    case("unaligned", aligned=("c", "n"), archs=(80,)),
    case("hungry", block=128, stages=12, archs=(90,)),
    case("too-few-fit", block=128, programs=8, archs=(90,)),
    case("odd-block", block=96, archs=(90,)),
    case("typo", aligned=("a", "bee"), archs=(90,)),
    CompileCase(
        name="aborting", kernel=lambda: matmul, shape="S", signature={}, aligned=(), config=dies, flops=1, bytes=1,
        archs=(90,),
    ),
)
"""


def run_gate(*arguments: str, path: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """In a process without the interpreter, which this one may be in."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.compile_gate", *arguments],
        cwd=ROOT, env=environment | {"PYTHONPATH": path} | more, capture_output=True, text=True, check=False,
        timeout=900,
    )  # fmt: skip


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the gate says of each of a handful of kernels, by name."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "made_to_be_refused.py").write_text(KERNELS + CASES)
    ran = run_gate(
        "--module", "made_to_be_refused", "--json", str(folder / "out.json"), "--cache", str(folder), path=str(folder)
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    said: dict[str, list[str]] = {}
    for compilation in json.loads((folder / "out.json").read_text())["compilations"]:
        name, arch = compilation["name"], compilation["arch"]
        said.setdefault(name, []).extend(compilation["problems"])
        for problem in compilation["problems"]:
            assert f"REFUSED made_to_be_refused/{name} [S] sm_{arch}: {problem}" in ran.stdout
    return said


def test_a_good_kernel_passes_on_every_architecture(refused: dict[str, list[str]]) -> None:
    assert refused["good"] == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("spilling", "spills: "),
        ("without-tensor-cores", "has a dot but no tensor-core instruction"),
        ("unaligned", "loads 0 bytes per thread 128 bits at a time"),
        ("hungry", "bytes of shared memory of 232448"),
        ("too-few-fit", "programs per SM of 8 planned"),
        ("odd-block", "arange's range must be a power of 2"),
        ("typo", "the kernel has no arguments ['bee']"),
        ("aborting", "the compiler died: exit code -6"),
    ],
)
def test_a_kernel_made_to_be_refused_is(refused: dict[str, list[str]], name: str, reason: str) -> None:
    assert [problem for problem in refused[name] if reason in problem], refused[name]


def test_a_launch_module_that_lists_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lists_nothing.py").write_text("")
    ran = run_gate("--module", "lists_nothing", path=str(tmp_path))
    assert ran.returncode == 1
    assert "REFUSED lists_nothing: lists no COMPILE_CASES" in ran.stdout


def test_the_gate_refuses_to_run_in_the_interpreter(tmp_path: Path) -> None:
    ran = run_gate("--module", "lists_nothing", path=str(tmp_path), TRITON_INTERPRET="1")
    assert ran.returncode == 2
    assert "TRITON_INTERPRET" in ran.stderr


# About 1.5 s of processor time per compilation that nobody has done before on this machine.
@pytest.mark.timeout(900)
def test_every_kernel_that_ships_passes() -> None:
    ran = run_gate()
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.timeout(900)
def test_the_page_of_kernels_has_a_row_for_each_case() -> None:
    """Not its figures, which change with Triton."""
    ran = run_gate("--check-docs")
    assert ran.returncode == 0, f"run `python -m bench.compile_gate --docs`: {ran.stdout}{ran.stderr}"


# ---------------------------------------------------------------- its pure parts


@pytest.mark.parametrize(
    ("arch", "needs", "expected"),
    [
        (90, {"registers": 168, "num_warps": 8, "shared_bytes": 96 << 10}, Occupancy(1, "registers")),
        (90, {"registers": 128, "num_warps": 4, "shared_bytes": 0}, Occupancy(4, "registers")),
        (80, {"registers": 32, "num_warps": 4, "shared_bytes": 80 << 10}, Occupancy(2, "shared memory")),
        (80, {"registers": 32, "num_warps": 4, "shared_bytes": 82 << 10}, Occupancy(1, "shared memory")),
        (90, {"registers": 32, "num_warps": 16, "shared_bytes": 0}, Occupancy(4, "registers")),
        (90, {"registers": 16, "num_warps": 16, "shared_bytes": 0}, Occupancy(4, "warps")),
        (90, {"registers": 16, "num_warps": 1, "shared_bytes": 0}, Occupancy(32, "blocks")),
        (100, {"registers": 32, "num_warps": 4, "shared_bytes": 0, "tensor_columns": 256},
         Occupancy(2, "tensor memory")),
    ],
)  # fmt: skip
def test_occupancy_is_what_the_scarcest_resource_allows(arch: int, needs: dict[str, int], expected: Occupancy) -> None:
    assert occupancy(arch, **needs) == expected


def test_the_main_loop_is_the_innermost_one_that_works() -> None:
    """Not the loop around it, nor the one that spins on a barrier."""
    found = read_disassembly(
        """
        /*0000*/                   LDG.E.U16 R1, desc[UR4][R2.64] ;
.L_x_9:
        /*0010*/                   LDG.E R3, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R4], [R2.64], P1 ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R4], R5 ;
        /*0070*/              @!P1 BRA `(.L_x_2) ;
        /*0080*/                   STL [R1], R5 ;
        /*0090*/               @P0 BRA `(.L_x_9) ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   NOP ;
        """
    )
    assert found.tensor_name == "HMMA"
    assert found.loop == Counts(
        total=4, tensor=1, wide_loads=1, narrow_loads=0, wide_load_bytes=16, narrow_load_bytes=0, local=0, special=1
    )
    assert found.kernel == Counts(
        total=11, tensor=1, wide_loads=1, narrow_loads=2, wide_load_bytes=16, narrow_load_bytes=6, local=1, special=1
    )


def test_a_cached_result_is_the_one_that_was_saved(tmp_path: Path) -> None:
    counts = Counts(1, 2, 3, 4, 5, 6, 7, 8)
    result = Compiled(registers=9, num_warps=4, code=Disassembly(counts, counts, "HGMMA"))
    compiler.save(tmp_path, "key", result)
    assert compiler.load(tmp_path, "key") == result
    assert compiler.load(tmp_path, "another") is None


def test_a_failure_is_not_kept(tmp_path: Path) -> None:
    compiler.save(tmp_path, "key", Compiled(error="out of memory"))
    assert compiler.load(tmp_path, "key") is None
