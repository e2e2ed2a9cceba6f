"""A model's tensors under Hugging Face's names, memory-mapped, whatever the file format.

    folder of safetensors   mapped as they are
    GGUF, F32/F16/BF16      mapped as they are
    GGUF, quantised         mapped; rows are dequantised each time they are read

What a worker computes with is packed from these once per host (engine/loading). Arrays are writable private mappings:
torch takes them without a copy, and a write would stay in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from modelfiles import config_gguf, config_json
from modelfiles.config import ModelConfig
from modelfiles.errors import MalformedModel
from modelfiles.gguf_file import GgufFile, GgufTensor, TensorType, read_gguf
from modelfiles.layout import GgufModel, HuggingFaceFolder, find_layout
from modelfiles.quantization import dequantize_all
from modelfiles.safetensors_file import SafetensorsEntry, SafetensorsFile, read_safetensors
from modelfiles.shards import shard_paths
from modelfiles.tensor_names import check_tensors, expected_tensors, hugging_face_name, permuted_heads

Array: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]
ReadRows: TypeAlias = Callable[[int, int], Array]

_NUMPY_TYPES: Mapping[str, tuple[str, str]] = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
_UNQUANTIZED = {TensorType.F32, TensorType.F16, TensorType.BF16}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor. `dtype` is torch's name; numpy knows no bfloat16, so its arrays then hold the bits as uint16.

    In torch: `torch.from_numpy(t.array)`, with `.view(torch.bfloat16)` where `t.dtype == "bfloat16"`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: ReadRows = field(repr=False)

    @property
    def array(self) -> Array:
        """All values: a mapping of the file, unless they are quantised there."""
        return self.read(0, self.shape[0])

    def float32(self, begin: int = 0, end: int | None = None) -> npt.NDArray[np.float32]:
        """Rows [begin, end) as float32, without a copy where they are."""
        rows = self.read(begin, self.shape[0] if end is None else end)
        if self.dtype == "bfloat16":
            return np.left_shift(rows, 16, dtype=np.uint32).view(np.float32)
        return rows.astype(np.float32, copy=False)


class Weights(Mapping[str, StoredTensor]):
    """Tensors by Hugging Face name; exactly those that the config asks for."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def num_float32_bytes(self) -> int:
        """What they take in memory once read."""
        return sum(4 * prod(tensor.shape) for tensor in self._tensors.values())


def open_weights(path: str | Path) -> Weights:
    """Map the weights of a local model and check them against its config.

    Raises: ModelNotFound, MalformedModel, UnsupportedModel (tensor type, by name), WeightsMismatch.
    """
    layout = find_layout(path)
    return _open_folder(layout) if isinstance(layout, HuggingFaceFolder) else _open_gguf(layout)


def _open_folder(folder: HuggingFaceFolder) -> Weights:
    config = config_json.load(folder)
    found = dict[str, tuple[SafetensorsFile, SafetensorsEntry]]()
    for path in shard_paths(folder):
        shard = read_safetensors(path)
        for name, entry in shard.entries.items():
            if name in found:
                raise MalformedModel(f"{folder.path}: tensor {name} is in {found[name][0].path.name} and {path.name}")
            found[name] = (shard, entry)
    check_tensors(config, {name: entry.shape for name, (_, entry) in found.items()}, str(folder.path))
    return Weights({name: _mapped(*found[name]) for name in _wanted(config, found)})


def _open_gguf(model: GgufModel) -> Weights:
    file = read_gguf(model.path)
    config = config_gguf.from_gguf(file)
    found = {hugging_face_name(name): tensor for name, tensor in file.tensors.items()}
    tensors = {name: tensor for name, tensor in found.items() if name is not None}
    check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, str(file.path))
    return Weights({name: _stored(file, name, tensors[name], config) for name in _wanted(config, tensors)})


def _wanted(config: ModelConfig, found: Mapping[str, object]) -> Iterator[str]:
    """Without the copies and derived tensors that `check_tensors` lets pass."""
    return (name for name in expected_tensors(config) if name in found)


def _mapped(file: SafetensorsFile, entry: SafetensorsEntry) -> StoredTensor:
    dtype, numpy_type = _NUMPY_TYPES[entry.dtype]
    count = entry.num_bytes // np.dtype(numpy_type).itemsize
    array = np.frombuffer(file.data, numpy_type, count, entry.offset).reshape(entry.shape)
    return StoredTensor(entry.name, dtype, entry.shape, partial(_slice, array, None))


def _stored(file: GgufFile, name: str, tensor: GgufTensor, config: ModelConfig) -> StoredTensor:
    heads = permuted_heads(config, name)
    order = None if heads is None else _row_order(tensor.shape[0], heads)
    raw = file.tensor_bytes(tensor.name)
    if tensor.tensor_type in _UNQUANTIZED:
        dtype, numpy_type = _NUMPY_TYPES[tensor.tensor_type.name]
        array = np.frombuffer(raw, numpy_type).reshape(tensor.shape)
        return StoredTensor(name, dtype, tensor.shape, partial(_slice, array, order))
    if len(tensor.shape) == 1:
        values = dequantize_all(tensor.tensor_type, np.frombuffer(raw, np.uint8))
        return StoredTensor(name, "float32", tensor.shape, partial(_slice, values, order))
    blocks = np.frombuffer(raw, np.uint8).reshape(tensor.shape[0], -1)  # rows are whole blocks
    return StoredTensor(name, "float32", tensor.shape, partial(_dequantized, tensor, blocks, order))


def _slice(array: npt.NDArray[np.generic], order: npt.NDArray[np.intp] | None, begin: int, end: int) -> Array:
    """Old writers did not pad their headers; torch refuses arrays that are not aligned."""
    rows = array[begin:end] if order is None else array[order[begin:end]]
    return cast(Array, rows if rows.flags.aligned else rows.copy())


def _dequantized(
    tensor: GgufTensor, blocks: npt.NDArray[np.uint8], order: npt.NDArray[np.intp] | None, begin: int, end: int
) -> Array:
    raw = blocks[begin:end] if order is None else blocks[order[begin:end]]
    shape = (raw.shape[0], *tensor.shape[1:])
    return dequantize_all(tensor.tensor_type, raw.reshape(-1)).reshape(shape)


def _row_order(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Undo llama.cpp's reordering: it stores (0, half), (1, half + 1), ... of each head side by side."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
