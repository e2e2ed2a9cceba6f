"""Read a model's config from whichever kind of files it has.

What we cannot run is refused here, by the name of the feature, before a byte of weights is read: a silently ignored
field would mean wrong tokens.
"""

from __future__ import annotations

from pathlib import Path

from modelfiles import config_gguf, config_json
from modelfiles.config import ModelConfig
from modelfiles.layout import GgufModel, find_layout


def load_config(path: str | Path) -> ModelConfig:
    """Read the config of a local model (folder or .gguf file).

    Raises: ModelNotFound, MalformedModel, UnsupportedModel (architecture or feature, by name).
    """
    layout = find_layout(path)
    if isinstance(layout, GgufModel):
        return config_gguf.load(layout)
    return config_json.load(layout)
