"""One step as the Triton kernels read it: a packed batch in tensors of one device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """T tokens of S sequences, packed without padding; M of the tokens have their logits wanted.

    Sequence i owns rows [cu_seqlens_q[i], cu_seqlens_q[i + 1]), its last ones: after the step it knows `seq_lens[i]`
    tokens. A padding sequence (CUDA graphs) has `seq_lens` 0 and rows whose slots lie in the dummy block.

    token_ids [T] int32; positions [T] int32; slot_mapping [T] int64: block id * block_size + slot; cu_seqlens_q [S + 1]
    int32; seq_lens [S] int32; block_tables [S, max_blocks] int32, of which the first ceil(seq_lens / block_size) of a
    row mean something; sampled_rows [M] int32.
    `max_query_len` and `max_seq_len` are bounds known to the host: what a grid or a split count may be derived from.
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    sampled_rows: Tensor
    max_query_len: int
    max_seq_len: int
