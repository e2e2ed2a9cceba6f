"""`python -m bench.compile_gate.peers`: vLLM's and FlashInfer's Triton kernels compiled like ours, and beside ours.

    pip download --no-deps --only-binary :all: vllm flashinfer-python, unpacked into FOLDER/vllm and FOLDER/flashinfer
    python -m bench.compile_gate.peers FOLDER [--arch 90] [--docs]

None of their code is here and none of their dependencies is needed; only the files that hold kernels are executed.
Needs no GPU. Says nothing of speed: registers, shared memory and instructions are what a compiler can tell.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.compile_gate import compiler, docs
from bench.compile_gate.__main__ import Verdict, judge
from bench.compile_gate.cases import Job, collect, shipped_modules
from bench.compile_gate.judge import occupancy_of
from bench.compile_gate.peer_cases import MODULES, PEERS, Peer
from bench.compile_gate.peer_sources import peer_package
from engine.dispatch import set_up_compiler

ARCHS = (80, 90, 100)
HEAD = (
    "Kernel", "Whose", "Tile", "Registers", "Spilled bytes", "Shared memory", "Warps", "Programs per SM",
    "Tensor instructions", "Instructions per tile", "per MFLOP", "Loads 128 bits : narrower",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Line:
    """One kernel on all architectures asked for."""

    whose: str
    verdicts: tuple[Verdict, ...]


def main() -> int:
    args = _arguments()
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: in the interpreter there is nothing to compile", file=sys.stderr)
        return 2
    set_up_compiler()
    archs = tuple(args.arch or ARCHS)
    with ExitStack() as stack:
        for package, modules in MODULES.items():
            stack.enter_context(peer_package(package, args.sources, modules))
        lines = compare(PEERS, archs)
    print(table(lines))
    if args.docs:
        docs.write_table("peers", f"Triton {compiler.triton_version()}, {_named(archs)}.\n\n{table(lines)}")
    return 0


def compare(peers: Sequence[Peer], archs: Sequence[int]) -> list[Line]:
    """Ours, then whatever stands beside it, in the order of `peers`."""
    ours = {(job.op, job.case.name, job.case.shape, job.arch): job for job in collect(shipped_modules())}
    groups: dict[tuple[str, str, str], list[tuple[str, list[Job]]]] = {}
    for peer in peers:
        jobs = [ours[(*peer.ours, arch)] for arch in archs if arch in peer.case.archs]
        group = groups.setdefault(peer.ours, [("ours", jobs)])
        group.append((peer.package, [Job(peer.package, peer.case, arch) for arch in archs if arch in peer.case.archs]))
    rows = [row for group in groups.values() for row in group]
    verdicts = iter(judge([job for _, jobs in rows for job in jobs]))
    return [Line(whose, tuple(next(verdicts) for _ in jobs)) for whose, jobs in rows]


def table(lines: Sequence[Line]) -> str:
    """Cells hold a number per architecture, or one where all are equal."""
    rows = [HEAD, tuple("---" for _ in HEAD)]
    for line in lines:
        job = line.verdicts[0].job
        name = f"**`{job.case.name}`**, {job.case.shape}" if line.whose == "ours" else f"`{job.case.name}`"
        columns = zip(*(_cells(verdict) for verdict in line.verdicts), strict=True)
        rows.append((name, line.whose, *(_joined(column) for column in columns)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    job, result = verdict.job, verdict.result
    config = job.case.config(job.arch)
    tile = _tile(config.constants)
    if result.code is None:
        return (tile, f"does not compile: {result.error[:90]}", *[""] * (len(HEAD) - 4))
    code, loop = result.code.kernel, result.code.loop
    # Without a dot a loop may be any of several: the whole kernel, each instruction once.
    instructions = (loop.total if job.case.has_dot else code.total) * result.num_warps
    return (
        tile, str(result.registers), str(result.spill_bytes), str(result.shared_bytes), str(result.num_warps),
        str(occupancy_of(result, job.arch).programs),
        f"{loop.tensor} {result.code.tensor_name}" if code.tensor else "",
        str(instructions), f"{instructions / job.case.flops * 1e6:.0f}" if job.case.has_dot else "",
        f"{code.wide_loads}:{code.narrow_loads}",
    )  # fmt: skip


_TILES = (
    ("BLOCK_M", "BLOCK_N"), ("BLOCK_M", "TILE_SIZE"), ("BLOCK_H", "BLOCK_N"),
    ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K"),
    ("BLOCK_H", "BLOCK_D"), ("TILE_SIZE",), ("BLOCK_SIZE",), ("ROWS", "BLOCK"), ("TILE",), ("HEAD_SIZE_PADDED",),
    ("BLOCK_DV",), ("ROWS",),
)  # fmt: skip


def _tile(constants: object) -> str:
    assert isinstance(constants, dict)
    names = next((names for names in _TILES if all(name in constants for name in names)), ())
    return " x ".join(str(constants[name]) for name in names)  # pyright: ignore[reportUnknownArgumentType]


def _joined(cells: Sequence[str]) -> str:
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _named(archs: Sequence[int]) -> str:
    return " / ".join(f"sm_{arch}" for arch in archs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_gate.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", type=Path, help="folder that holds the unpacked packages vllm and flashinfer")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHS)
    parser.add_argument("--docs", action="store_true", help="write the table of docs/kernels.md")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
