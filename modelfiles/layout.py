"""Where a model's files lie: a Hugging Face folder or one GGUF file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from modelfiles.errors import MalformedModel, ModelNotFound, UnsupportedModel

SAFETENSORS_INDEX = "model.safetensors.index.json"

JsonObject: TypeAlias = dict[str, object]


@dataclass(frozen=True, slots=True)
class HuggingFaceFolder:
    """A folder with config.json, *.safetensors and tokenizer.json."""

    path: Path

    def read_json(self, name: str) -> JsonObject | None:
        """The parsed file, or None where it does not exist."""
        return read_json_object(self.path / name)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """One .gguf file that holds config, tokenizer and weights."""

    path: Path


ModelLayout: TypeAlias = HuggingFaceFolder | GgufModel


def find_layout(path: str | Path) -> ModelLayout:
    """What kind of model `path` is: a folder, a folder with one GGUF file, or a GGUF file.

    Raises: ModelNotFound, UnsupportedModel (several GGUF files, split GGUF, pickled weights only).
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{path} is a file, but no .gguf; name the folder that holds config.json")
        return GgufModel(_refuse_split(path))
    if not path.is_dir():
        raise ModelNotFound(f"{path} does not exist; name a local folder, a .gguf file, or pull a model first")
    if (path / "config.json").is_file():
        return HuggingFaceFolder(path)
    candidates = sorted(path.glob("*.gguf"))
    if len(candidates) == 1:
        return GgufModel(_refuse_split(candidates[0]))
    if candidates:
        names = ", ".join(candidate.name for candidate in candidates)
        raise UnsupportedModel(f"{path} holds several GGUF files ({names}); name one of them")
    raise ModelNotFound(f"{path} holds neither config.json nor a .gguf file")


def read_json_object(path: Path) -> JsonObject | None:
    """The JSON object in a file, or None where the file does not exist."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        value: object = json.loads(text)
    except ValueError as error:
        raise MalformedModel(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise MalformedModel(f"{path} should hold a JSON object")
    return cast(JsonObject, value)


def _refuse_split(path: Path) -> Path:
    if "-of-" in path.stem:
        raise UnsupportedModel(f"{path.name} is one part of a split GGUF; merge the parts with `gguf-split --merge`")
    return path
