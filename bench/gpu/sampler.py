"""Drawing tokens from a vocabulary of 151,936, as the sampler does it and as a sort in torch would."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.harness import Bench, Figure
from engine.kernels.sampling.launch import Workspace, sample_packed
from engine.kernels.sampling.packed_rows import pack_rows
from engine.kernels.sampling.rows import SampleRow

VOCAB = 151_936
KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


def sampler(bench: Bench) -> None:
    vocab = 500 if bench.is_rehearsal else VOCAB
    for batch in (2,) if bench.is_rehearsal else (1, 32, 256):
        logits = torch.randn(batch, vocab, device=bench.device) * 4
        for kind, settings in KINDS.items():
            if not bench.has_time(3):
                return
            rows = [
                SampleRow(logits_row=i, seed=7, choice=0, position=i, **settings)  # pyright: ignore[reportArgumentType]
                for i in range(batch)
            ]
            packed, workspace = pack_rows(rows, vocab, bench.device), Workspace(batch, vocab, bench.device)
            ours = bench.seconds_of(lambda: sample_packed(logits, packed, workspace=workspace))  # noqa: B023, called here
            theirs = bench.seconds_of(_sorted(logits)) if "top" in kind else 0.0
            bench.add(
                Figure(
                    part="sampler",
                    case=f"{kind}, {batch} rows of {vocab}",
                    unit="rows/s",
                    ours=batch / ours,
                    theirs=batch / theirs if theirs else 0.0,
                    theirs_name="torch sort" if theirs else "",
                )
            )


def _sorted(logits: Tensor) -> Callable[[], Tensor]:
    """Top-p as it is usually written: sort, sum up, cut, draw."""

    def draw() -> Tensor:
        values, ids = torch.sort(logits / 0.8, descending=True)
        weights = values.softmax(-1)
        weights = weights.masked_fill(weights.cumsum(-1) - weights > 0.9, 0.0)
        return ids.gather(-1, torch.multinomial(weights, 1))

    return draw
