"""The native sampler draws the tokens that the numpy reference draws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.kernels.native.library import NativeContext
from engine.kernels.sampling import native, reference
from tests.sampling_rows import ROW, VARIANTS, assert_min_p_holds, min_p_rows, seen


def test_philox_gives_the_published_vectors() -> None:
    """Known answers of Random123 (kat_vectors): philox4x32-10, counter 0 and key 0, counter and key all ones."""
    assert reference.philox(0, 0, 0) == 0xE169C58D_6627E8D5
    ones = reference.philox_block((2**64 - 1), (0xFFFFFFFF,) * 4)
    assert ones == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


@pytest.mark.parametrize("vocab", [32, 49, 1000, 4097], ids=lambda n: f"V{n}")
@pytest.mark.parametrize("name", VARIANTS)
def test_tokens_equal_the_references(context: NativeContext, name: str, vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    rows = [
        replace(VARIANTS[name], logits_row=i % 3, seed=seed, choice=i % 2, position=i, num_logprobs=5)
        for i, seed in enumerate((0, 1, 2**63, 2**64 - 1, *range(100, 160)))
    ]
    drawn, plain = native.sample(context, logits, rows), reference.sample(logits.numpy(), rows)
    assert drawn.tokens.tolist() == plain.tokens.tolist()
    assert drawn.top_ids.tolist() == plain.top_ids.tolist()
    np.testing.assert_allclose(drawn.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drawn.top_logprobs, plain.top_logprobs, rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_lowest_id_of_equals(context: NativeContext) -> None:
    logits = torch.zeros(1, 100)
    logits[0, [37, 38, 99]] = 1.0
    assert native.sample(context, logits, [VARIANTS["greedy"]]).tokens.tolist() == [37]


def test_top_k_of_equals_keeps_k(context: NativeContext) -> None:
    rows = [replace(ROW, top_k=3, seed=seed) for seed in range(300)]
    assert set(native.sample(context, torch.zeros(1, 500), rows).tokens.tolist()) == {0, 1, 2}


def test_no_draw_falls_below_min_p(context: NativeContext) -> None:
    logits = torch.randn(3, 301, generator=torch.Generator().manual_seed(4)) * 2
    rows = min_p_rows(logits.numpy(), 60)
    assert_min_p_holds(logits.numpy(), rows, native.sample(context, logits, rows).tokens)


def test_a_row_without_any_number_still_answers_with_a_token(context: NativeContext) -> None:
    logits = torch.full((2, 40), float("nan"))
    logits[1] = float("-inf")
    rows = [
        replace(ROW, logits_row=row, num_logprobs=2, **cuts)
        for row in range(2)
        for cuts in ({}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_p": 0.1, "top_k": 5})
    ]
    tokens = native.sample(context, logits, rows).tokens
    assert ((tokens >= 0) & (tokens < 40)).all()


def test_banned_tokens_are_never_drawn(context: NativeContext) -> None:
    logits = torch.zeros(1, 20)
    logits[0, 4] = 30.0
    rows = [replace(ROW, banned=(4, 5), seed=seed, temperature=t) for seed in range(200) for t in (0.0, 1.0)]
    assert not {4, 5} & set(native.sample(context, logits, rows).tokens.tolist())


def test_draws_follow_the_distribution(context: NativeContext) -> None:
    """Chi-square over 20,000 draws; 40 is beyond the 0.9999 quantile for 9 degrees of freedom."""
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    rows = [replace(ROW, seed=7, position=position) for position in range(20_000)]
    counts = np.bincount(native.sample(context, logits, rows).tokens, minlength=10)
    expected = logits[0].double().softmax(0).numpy() * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 40


def test_a_draw_does_not_depend_on_its_neighbours(context: NativeContext) -> None:
    logits = torch.randn(4, 777)
    rows = [replace(row, logits_row=i % 4, seed=i) for i, row in enumerate(VARIANTS.values()) if row.seen is None]
    together = native.sample(context, logits, rows).tokens.tolist()
    alone = [int(native.sample(context, logits, [row]).tokens[0]) for row in rows]
    assert together == alone


def test_a_history_outside_the_vocabulary_is_refused(context: NativeContext) -> None:
    with pytest.raises(ValueError, match="outside"):
        native.sample(context, torch.zeros(1, 8), [replace(ROW, presence=1.0, seen=seen(8, num_prompt=1))])
