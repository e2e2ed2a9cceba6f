"""What a model is: its architecture and sizes, from config.json or from GGUF metadata.

One frozen value for both; the decoder reads nothing else. `read_config` makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Architecture(StrEnum):
    """Decoder families. Equal to their model_type, so `config.architecture == "llama"` holds."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"


class RopeType(StrEnum):
    """How rotary frequencies are scaled. Names are transformers', except the last."""

    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LONGROPE = "longrope"
    LLAMA3 = "llama3"
    FREQUENCY_FACTORS = "frequency_factors"
    """GGUF's form of llama3: each inverse frequency is divided by its entry of `frequency_factors`."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters of a rope scaling. Fields that its type does not use are at their defaults.

    Defaults are those of transformers' `modeling_rope_utils`. `attention_factor` None: derived from the others.
    """

    rope_type: RopeType
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # longrope, [head_dim / 2] each
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    # frequency_factors, [head_dim / 2]
    frequency_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling defaults that the model's authors ship. None: they said nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that the decoder and the gateway need to know about a model before its weights.

    `attention_bias`: biases on q, k, v (Qwen2). `qk_norm`: RMSNorm per head on q and k before RoPE (Qwen3).
    `max_position_embeddings`: as the checkpoint states it. `dtype`: the checkpoint's element type ("float32",
    "float16", "bfloat16"; quantised GGUF files say "float32", which is what they are dequantised to).
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None = None
    generation: GenerationDefaults = GenerationDefaults()
    dtype: str = "float32"
