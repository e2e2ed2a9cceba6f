"""Native contexts for every instruction set that this machine can run: the narrower ones have other tiles and tails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from engine.kernels.native.build import Isa, supported_isas
from engine.kernels.native.library import NativeContext, load_library
from engine.kernels.native.program import StepArrays

StepMaker = Callable[..., StepArrays]


@pytest.fixture(scope="session", params=supported_isas(), ids=lambda isa: isa.name)
def context(request: pytest.FixtureRequest) -> Iterator[NativeContext]:
    """Two threads on one instruction set."""
    isa: Isa = request.param
    opened = NativeContext(2, load_library(isa))
    yield opened
    opened.close()


@pytest.fixture
def make_step() -> StepMaker:
    """Build a packed step from (start, num_tokens, block_table) per sequence."""

    def make(
        chunks: list[tuple[int, int, list[int]]],
        token_ids: list[int] | None = None,
        sampled: list[int] | None = None,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
    ) -> StepArrays:
        lengths = [length for _, length, _ in chunks]
        tables = [table for _, _, table in chunks]
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        return StepArrays(
            token_ids=np.array(token_ids if token_ids is not None else [0] * sum(lengths), np.int32),
            query_starts=starts,
            positions=np.array([start for start, _, _ in chunks], np.int32),
            table_offsets=np.cumsum([0, *(len(table) for table in tables)])[:-1].astype(np.int64),
            block_tables=np.array([block for table in tables for block in table], np.int32),
            sampled_rows=np.array(sampled or [], np.int32),
            rope_cos=cos if cos is not None else torch.empty(0),
            rope_sin=sin if sin is not None else torch.empty(0),
        )

    return make
