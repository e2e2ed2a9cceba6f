"""Which packed weight lies where: a pure function of the model's config and of the kernels' panel format.

Parts follow one another in the order in which a forward pass asks for them, each on a page of its own. A part is cut
into pieces of whole panels, which are packed, checked and counted one by one, so that packing needs little memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from engine.models.weights import load_decoder_weights
from modelfiles.config import ModelConfig
from modelfiles.tensor_names import expected_tensors

PIECE_BYTES = 4 * 1024**2
_ALIGNMENT = 4096
_ITEM_SIZES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class PanelFormat:
    """What packing depends on: two instruction sets with equal numbers share packed weights."""

    vector_width: int
    panel: int
    dtype: str

    @property
    def item_size(self) -> int:
        return _ITEM_SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}-w{self.vector_width}p{self.panel}"


class PartKind(Enum):
    VECTOR = "vector"
    """Norms and biases, float32 as they are."""
    MATRIX = "matrix"
    GATED = "gated"
    """Gate and up in turns within each panel."""


@dataclass(frozen=True, slots=True)
class Part:
    """One packed weight. `offset`: bytes from the start of the region; `sources`: names and rows, in column order."""

    kind: PartKind
    sources: tuple[tuple[str, int], ...]
    offset: int
    n: int
    k: int
    columns: int
    """Columns of the result per panel; of a vector, all."""
    panel_bytes: int

    @property
    def num_panels(self) -> int:
        return -(-self.n // self.columns)

    @property
    def num_bytes(self) -> int:
        return self.num_panels * self.panel_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Panels [begin, end) of a part."""

    part: Part
    begin: int
    end: int

    @property
    def offset(self) -> int:
        return self.part.offset + self.begin * self.part.panel_bytes

    @property
    def num_bytes(self) -> int:
        return (self.end - self.begin) * self.part.panel_bytes


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """All parts of a model; looked up by the names of their tensors."""

    config: ModelConfig
    format: PanelFormat
    parts: Mapping[tuple[str, ...], Part] = field(repr=False)
    num_bytes: int

    @classmethod
    def of(cls, config: ModelConfig, panel_format: PanelFormat) -> PackedLayout:
        recorder = _Recorder(config, panel_format)
        load_decoder_weights(config, recorder)
        return cls(config, panel_format, recorder.parts, recorder.num_bytes)

    def pieces(self) -> list[Piece]:
        """In order of their offsets."""
        pieces: list[Piece] = []
        for part in self.parts.values():
            step = max(1, PIECE_BYTES // part.panel_bytes)
            pieces += [Piece(part, i, min(i + step, part.num_panels)) for i in range(0, part.num_panels, step)]
        return pieces


class _Recorder:
    """A WeightStore that notes what is asked for."""

    def __init__(self, config: ModelConfig, panel_format: PanelFormat) -> None:
        self._shapes = expected_tensors(config)
        self._format = panel_format
        self.parts: dict[tuple[str, ...], Part] = {}
        self.num_bytes = 0

    def vector(self, names: Sequence[str]) -> None:
        n = sum(self._shapes[name][0] for name in names)
        self._add(PartKind.VECTOR, names, n, 1, n, n * 4)

    def matrix(self, names: Sequence[str], biases: Sequence[str] = ()) -> None:
        n, k = sum(self._shapes[name][0] for name in names), self._shapes[names[0]][1]
        panel = self._format.panel
        self._add(PartKind.MATRIX, names, n, k, panel, k * panel * self._format.item_size)
        if biases:
            self.vector(biases)

    def gated(self, gate: str, up: str) -> None:
        n, k = self._shapes[gate]
        panel_bytes = k * self._format.panel * self._format.item_size
        self._add(PartKind.GATED, (gate, up), n, k, self._format.vector_width, panel_bytes)

    def _add(self, kind: PartKind, names: Sequence[str], n: int, k: int, columns: int, panel_bytes: int) -> None:
        sources = tuple((name, self._shapes[name][0]) for name in names)
        part = Part(kind, sources, self.num_bytes, n, k, columns, panel_bytes)
        self.parts[tuple(names)] = part
        self.num_bytes += -(-part.num_bytes // _ALIGNMENT) * _ALIGNMENT
