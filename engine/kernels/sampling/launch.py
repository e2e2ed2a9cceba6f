"""Launch the Triton sampler: shapes, workspace, grids.

    sample_packed(logits, pack_rows(rows, vocab, device)) -> Results   stays on the device, never synchronises

For a CUDA graph keep memory, Workspace and Results of the bucket's size, capture `sample_packed` with all of them, and
write the memory before each replay; slots without a row are padding: nothing is read or written for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels.arch import INTERPRETER, arch_of
from engine.kernels.compile_case import CompileCase, CompileConfig
from engine.kernels.sampling.packed_rows import PackedRows, Results

MAX_TILES = 128
_BINS = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Config:
    """`tile`: tokens per program; `block`: candidates at a time in a search; `listed`: ids of a list at a time;
    `group`: tiles at a time when histograms are added; `capacity`: candidates per row, beyond which a search reads the
    whole row.
    """

    tile: int
    block: int
    listed: int
    group: int
    capacity: int


def tile_config(arch: int) -> Config:
    """Log-sum-exp adds by tiles, so their size is one for all that draw together: every GPU, or the interpreter."""
    if arch == INTERPRETER:
        return Config(tile=16384, block=1024, listed=4096, group=8, capacity=8192)
    return Config(tile=2048, block=256, listed=512, group=16, capacity=8192)


def compile_config(arch: int, kernel: str, config: Config, gumbel: bool = False) -> CompileConfig:
    """Constants and warps of one kernel."""
    del arch  # one choice serves all: what bounds these kernels is memory and latency, not tensor cores
    block = config.block // 2 if gumbel else config.block  # the noise takes registers: 12 bytes spilled on sm_80
    constants: dict[str, dict[str, Any]] = {
        "prepare": {"TILE": config.tile, "LIST": config.listed},
        "weigh": {"TILE": config.tile, "TILES": MAX_TILES, "GUMBEL": gumbel},
        "bound": {"TILES": MAX_TILES, "GROUP": config.group},
        "compact": {"TILE": config.tile, "TILES": MAX_TILES},
        "draw": {"TILE": config.tile, "TILES": MAX_TILES, "BLOCK": block, "GUMBEL": gumbel},
        "top": {"TILE": config.tile, "TILES": MAX_TILES},
    }
    return CompileConfig(constants=constants[kernel], num_warps=8 if kernel in ("draw", "prepare") else 4)


class Workspace:
    """What one call of the sampler writes between its kernels. Not to be shared by calls in flight together."""

    def __init__(
        self,
        num_slots: int,
        vocab: int,
        device: torch.device,
        *,
        num_edited: int | None = None,
        config: Config | None = None,
    ) -> None:
        """`num_edited`: rows that may have penalties or bans; all of them unless said. Raises: ValueError."""
        self.arch = arch_of(torch.empty(0, device=device))
        config = config or tile_config(self.arch)
        self.num_tiles = -(-vocab // config.tile)
        if not 0 < self.num_tiles <= MAX_TILES:
            raise ValueError(f"a vocabulary of {vocab} is outside [1, {config.tile * MAX_TILES}]")
        self.num_slots, self.vocab, self.device, self.config = num_slots, vocab, device, config
        self.num_edited = num_slots if num_edited is None else num_edited
        tiles = (num_slots, self.num_tiles)

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.edited = empty(self.num_edited, vocab, dtype=torch.float32)
        self.best, self.best_id = empty(*tiles, dtype=torch.float32), empty(*tiles)
        self.raw_best, self.raw_id = empty(*tiles, dtype=torch.float32), empty(*tiles)
        self.raw_sum = empty(*tiles, dtype=torch.float32)
        self.mass = empty(*tiles, dtype=torch.int64)
        self.counts, self.starts, self.found = empty(*tiles, _BINS), empty(*tiles), empty(num_slots, 3)
        self.values = empty(num_slots, config.capacity, dtype=torch.float32)
        self.value_ids = empty(num_slots, config.capacity)


def sample_packed(
    logits: Tensor,
    packed: PackedRows,
    *,
    gumbel: bool = False,
    workspace: Workspace | None = None,
    results: Results | None = None,
) -> Results:
    """Enqueue the draws of `packed` from logits [n, vocab] float32, bfloat16 or float16, rows contiguous.

    The token is reference.sample's unless its target lies within about 1e-7 of a boundary between two tokens. `gumbel`
    draws from the same distribution by another use of the generator: reference.sample(..., use_gumbel=True).
    Raises: ValueError.
    """
    if logits.dtype not in _DTYPES or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits are {tuple(logits.shape)} {logits.dtype}, expected [n, vocab] rows of floats")
    vocab = logits.shape[1]
    work = workspace or Workspace(packed.num_slots, vocab, logits.device, num_edited=packed.kinds.num_edited)
    results = results or Results.empty(packed.num_slots, packed.kinds.max_top, logits.device)
    _check(packed, work, results, vocab)
    slots, by_tile = (packed.num_slots,), (packed.num_slots, work.num_tiles)
    if packed.num_slots == 0:
        return results
    row = (logits, logits.stride(0), packed.fields)
    launch = _Launcher(work, gumbel)
    launch(
        "prepare", by_tile,
        *row, packed.lists, work.edited, work.best, work.best_id, work.raw_best, work.raw_id, work.raw_sum,
        vocab, work.num_tiles,
    )  # fmt: skip
    if packed.kinds.weighs:
        launch(
            "weigh", by_tile,
            *row, work.edited, work.best, work.mass, work.counts, vocab, work.num_tiles,
        )  # fmt: skip
    if packed.kinds.selects:
        launch("bound", slots, packed.fields, work.mass, work.counts, work.starts, work.found, work.num_tiles)
        launch(
            "compact", by_tile,
            *row, work.edited, work.best, work.starts, work.found, work.values, work.value_ids,
            vocab, work.num_tiles, work.config.capacity,
        )  # fmt: skip
    launch(
        "draw", slots,
        *row, work.edited, work.best, work.best_id, work.raw_best, work.raw_sum, work.mass, work.found, work.values,
        work.value_ids, results.tokens, results.logprobs, vocab, work.num_tiles, work.config.capacity,
    )  # fmt: skip
    if results.max_top:
        launch(
            "top", slots,
            *row, work.raw_best, work.raw_id, work.raw_sum, results.top_ids, results.top_logprobs, results.max_top,
            vocab, work.num_tiles,
        )  # fmt: skip
    return results


class _Launcher:
    def __init__(self, work: Workspace, gumbel: bool) -> None:
        self._work, self._gumbel = work, gumbel

    def __call__(self, kernel: str, grid: tuple[int, ...], *arguments: object) -> None:
        config = compile_config(self._work.arch, kernel, self._work.config, self._gumbel)
        _kernel(kernel)[grid](*arguments, **config.constants, num_warps=config.num_warps)


def _kernel(name: str) -> Any:
    from engine.kernels.sampling import triton as kernels

    return getattr(kernels, name)


def _check(packed: PackedRows, work: Workspace, results: Results, vocab: int) -> None:
    if work.vocab != vocab or min(work.num_slots, results.num_slots) < packed.num_slots:
        raise ValueError(
            f"a workspace for {work.num_slots} rows of {work.vocab} and results for {results.num_slots} rows have no "
            f"room for {packed.num_slots} rows of {vocab}"
        )
    if work.num_edited < packed.kinds.num_edited:
        raise ValueError(
            f"{packed.kinds.num_edited} rows have penalties or bans; the workspace holds {work.num_edited}"
        )
    if results.max_top < packed.kinds.max_top:
        raise ValueError(f"{packed.kinds.max_top} top logprobs are wanted; results hold {results.max_top}")


_TYPES = {
    **dict.fromkeys(("edited", "best", "raw_best", "raw_sum", "values", "logprobs", "top_logprobs"), "*fp32"),
    **dict.fromkeys(("lists", "best_id", "raw_id", "counts", "starts", "found"), "*i32"),
    **dict.fromkeys(("value_ids", "tokens", "top_ids"), "*i32"),
    **dict.fromkeys(("fields", "mass"), "*i64"),
    **dict.fromkeys(("ld", "vocab", "num_tiles", "capacity", "max_top"), "i32"),
}
_ANYWHERE = {"logprobs", "top_ids", "top_logprobs", "num_tiles", "max_top"}
"""Views into the results and small numbers; everything else is a multiple of 16."""
_ARGUMENTS = {
    "prepare": "logits ld fields lists edited best best_id raw_best raw_id raw_sum vocab num_tiles",
    "weigh": "logits ld fields edited best mass counts vocab num_tiles",
    "bound": "fields mass counts starts found num_tiles",
    "compact": "logits ld fields edited best starts found values value_ids vocab num_tiles capacity",
    "draw": "logits ld fields edited best best_id raw_best raw_sum mass found values value_ids tokens logprobs "
    "vocab num_tiles capacity",
    "top": "logits ld fields raw_best raw_id raw_sum top_ids top_logprobs max_top vocab num_tiles",
}
_FLOPS = {"prepare": 4, "weigh": 10, "bound": 4, "compact": 10, "draw": 40, "top": 6}
"""Float and integer operations per token of a tile, about."""


def _case(kernel: str, logits: str, gumbel: bool = False) -> CompileCase:
    """The vocabulary is an argument: one binary serves all that are multiples of 16."""
    names, config = _ARGUMENTS[kernel].split(), tile_config(90)
    tokens = config.block if kernel == "draw" else config.tile
    return CompileCase(
        name=f"{kernel}-gumbel" if gumbel else kernel,
        kernel=lambda: _kernel(kernel),
        shape=f"V49152 V128256 V151936 {logits}",
        signature={name: f"*{logits}" if name == "logits" else _TYPES[name] for name in names},
        aligned=tuple(name for name in names if name not in _ANYWHERE),
        config=lambda arch: compile_config(arch, kernel, tile_config(arch), gumbel),
        flops=tokens * _FLOPS[kernel],
        bytes=tokens * (8 if kernel == "draw" else 2 if logits == "bf16" else 4),
        vector_loads=False,  # a row's fields are many narrow loads beside the tile's one wide one
    )


COMPILE_CASES = (
    *(_case(kernel, logits) for kernel in _ARGUMENTS for logits in ("bf16", "fp32") if kernel != "bound"),
    _case("bound", "bf16"),
    _case("weigh", "bf16", gumbel=True),
    _case("draw", "bf16", gumbel=True),
)
