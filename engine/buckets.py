"""Which captured graph holds a step of decodes? Pure.

A graph has fixed shapes, so a step runs in the smallest one that holds it, the rest of its rows being padding; a step
that none holds runs without a graph. Shapes are few, since each is captured at the start and has inputs of its own:
batch sizes grow by halves, so that at most a third of the rows is padding, and are multiples of eight from eight on, as
tensor cores take rows. Widths, in tokens of the longest sequence, grow eightfold: a width costs a copy of its block
tables, and bounds the splits of attention, whose real number follows from the lengths on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_WIDTH = 4096
WIDTH_GROWTH = 8


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """The largest step of decodes, and the longest sequence, that a runner will see."""

    max_num_seqs: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Shapes of one graph: sequences, and tokens of the longest one."""

    num_seqs: int
    max_seq_len: int


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ...; the last is `max_num_seqs` itself."""
    sizes: list[int] = []
    size = 1
    while size < max_num_seqs:
        sizes.append(size)
        is_power = size & (size - 1) == 0
        if size < 16:
            size *= 2
        else:
            size = size * 3 // 2 if is_power else size * 4 // 3
    return (*sizes, max_num_seqs)


def widths(max_model_len: int) -> tuple[int, ...]:
    """Lengths up to which a graph serves; the last is `max_model_len`."""
    found: list[int] = []
    width = FIRST_WIDTH
    while width < max_model_len:
        found.append(width)
        width *= WIDTH_GROWTH
    return (*found, max_model_len)


def buckets(max_num_seqs: int, max_model_len: int) -> tuple[Bucket, ...]:
    """All shapes, smallest first: narrow ones before wide ones of the same batch size."""
    return tuple(Bucket(size, width) for size in batch_sizes(max_num_seqs) for width in widths(max_model_len))


def smallest(shapes: tuple[Bucket, ...], num_seqs: int, seq_len: int) -> Bucket | None:
    """The first of `shapes` that holds `num_seqs` decodes of at most `seq_len` tokens."""
    return next((each for each in shapes if num_seqs <= each.num_seqs and seq_len <= each.max_seq_len), None)
