"""What is on disk: find a model, fetch it, verify it, read its config, tokenizer and weights.

Belongs here: file formats, the model cache, digests. Does not belong here: torch, running a model, talking to workers.
Imports nothing of ours.
"""

from modelfiles.config import Architecture, GenerationDefaults, ModelConfig, RopeScaling, RopeType, load_config

__all__ = ["Architecture", "GenerationDefaults", "ModelConfig", "RopeScaling", "RopeType", "load_config"]
