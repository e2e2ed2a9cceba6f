"""A model's tensors under Hugging Face's names, memory-mapped, whatever the file format.

    folder of safetensors   mapped as they are
    GGUF, F32/F16/BF16      mapped as they are
    GGUF, quantised         dequantised once into the model cache (see dequantized.py), then mapped

Arrays are writable private mappings: torch takes them without a copy, and a write would stay in the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt

from modelfiles import config_gguf, config_json
from modelfiles.cache import default_cache_dir
from modelfiles.config import ModelConfig
from modelfiles.dequantized import QuantizedTensor, dequantize_in_memory, open_dequantized
from modelfiles.digest import model_digest
from modelfiles.errors import CacheError, MalformedModel
from modelfiles.gguf_file import GgufFile, GgufTensor, TensorType, read_gguf
from modelfiles.layout import GgufModel, HuggingFaceFolder, find_layout
from modelfiles.quantization import Bytes
from modelfiles.safetensors_file import SafetensorsEntry, SafetensorsFile, read_safetensors
from modelfiles.shards import shard_paths
from modelfiles.tensor_names import check_tensors, expected_tensors, hugging_face_name, permuted_heads

Array: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]

_LOG = logging.getLogger(__name__)
_NUMPY_TYPES: Mapping[str, tuple[str, str]] = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
_UNQUANTIZED = {TensorType.F32, TensorType.F16, TensorType.BF16}
_MAX_THREADS = 8  # beyond, memory bandwidth is the limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor. `dtype` is torch's name; numpy knows no bfloat16, so its `array` then holds the bits as uint16.

    In torch: `torch.from_numpy(t.array)`, with `.view(torch.bfloat16)` where `t.dtype == "bfloat16"`.
    """

    name: str
    dtype: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def float32(self) -> npt.NDArray[np.float32]:
        """The values as float32, without a copy where they are."""
        if self.dtype == "bfloat16":
            return np.left_shift(self.array, 16, dtype=np.uint32).view(np.float32)
        return self.array.astype(np.float32, copy=False)


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
    def num_bytes(self) -> int:
        return sum(tensor.array.nbytes for tensor in self._tensors.values())


def open_weights(path: str | Path, *, cache_dir: Path | None = None, num_threads: int | None = None) -> Weights:
    """Map the weights of a local model and check them against its config.

    `cache_dir`: where dequantised files lie (default: the model cache). `num_threads`: for dequantising (default: the
    cores that this process may use).
    Raises: ModelNotFound, MalformedModel, UnsupportedModel (tensor type, by name), WeightsMismatch.
    """
    layout = find_layout(path)
    if isinstance(layout, HuggingFaceFolder):
        return _open_folder(layout)
    num_threads = num_threads or min(len(os.sched_getaffinity(0)), _MAX_THREADS)
    return _open_gguf(layout, cache_dir or default_cache_dir(), num_threads)


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


def _open_gguf(model: GgufModel, cache_dir: Path, num_threads: int) -> Weights:
    file = read_gguf(model.path)
    config = config_gguf.from_gguf(file)
    found = {hugging_face_name(name): tensor for name, tensor in file.tensors.items()}
    tensors = {name: tensor for name, tensor in found.items() if name is not None}
    check_tensors(config, {name: tensor.shape for name, tensor in tensors.items()}, str(file.path))
    wanted = {name: tensors[name] for name in _wanted(config, tensors)}
    if all(tensor.tensor_type in _UNQUANTIZED for tensor in wanted.values()):
        return Weights({name: _unquantized(file, name, tensor, config) for name, tensor in wanted.items()})
    return _dequantized(
        model, [_quantized(file, name, tensor, config) for name, tensor in wanted.items()], cache_dir, num_threads
    )


def _dequantized(model: GgufModel, tensors: list[QuantizedTensor], cache_dir: Path, num_threads: int) -> Weights:
    try:
        file = open_dequantized(tensors, model_digest(model.path), cache_dir, num_threads)
    except CacheError as error:
        _LOG.warning("dequantised weights are kept in this process's own memory: %s", error)
        with ThreadPoolExecutor(num_threads) as pool:
            arrays = pool.map(dequantize_in_memory, tensors)
            return Weights(
                {
                    tensor.name: StoredTensor(tensor.name, "float32", array)
                    for tensor, array in zip(tensors, arrays, strict=True)
                }
            )
    return Weights({name: _mapped(file, entry) for name, entry in file.entries.items()})


def _wanted(config: ModelConfig, found: Mapping[str, object]) -> Iterator[str]:
    """Without the copies and derived tensors that `check_tensors` lets pass."""
    return (name for name in expected_tensors(config) if name in found)


def _mapped(file: SafetensorsFile, entry: SafetensorsEntry) -> StoredTensor:
    dtype, numpy_type = _NUMPY_TYPES[entry.dtype]
    count = entry.num_bytes // np.dtype(numpy_type).itemsize
    return StoredTensor(
        entry.name, dtype, _aligned(np.frombuffer(file.data, numpy_type, count, entry.offset)).reshape(entry.shape)
    )


def _unquantized(file: GgufFile, name: str, tensor: GgufTensor, config: ModelConfig) -> StoredTensor:
    dtype, numpy_type = _NUMPY_TYPES[tensor.tensor_type.name]
    array = np.frombuffer(file.tensor_bytes(tensor.name), numpy_type).reshape(tensor.shape)
    heads = permuted_heads(config, name)
    if heads is not None:
        array = array[_row_order(tensor.shape[0], heads)]
    return StoredTensor(name, dtype, _aligned(array))


def _quantized(file: GgufFile, name: str, tensor: GgufTensor, config: ModelConfig) -> QuantizedTensor:
    heads = permuted_heads(config, name)
    return QuantizedTensor(name, tensor.shape, tensor.tensor_type, partial(_raw_blocks, file, tensor, heads))


def _raw_blocks(file: GgufFile, tensor: GgufTensor, heads: int | None) -> Bytes:
    """Rows are whole blocks, so rows can be put in order before they are dequantised."""
    raw = np.frombuffer(file.tensor_bytes(tensor.name), np.uint8)
    if heads is None:
        return raw
    rows = tensor.shape[0]
    return raw.reshape(rows, -1)[_row_order(rows, heads)].reshape(-1)


def _row_order(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Undo llama.cpp's reordering: it stores (0, half), (1, half + 1), ... of each head side by side."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _aligned(array: npt.NDArray[np.generic]) -> Array:
    """Old writers did not pad their headers; torch refuses such arrays."""
    return cast(Array, array if array.flags.aligned else array.copy())
