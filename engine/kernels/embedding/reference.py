"""What the embedding kernel computes, in plain torch."""

from __future__ import annotations

from torch import Tensor


def embed(token_ids: Tensor, weight: Tensor) -> Tensor:
    """weight [vocab, hidden] at token_ids [n] -> [n, hidden]."""
    return weight[token_ids]
