"""What is on disk: find a model, fetch it, verify it, read its config, tokenizer and weights.

Belongs here: file formats, the model cache, digests. Does not belong here: torch, running a model, talking to workers.
Imports nothing of ours. Weights are in `modelfiles.weights`, fetching in `modelfiles.store`: both import more than a
command line wants to wait for.
"""

from modelfiles.config import Architecture, GenerationDefaults, ModelConfig, RopeScaling, RopeType
from modelfiles.read_config import load_config
from modelfiles.tokenizer import (
    SpecialTokens,
    load_chat_template,
    load_chat_templates,
    load_special_tokens,
    load_tokenizer,
)

__all__ = [
    "Architecture",
    "GenerationDefaults",
    "ModelConfig",
    "RopeScaling",
    "RopeType",
    "SpecialTokens",
    "load_chat_template",
    "load_chat_templates",
    "load_config",
    "load_special_tokens",
    "load_tokenizer",
]
