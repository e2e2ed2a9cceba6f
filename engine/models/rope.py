"""Rotary tables: cosine and sine of every position, for all scalings that transformers knows for these families.

A row depends on its position only. transformers recomputes `dynamic` and `longrope` frequencies from the longest
sequence of a batch, so that there a token's keys depend on its neighbours; here position p uses the frequencies of a
sequence of p + 1 tokens, which is what transformers does when it decodes token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from modelfiles.config import ModelConfig, RopeScaling, RopeType


class RopeTable:
    """Grows with the longest position seen; rows never change once made."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        half = config.head_dim // 2
        self.cos = torch.empty(0, half)
        self.sin = torch.empty(0, half)

    def ensure(self, num_positions: int) -> None:
        """Make rows for positions [0, num_positions), in steps of at least 1,024 and doubling."""
        present = self.cos.shape[0]
        if num_positions <= present:
            return
        target = max(1024, 2 * present, 1 << (num_positions - 1).bit_length())
        cos, sin = rope_rows(self._config, present, target)
        self.cos, self.sin = torch.cat((self.cos, cos)), torch.cat((self.sin, sin))


def rope_rows(config: ModelConfig, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [end - begin, head_dim / 2] of positions [begin, end).

    Angles are float32 products as in transformers; their cosines are taken in double, so that no vector library's last
    bit decides.
    """
    positions = torch.arange(begin, end)
    frequencies, scale = _frequencies(config, positions)
    angles = (frequencies * positions.float().unsqueeze(1)).double().numpy()
    cos, sin = (torch.from_numpy(function(angles).astype(np.float32)) for function in (np.cos, np.sin))
    return (cos * scale).contiguous(), (sin * scale).contiguous()


def _frequencies(config: ModelConfig, positions: Tensor) -> tuple[Tensor, float]:
    """Inverse frequencies, [1 or positions, head_dim / 2], and the factor on cosine and sine."""
    scaling = config.rope_scaling
    if scaling is None:
        return _plain(config).unsqueeze(0), 1.0
    return _SCALINGS[scaling.rope_type](config, scaling, positions)


def _exponents(config: ModelConfig) -> Tensor:
    return torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim


def _plain(config: ModelConfig) -> Tensor:
    return 1.0 / (config.rope_theta ** _exponents(config))


def _linear(config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> tuple[Tensor, float]:
    return (_plain(config) / scaling.factor).unsqueeze(0), 1.0


def _frequency_factors(config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> tuple[Tensor, float]:
    return (_plain(config) / torch.tensor(scaling.frequency_factors)).unsqueeze(0), 1.0


def _dynamic(config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> tuple[Tensor, float]:
    limit, factor, dim = config.max_position_embeddings, scaling.factor, config.head_dim
    lengths = (positions + 1).clamp(min=limit)
    base = config.rope_theta * ((factor * lengths / limit) - (factor - 1)) ** (dim / (dim - 2))
    return 1.0 / (base.unsqueeze(1) ** _exponents(config)), 1.0


def _llama3(config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> tuple[Tensor, float]:
    assert scaling.original_max_position_embeddings is not None
    original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    plain = _plain(config)
    wavelength = 2 * math.pi / plain
    slow = torch.where(wavelength > original / low, plain / scaling.factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * slow / scaling.factor + smooth * slow
    medium = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(medium, blended, slow).unsqueeze(0), 1.0


def _yarn(config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> tuple[Tensor, float]:
    dim, base = config.head_dim, config.rope_theta
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    powers = base ** _exponents(config)
    extrapolated, interpolated = 1.0 / powers, 1.0 / (scaling.factor * powers)
    ends = [
        dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
        for rotations in (scaling.beta_fast, scaling.beta_slow)
    ]
    low, high = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.truncate else ends
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return (interpolated * (1 - keep) + extrapolated * keep).unsqueeze(0), _yarn_factor(scaling)


def _yarn_factor(scaling: RopeScaling) -> float:
    def by(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return by(scaling.mscale) / by(scaling.mscale_all_dim)
    return by(1.0)


def _longrope(config: ModelConfig, scaling: RopeScaling, positions: Tensor) -> tuple[Tensor, float]:
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    powers = config.rope_theta ** _exponents(config)
    long, short = (1.0 / (torch.tensor(f) * powers) for f in (scaling.long_factor, scaling.short_factor))
    scale = scaling.attention_factor
    if scale is None:
        scale = 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return torch.where((positions + 1 > original).unsqueeze(1), long, short), scale


_SCALINGS: dict[RopeType, Callable[[ModelConfig, RopeScaling, Tensor], tuple[Tensor, float]]] = {
    RopeType.LINEAR: _linear,
    RopeType.DYNAMIC: _dynamic,
    RopeType.YARN: _yarn,
    RopeType.LONGROPE: _longrope,
    RopeType.LLAMA3: _llama3,
    RopeType.FREQUENCY_FACTORS: _frequency_factors,
}
