"""What the compile gate is told about a kernel: enough to compile it ahead of time, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One kernel at one shape that ships.

    `signature`: Triton types by argument name ("*bf16", "i32", "fp32", "i64"), constexprs left out; `aligned`: the
    arguments known to be multiples of 16. Constants, warps and stages may differ by architecture, so they
    come from `config(arch)`: 80, 90 or 100. `flops` and `bytes` are per tile (one program's inner step) for the
    roofline; a kernel without a dot has `flops` of its vector arithmetic and `has_dot` False.
    """

    name: str
    kernel: Callable[[], Any]
    """Imports and returns the `@triton.jit` function; called by the gate alone."""
    shape: str
    signature: Mapping[str, str]
    aligned: tuple[str, ...]
    config: Callable[[int], CompileConfig]
    flops: int
    bytes: int
    has_dot: bool = False
    vector_loads: bool = True
    """Whether the main load must be 128 bits wide in the compiled code."""
    programs_per_sm: int = 1
    """The occupancy that was planned: registers and shared memory must allow as many."""
    archs: tuple[int, ...] = (80, 90, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """Constants of one compilation."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def arguments(self) -> dict[str, Any]:
        """What a launch passes by name."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **self.extra}


def with_constants(config: CompileConfig, **constants: Any) -> CompileConfig:
    """The tile of a launcher together with what its caller's tensors decide."""
    return replace(config, constants={**config.constants, **constants})
