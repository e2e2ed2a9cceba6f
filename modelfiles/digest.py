"""A model's identity: equal where, and only where, KV blocks and tokens may be exchanged.

Config and tokenizer are hashed whole, weights by their directory and by samples of every tensor: another training run
differs in every tensor, and 0.5 % of the bytes are enough to see it without reading 100 GB at each start.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable
from pathlib import Path

from modelfiles.gguf_file import read_gguf
from modelfiles.layout import GgufModel, HuggingFaceFolder, find_layout
from modelfiles.safetensors_file import read_safetensors
from modelfiles.shards import shard_paths

_SAMPLE_BYTES = 4096
_IDENTITY_FILES = ("config.json", "tokenizer.json")


def model_digest(path: str | Path) -> str:
    """64 hex digits over config, tokenizer, tensor directory and sampled weights. Milliseconds, any model size.

    Equal for copies of a model anywhere; different file formats of the same weights differ (their values do).
    """
    layout = find_layout(path)
    digest = hashlib.sha256(b"baton-model-1")
    if isinstance(layout, GgufModel):
        _add_gguf(digest, layout)
    else:
        _add_folder(digest, layout)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _add_gguf(digest: hashlib._Hash, model: GgufModel) -> None:  # pyright: ignore[reportPrivateUsage]
    """The header holds config, tokenizer, chat template and tensor directory."""
    file = read_gguf(model.path)
    digest.update(file.data[: file.header_bytes])
    spans = ((tensor.offset, tensor.num_bytes) for tensor in file.tensors.values())
    _add_samples(digest, file.data, spans)


def _add_folder(digest: hashlib._Hash, folder: HuggingFaceFolder) -> None:  # pyright: ignore[reportPrivateUsage]
    for name in _IDENTITY_FILES:
        file = folder.path / name
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    for shard in shard_paths(folder):
        weights = read_safetensors(shard)
        digest.update(weights.data[: weights.header_bytes])
        _add_samples(digest, weights.data, ((entry.offset, entry.num_bytes) for entry in weights.entries.values()))


def _add_samples(
    digest: hashlib._Hash,  # pyright: ignore[reportPrivateUsage]
    data: mmap.mmap,
    spans: Iterable[tuple[int, int]],
) -> None:
    """Start, middle and end of every tensor; small ones whole."""
    for offset, num_bytes in spans:
        if num_bytes <= 3 * _SAMPLE_BYTES:
            digest.update(data[offset : offset + num_bytes])
            continue
        for start in (0, (num_bytes - _SAMPLE_BYTES) // 2, num_bytes - _SAMPLE_BYTES):
            digest.update(data[offset + start : offset + start + _SAMPLE_BYTES])
