"""Which safetensors files make up a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from modelfiles.errors import MalformedModel, ModelNotFound, UnsupportedModel
from modelfiles.layout import SAFETENSORS_INDEX, HuggingFaceFolder

_SINGLE = "model.safetensors"


def shard_paths(folder: HuggingFaceFolder) -> list[Path]:
    """The files in order, each known to exist.

    Raises: ModelNotFound (none), MalformedModel (index names a missing or outside file), UnsupportedModel (pickles).
    """
    index = folder.read_json(SAFETENSORS_INDEX)
    if index is not None:
        return _indexed(folder, index)
    if (folder.path / _SINGLE).is_file():
        return [folder.path / _SINGLE]
    if any(folder.path.glob("pytorch_model*.bin")):
        raise UnsupportedModel(
            f"{folder.path} holds pickled weights, which can run code when they are read; convert them with "
            "transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    raise ModelNotFound(f"{folder.path} holds no {_SINGLE} and no {SAFETENSORS_INDEX}")


def _indexed(folder: HuggingFaceFolder, index: dict[str, object]) -> list[Path]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedModel(f"{folder.path}/{SAFETENSORS_INDEX} has no weight_map")
    names = sorted({str(name) for name in cast(dict[str, object], weight_map).values()})
    for name in names:
        if Path(name).name != name:
            raise MalformedModel(f"{folder.path}/{SAFETENSORS_INDEX} names {name!r}, which is outside the folder")
        if not (folder.path / name).is_file():
            raise MalformedModel(f"{folder.path} lacks {name}, one of {len(names)} shards; fetch the model again")
    return [folder.path / name for name in names]
