"""Which graph holds a step of decodes."""

from __future__ import annotations

import pytest

from engine.buckets import Bucket, batch_sizes, buckets, smallest, widths


def test_batch_sizes_grow_by_halves_and_end_with_the_largest_step() -> None:
    assert batch_sizes(256) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    assert batch_sizes(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert [batch_sizes(most) for most in (1, 2, 3)] == [(1,), (1, 2), (1, 2, 3)]


@pytest.mark.parametrize("most", [8, 37, 256, 1000])
def test_at_most_half_as_many_rows_again_are_padding(most: int) -> None:
    sizes = batch_sizes(most)
    for num_seqs in range(9, most + 1):
        size = next(each for each in sizes if each >= num_seqs)
        assert size <= max(16, 1.5 * num_seqs)
        assert size % 8 == 0 or size == most


def test_widths_end_with_the_models_length() -> None:
    assert widths(96) == (96,)
    assert widths(4096) == (4096,)
    assert widths(131072) == (4096, 32768, 131072)


def test_the_smallest_graph_that_holds_a_step_is_taken_and_none_that_does_not() -> None:
    shapes = buckets(6, 8192)
    assert smallest(shapes, 3, 100) == Bucket(4, 4096)
    assert smallest(shapes, 4, 4097) == Bucket(4, 8192)
    assert smallest(shapes, 5, 4096) == Bucket(6, 4096)
    assert smallest(shapes, 7, 1) is None
    assert smallest(shapes, 1, 8193) is None
