"""What a GPU can do, on paper: limits of one SM and the peaks that a roofline is drawn from.

Datasheet numbers, never measurements. Sources: NVIDIA's A100 (80 GB SXM), H100 (SXM), H200 (SXM) and DGX B200
datasheets for peaks and bandwidth (dense, bf16); the CUDA C++ programming guide, "Compute Capabilities", for the
limits of an SM; the architectures' tuning guides for the 1 KiB of shared memory that CUDA keeps per block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SmLimits:
    """What the programs on one SM share."""

    registers: int = 65536
    registers_per_thread: int = 255
    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_per_block: int
    tensor_columns: int = 0
    """Columns of tensor memory (tcgen05); 0 where there is none."""


# All three hand out registers to a warp in lumps of 256 and keep 1 KiB of shared memory per block for themselves.
REGISTER_LUMP = 256
RESERVED_SHARED_BYTES = 1024
SM_LIMITS = {
    80: SmLimits(warps=64, blocks=32, shared_bytes=164 << 10, shared_bytes_per_block=163 << 10),
    90: SmLimits(warps=64, blocks=32, shared_bytes=228 << 10, shared_bytes_per_block=227 << 10),
    100: SmLimits(warps=64, blocks=32, shared_bytes=228 << 10, shared_bytes_per_block=227 << 10, tensor_columns=512),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU's peaks. FLOP and bytes are per second."""

    name: str
    arch: int
    sms: int
    bandwidth: float
    tensor_flops: float
    vector_flops: float
    """float32, outside the tensor cores."""
    tensor_flops_per_clock: int
    """Of one SM, dense bf16; with the peak it gives the clock that the datasheet assumed."""

    @property
    def clock(self) -> float:
        return self.tensor_flops / (self.sms * self.tensor_flops_per_clock)


DEVICES = (
    Device(
        name="A100", arch=80, sms=108, bandwidth=2.039e12, tensor_flops=312e12, vector_flops=19.5e12,
        tensor_flops_per_clock=2048,
    ),
    Device(
        name="H100", arch=90, sms=132, bandwidth=3.35e12, tensor_flops=989e12, vector_flops=67e12,
        tensor_flops_per_clock=4096,
    ),
    Device(
        name="H200", arch=90, sms=132, bandwidth=4.8e12, tensor_flops=989e12, vector_flops=67e12,
        tensor_flops_per_clock=4096,
    ),
    Device(
        name="B200", arch=100, sms=148, bandwidth=8.0e12, tensor_flops=2250e12, vector_flops=75e12,
        tensor_flops_per_clock=8192,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Programs that fit on one SM at a time, and what keeps the next one out."""

    programs: int
    limit: str


def occupancy(arch: int, *, registers: int, num_warps: int, shared_bytes: int, tensor_columns: int = 0) -> Occupancy:
    """How many programs with these needs one SM holds."""
    sm = SM_LIMITS[arch]
    registers_per_warp = -(-registers * 32 // REGISTER_LUMP) * REGISTER_LUMP
    fits = {
        "registers": sm.registers // registers_per_warp // num_warps if registers else sm.blocks,
        "warps": sm.warps // num_warps,
        "shared memory": sm.shared_bytes // (shared_bytes + RESERVED_SHARED_BYTES),
        "blocks": sm.blocks,
    }
    if tensor_columns:
        fits["tensor memory"] = sm.tensor_columns // tensor_columns
    limit = min(fits, key=fits.__getitem__)
    return Occupancy(fits[limit], limit)
