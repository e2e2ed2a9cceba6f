"""What a batch says, as arrays: the tokens of a step and the rows to draw from. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine import request
from engine.batch import Chunk
from engine.kernels.native.program import StepArrays
from engine.kernels.sampling.rows import Draws, SampleRow
from engine.models.rope import RopeTable
from engine.request import SampledToken
from engine.token_counts import TokenCounts
from modelfiles.config import ModelConfig


def pack_step(chunks: Sequence[Chunk], rope: RopeTable, vocab_size: int, *, is_fed: bool = False) -> StepArrays:
    """Lay the chunks one after another, without padding. `is_fed`: their tokens are on the device, and zeros here."""
    tokens: list[int] = []
    tables = [np.asarray(chunk.sequence.block_table, np.int32) for chunk in chunks]
    starts, sampled = [0], []
    for chunk in chunks:
        end = chunk.start + chunk.num_tokens
        tokens += [0] * chunk.num_tokens if is_fed else chunk.sequence.token_ids[chunk.start : end]
        starts.append(len(tokens))
        if chunk.samplers:
            sampled.append(len(tokens) - 1)
    rope.ensure(max(chunk.start + chunk.num_tokens for chunk in chunks))
    token_ids = np.array(tokens, np.int32)
    assert len(token_ids) == sum(chunk.num_tokens for chunk in chunks)
    assert 0 <= token_ids.min() <= token_ids.max() < vocab_size
    return StepArrays(
        token_ids=token_ids,
        query_starts=np.array(starts, np.int32),
        positions=np.array([chunk.start for chunk in chunks], np.int32),
        table_offsets=np.cumsum([0, *map(len, tables[:-1])], dtype=np.int64),
        block_tables=np.concatenate(tables),
        sampled_rows=np.array(sampled, np.int32),
        rope_cos=rope.cos,
        rope_sin=rope.sin,
    )


def sample_rows(chunks: Sequence[Chunk], config: ModelConfig) -> list[tuple[request.Sequence, SampleRow]]:
    """Who draws, and how: one row per sampler, in order of chunks and samplers."""
    sampled = (chunk for chunk in chunks if chunk.samplers)
    return [
        (sampler, _sample_row(i, sampler, chunk, config))
        for i, chunk in enumerate(sampled)
        for sampler in chunk.samplers
    ]


def sampled_token(draws: Draws, i: int, sampler: request.Sequence) -> SampledToken:
    """Row `i` of the draws, with as many logprobs as its sampler wants."""
    wanted = sampler.sampling.num_logprobs
    if wanted < 0:
        return SampledToken(sampler.sequence_id, int(draws.tokens[i]))
    wanted = min(wanted, draws.top_ids.shape[1])
    top = tuple(zip(draws.top_ids[i, :wanted].tolist(), draws.top_logprobs[i, :wanted].tolist(), strict=True))
    return SampledToken(sampler.sequence_id, int(draws.tokens[i]), float(draws.logprobs[i]), top)


def _sample_row(logits_row: int, sampler: request.Sequence, chunk: Chunk, config: ModelConfig) -> SampleRow:
    params = sampler.sampling
    position = chunk.start + chunk.num_tokens
    banned: tuple[int, ...] = ()
    if position - sampler.num_prompt_tokens < params.min_tokens:
        stops = params.stop_token_ids + (() if params.ignore_eos else config.eos_token_ids)
        banned = tuple(each for each in stops if each < config.vocab_size)  # others are never drawn anyhow
    return SampleRow(
        logits_row=logits_row,
        seed=params.seed,
        choice=sampler.choice,
        position=position,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        num_logprobs=params.num_logprobs,
        seen=_seen(sampler, position) if params.has_penalties else None,
        banned=banned,
    )


def _seen(sampler: request.Sequence, position: int) -> TokenCounts:
    assert position == len(sampler.token_ids), "drawn for another position than the one behind all known tokens"
    return sampler.counts.advance(sampler.token_ids, sampler.num_prompt_tokens)
