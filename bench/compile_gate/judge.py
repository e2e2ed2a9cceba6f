"""What the gate refuses, and what a roofline says of what it lets pass. Pure: numbers in, words out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.compile_gate.compiler import Compiled
from bench.devices import SM_LIMITS, Device, Occupancy, occupancy
from engine.kernels.compile_case import CompileCase


def occupancy_of(result: Compiled, arch: int) -> Occupancy:
    return occupancy(
        arch,
        registers=result.registers,
        num_warps=result.num_warps,
        shared_bytes=result.shared_bytes,
        tensor_columns=result.tensor_columns,
    )


def problems(case: CompileCase, arch: int, result: Compiled) -> Iterator[str]:
    """Why this kernel may not ship like this; nothing if it may."""
    if result.error:
        yield f"does not compile: {result.error}"
        return
    assert result.code is not None
    code, limit = result.code.kernel, SM_LIMITS[arch].shared_bytes_per_block
    if result.spill_bytes or code.local:
        yield (
            f"spills: {result.spill_bytes} bytes of spill code, {code.local} accesses to local memory, at "
            f"{result.registers} registers and {result.num_warps} warps; a smaller tile or more warps"
        )
    if result.shared_bytes > limit:
        yield f"takes {result.shared_bytes} bytes of shared memory of {limit}; a smaller tile or fewer stages"
    elif (holds := occupancy_of(result, arch)).programs < case.programs_per_sm:
        yield f"{holds.programs} programs per SM of {case.programs_per_sm} planned: {holds.limit} run out"
    if case.has_dot and not code.tensor:
        yield "has a dot but no tensor-core instruction"
    if case.vector_loads and code.wide_load_bytes <= code.narrow_load_bytes:
        yield (
            f"loads {code.wide_load_bytes} bytes per thread 128 bits at a time and {code.narrow_load_bytes} by "
            f"{code.narrow_loads} narrower loads; the main load must be contiguous, aligned and known to be"
        )


@dataclass(frozen=True, slots=True)
class Model:
    """Clocks that one SM would need for one tile by each of its means; nothing overlaps less than perfectly."""

    memory: float
    """The tile's bytes at this SM's share of the datasheet's bandwidth."""
    arithmetic: float
    """Its FLOPs at the peak of the tensor cores, or of float32 where there is no dot."""
    issue: float
    """The instructions of one turn of the main loop, four warps' worth a clock; a turn is taken for a tile."""
    special: float
    """exp2 and such, 16 lanes a clock."""

    @property
    def bound(self) -> str:
        clocks = {"memory": self.memory, "arithmetic": self.arithmetic, "issue": self.issue, "exp2": self.special}
        return max(clocks, key=clocks.__getitem__)


def model(case: CompileCase, result: Compiled, device: Device) -> Model:
    """A model, never a measurement: no latency, no bank conflict, no cache."""
    assert result.code is not None
    loop = result.code.loop
    peak = device.tensor_flops if case.has_dot else device.vector_flops
    per_sm = device.clock * device.sms
    return Model(
        memory=case.bytes * per_sm / device.bandwidth,
        arithmetic=case.flops * per_sm / peak,
        issue=loop.total * result.num_warps / 4,
        special=loop.special * result.num_warps * 32 / 16,
    )
