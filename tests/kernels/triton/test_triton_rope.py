"""RoPE, head norms and the KV write in Triton, plain and quantised, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.rms_norm.reference import rms_norm
from engine.kernels.rope import launch
from engine.kernels.rope.reference import dequantise, quantise, rotate
from tests.kernels.triton.mutants import assert_caught

HEADS, KV_HEADS, LAYERS, BLOCKS, POSITIONS = 6, 2, 3, 40, 64
NAN = float("nan")
EPSILON = 1e-6


@dataclass
class Scene:
    """A packed step at random positions and slots, into a cache where every number is a marker."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    slots: Tensor
    cache: Tensor
    scales: Tensor | None
    norms: tuple[Tensor, Tensor] | tuple[None, None]

    def run(self, layer: int) -> None:
        launch.rope_write(
            self.qkv, self.cos, self.sin, self.positions, self.slots, self.cache, layer, HEADS, *self.norms, EPSILON,
            self.scales,
        )  # fmt: skip

    def want(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, in float64."""
        q, k, v = self.qkv.double().unflatten(1, (-1, self.cache.shape[5])).split((HEADS, KV_HEADS, KV_HEADS), 1)
        if self.norms[0] is not None and self.norms[1] is not None:
            q, k = (rms_norm(x, w.double(), EPSILON) for x, w in zip((q, k), self.norms, strict=True))
        cos, sin = self.cos[self.positions].double(), self.sin[self.positions].double()
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def stored(self, layer: int, kind: int) -> tuple[Tensor, Tensor | None]:
        """What the cache, and its scales, hold for the step's tokens."""
        size = self.cache.shape[4]
        place = (self.slots // size, slice(None), layer, kind, self.slots % size)
        return self.cache[place], None if self.scales is None else self.scales[place]


def make_scene(
    tokens: int, dim: int, block_size: int, kv: torch.dtype, dtype: torch.dtype = torch.float32, normed: bool = False
) -> Scene:
    angles = torch.rand(POSITIONS, dim // 2) * 6
    quantised = kv in (torch.int8, torch.float8_e4m3fn)
    shape = (BLOCKS, KV_HEADS, LAYERS, 2, block_size, dim)
    cache = torch.full(shape, 77.0 if quantised else NAN).to(kv)
    return Scene(
        qkv=torch.full((tokens + 2, (HEADS + 2 * KV_HEADS) * dim + 8), NAN, dtype=dtype)[1:-1, 4:-4],
        cos=angles.cos(),
        sin=angles.sin(),
        positions=torch.randint(POSITIONS, (tokens,), dtype=torch.int32),
        slots=torch.randperm(BLOCKS * block_size)[:tokens],
        cache=cache,
        scales=torch.full(shape[:5], NAN) if quantised else None,
        norms=(torch.randn(dim), torch.randn(dim)) if normed else (None, None),
    )


def filled(scene: Scene) -> Scene:
    scene.qkv.copy_(torch.randn(scene.qkv.shape))
    return scene


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(
    ("tokens", "dim", "block_size"), [(1, 2, 1), (10, 20, 4), (11, 64, 16), (33, 32, 8)], ids=lambda v: str(v)
)
def test_rope_rotates_queries_and_writes_only_its_own_slots(
    tokens: int, dim: int, block_size: int, normed: bool
) -> None:
    scene = filled(make_scene(tokens, dim, block_size, torch.float32, normed=normed))
    q, k, v = scene.want()
    before = scene.qkv.clone()
    scene.run(1)
    size = HEADS * dim
    torch.testing.assert_close(scene.qkv[:, :size].double(), q.flatten(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(scene.qkv[:, size:], before[:, size:])
    torch.testing.assert_close(scene.stored(1, 0)[0].double(), k, rtol=1e-5, atol=1e-5)
    assert torch.equal(scene.stored(1, 1)[0].double(), v)
    scene.cache[scene.slots // block_size, :, 1, :, scene.slots % block_size] = NAN
    assert scene.cache.isnan().all()
    whole = scene.qkv._base
    assert whole is not None
    scene.qkv.fill_(NAN)
    assert whole.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rotated_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    scene = filled(make_scene(9, 16, 4, dtype, dtype, normed=True))
    q, k, v = scene.want()
    scene.run(2)
    eps = torch.finfo(dtype).eps  # the interpreter cuts bfloat16 off instead of rounding it
    torch.testing.assert_close(scene.qkv[:, : HEADS * 16].double(), q.flatten(1), rtol=1.01 * eps, atol=1e-4)
    torch.testing.assert_close(scene.stored(2, 0)[0].double(), k, rtol=1.01 * eps, atol=1e-4)
    assert torch.equal(scene.stored(2, 1)[0].double(), v)


@pytest.mark.parametrize("dim", [20, 64], ids=str)
@pytest.mark.parametrize("kv", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_cache_holds_what_the_reference_rounds_to(kv: torch.dtype, dim: int) -> None:
    scene = filled(make_scene(17, dim, 4, kv, normed=True))
    scene.qkv[3] = 0.0
    scene.qkv[5] *= 1e-4 * torch.rand(scene.qkv.shape[1])
    _, k, v = scene.want()
    untouched, others = scene.cache.clone(), torch.ones(BLOCKS * 4, dtype=torch.bool)
    scene.run(0)
    for kind, numbers in ((0, k), (1, v)):
        stored, scales = scene.stored(0, kind)
        assert scales is not None
        want, want_scales = quantise(numbers, kv)
        torch.testing.assert_close(scales.double(), want_scales.double(), rtol=3e-6, atol=0)
        # A number that float32 puts on the other side of a boundary falls to the next value.
        step = {torch.int8: 1.0, torch.float8_e4m3fn: 32.0}[kv]
        apart = (stored.double() - want.double()).abs()
        assert apart.max() <= step
        assert (apart > 0).double().mean() < 0.01
        largest = numbers.abs().amax(-1, keepdim=True)
        allowed = largest / 254 if kv is torch.int8 else numbers.abs() / 16 + largest / 448 * 2.0**-10
        error = (dequantise(stored, scales).double() - numbers).abs()
        assert (error <= 1.001 * allowed + 1e-30).all()
    others[scene.slots] = False
    rest = others.nonzero().squeeze(1)
    for layer, at in ((0, rest), (1, scene.slots), (2, scene.slots)):
        place = (at // 4, slice(None), layer, slice(None), at % 4)
        assert torch.equal(scene.cache[place].view(torch.uint8), untouched[place].view(torch.uint8))
        assert scene.scales is not None
        assert scene.scales[place].isnan().all()


def test_every_float8_and_every_boundary_between_two_is_rounded_as_torch_does() -> None:
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (values[1:] + values[:-1]) / 2
    numbers = torch.cat((values, middles, middles.nextafter(torch.tensor(0.0)), middles.nextafter(torch.tensor(500.0))))
    signed = torch.cat((numbers, -numbers))
    rows = torch.cat((signed, torch.zeros(-len(signed) % 63))).view(-1, 63)
    rows = torch.cat((rows, torch.full((len(rows), 1), 448.0)), 1)  # makes the scale 1
    scene = make_scene(len(rows), 64, 4, torch.float8_e4m3fn)
    scene.qkv.fill_(0.0)
    scene.qkv[:, -64:] = rows
    scene.run(0)
    stored, scales = scene.stored(0, 1)
    assert scales is not None
    assert (scales[:, -1] == 1).all()
    assert torch.equal(stored[:, -1].float(), rows.to(torch.float8_e4m3fn).float())


def test_padded_rows_write_to_the_slot_they_are_given_and_nowhere_else() -> None:
    scene = filled(make_scene(5, 16, 4, torch.float32))
    scene.slots[2:] = (BLOCKS - 1) * 4
    scene.slots[:2] = torch.tensor([0, 5])
    scene.run(0)
    written = ~scene.cache[:, :, 0].isnan().flatten(3).all(3).all(1)
    assert sorted(set(scene.cache[:, 0, 0, 0, :, 0].flatten().isfinite().nonzero().flatten().tolist())) == [0, 5, 156]
    assert written.any()


def test_what_does_not_fit_is_refused() -> None:
    def refuse(match: str, scene: Scene, layer: int = 0) -> None:
        with pytest.raises(ValueError, match=match):
            scene.run(layer)

    good = make_scene(3, 8, 4, torch.float32)
    refuse("layer 3 of 3", good, 3)
    for name, value, match in (
        ("qkv", torch.empty(3, 7), "does not fit"),
        ("cos", torch.empty(9, 5), "rotary table"),
        ("slots", good.slots.int(), "slot_mapping"),
        ("norms", (torch.empty(8), None), "neither"),
        ("scales", torch.empty(1), "kv_scales"),
        ("cache", good.cache.double(), "float64"),
    ):
        scene = make_scene(3, 8, 4, torch.float32)
        setattr(scene, name, value)
        refuse(match, scene)
    scene = make_scene(3, 8, 4, torch.int8)
    scene.scales = None
    refuse("absent", scene)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row_mask = row < num_tokens * HEADS", "row_mask = row < num_tokens * HEADS - 1"),
        ("row_mask = row < num_tokens * KV_HEADS", "row_mask = row < num_tokens * KV_HEADS - 1"),
        ("inside = half < HALF", "inside = half < HALF - 1"),
        ("low * c - high * s", "low * c + high * s"),
        ("high * c + low * s", "high * c - low * s"),
        ("/ (2 * HALF) + epsilon", "/ HALF + epsilon"),
        ("weight + HALF + half", "weight + half"),
        ("tl.load(positions + token, row_mask, 0)", "tl.load(positions + row // HEADS, row_mask, 0)"),
        ("slot // BLOCK_SIZE", "slot // HALF"),
        ("(HEADS + head)", "(HEADS + KV_HEADS + head)"),
        ("target += kind_stride", "target += slot_stride * 0"),
        ("scale += scale_kind_stride", "scale += 0"),
        ("tl.max(tl.abs(high), 1)", "0.0"),
        (" / LIMIT", " / (LIMIT + 1)"),
        ("+ 0x7FFFF + ((bits >> 20) & 1)", "+ 0x7FFFF"),
        ("size < 0.015625, subnormal", "size < 0.0078125, subnormal"),
        ("tl.where(x < 0, 128, 0)", "tl.where(x < 0, 0, 0)"),
        ("(x / scale + 12582912.0) - 12582912.0", "x / scale"),
    ],
)
def test_a_broken_kernel_is_noticed(old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_rope_rotates_queries_and_writes_only_its_own_slots(10, 20, 4, True)
        test_a_quantised_cache_holds_what_the_reference_rounds_to(torch.int8, 20)
        test_every_float8_and_every_boundary_between_two_is_rounded_as_torch_does()

    assert_caught(launch, old, new, check, tmp_path, monkeypatch)
