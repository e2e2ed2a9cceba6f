"""Device code of paged attention: one kernel for prompt chunks, decodes and trees, and one that joins split results.

A program takes a tile of BLOCK_M rows (some query tokens times the query heads that share one KV head) over a range of
keys, BLOCK_N at a time. All key tiles and splits lie at absolute positions and a tile that a row does not see changes
nothing of it, so the bits of a row do not depend on the rows beside it.

Where the compiler would be free to fuse a product into a sum in two ways, `tl.fma` says which.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# A maximum to start from: below all scores, but finite, so that no difference of maxima is inf - inf.
NO_MAXIMUM: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _find_sequence(cu_seqlens_q, index, num_seqs, TOKENS: tl.constexpr):
    """The sequence that tile `index` belongs to, when sequence i has its tiles of TOKENS from cu // TOKENS + i on.

    TOKENS 0: the sequence that row `index` belongs to.
    """
    low = 0
    high = num_seqs
    while low < high:
        middle = (low + high) // 2
        start = tl.load(cu_seqlens_q + middle)
        if TOKENS > 0:
            start = start // TOKENS + middle
        if start <= index:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _split_size(seq_lens, num_seqs, num_items, max_splits, num_programs, FIXED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys per split and the number of splits of the longest sequence.

    FIXED 0: as many keys as give each program about two splits, whatever the sequences' lengths, but at least four
    tiles and not so few that a sequence needs more than `max_splits`.
    """
    longest = 0
    keys = tl.cast(0, tl.int64)
    for first in range(0, num_seqs, 128):
        sequences = first + tl.arange(0, 128)
        lengths = tl.load(seq_lens + sequences, mask=sequences < num_seqs, other=0)
        longest = tl.maximum(longest, tl.max(lengths, 0))
        keys += tl.sum(lengths, 0)
    if FIXED > 0:
        size = FIXED
    else:
        # `num_items` tiles share `num_seqs` sequences.
        balanced = tl.cdiv(keys * num_items, 2 * num_programs.to(tl.int64) * num_seqs).to(tl.int32)
        size = tl.maximum(tl.maximum(balanced, tl.cdiv(longest, max_splits)), 4 * BLOCK_N)
        size = tl.cdiv(size, BLOCK_N) * BLOCK_N
    return size, tl.cdiv(longest, size)


@triton.jit
def _merge(maximum, total, acc, other_maximum, other_total, other_acc):
    """Join two softmax sums over different keys; an empty one changes nothing."""
    new_maximum = tl.maximum(maximum, other_maximum)
    shrink = tl.exp2(maximum - new_maximum)
    other_shrink = tl.exp2(other_maximum - new_maximum)
    total = tl.fma(total, shrink, other_total * other_shrink)
    acc = tl.fma(acc, shrink[:, None], other_acc * other_shrink[:, None])
    return new_maximum, total, acc


@triton.jit
def _attend(
    q, maximum, total, acc, begin, end, row_positions, row_tokens, context, seq_len,
    kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr, UNIFIED: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax sums of the rows over keys [begin, end), begin a multiple of BLOCK_N.

    MASKED: some row does not see some of these keys. UNIFIED: `maximum` is given and stays.
    """
    precision: tl.constexpr = "ieee" if tl.float32 == DOT else "tf32"
    factor = LOG2_E if SOFT_CAP > 0.0 else scale * LOG2_E
    dims = tl.arange(0, BLOCK_D)
    # The masked tiles of a causal tile are its last few: not worth the registers of a pipeline.
    for start in tl.range(begin, end, BLOCK_N, num_stages=1 if MASKED and WINDOW == 0 else None):
        positions = start + tl.arange(0, BLOCK_N)
        known = positions < seq_len
        # Whole blocks of positions have one mask: what it guards can be read by wide loads, scales above all.
        exists = known if scales is None else positions // BLOCK_SIZE * BLOCK_SIZE < seq_len
        if MASKED:
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=exists, other=0)
        else:
            blocks = tl.load(table + positions // BLOCK_SIZE)
        slots = positions % BLOCK_SIZE
        pointers = kv + (blocks.to(tl.int64) * stride_block + slots * stride_slot)[:, None] + dims[None, :]
        if MASKED or HEAD_DIM != BLOCK_D:
            real = known[:, None] & (dims[None, :] < HEAD_DIM)
            keys = tl.load(pointers, mask=real, other=0.0)
            values = tl.load(pointers + stride_kv, mask=real, other=0.0)
        else:
            keys = tl.load(pointers)
            values = tl.load(pointers + stride_kv)
        scores = tl.dot(q, tl.trans(keys.to(DOT)), input_precision=precision)
        if scales is not None:
            scale_pointers = scales + blocks.to(tl.int64) * stride_scale_block + slots
            if MASKED:
                key_scales = tl.where(known, tl.load(scale_pointers, mask=exists, other=0.0), 0.0)
                value_scales = tl.where(known, tl.load(scale_pointers + stride_scale_kv, mask=exists, other=0.0), 0.0)
            else:
                key_scales = tl.load(scale_pointers)
                value_scales = tl.load(scale_pointers + stride_scale_kv)
            scores = scores * key_scales[None, :]
        if SOFT_CAP > 0.0:
            # cap * tanh(x / cap)
            scores = SOFT_CAP - 2.0 * SOFT_CAP / (1.0 + tl.exp2(scores * (scale * (2.0 * LOG2_E / SOFT_CAP))))
        if MASKED:
            seen = positions[None, :] <= row_positions[:, None]
            if WINDOW > 0:
                seen = seen & (positions[None, :] > row_positions[:, None] - WINDOW)
            if tree_ends is not None:
                ends = tl.load(tree_ends + (positions - context), mask=known & (positions >= context), other=2147483647)
                seen = seen & (row_tokens[:, None] < ends[None, :])
            scores = tl.where(seen, scores, float("-inf"))
        if UNIFIED:
            weights = tl.exp2(tl.fma(scores, factor, -maximum[:, None]))
            total += tl.sum(weights, 1)
        else:
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
            weights = tl.exp2(tl.fma(scores, factor, -new_maximum[:, None]))
            shrink = tl.exp2(maximum - new_maximum)
            total = tl.fma(total, shrink, tl.sum(weights, 1))
            acc = acc * shrink[:, None]
            maximum = new_maximum
        if scales is not None:
            weights = weights * value_scales[None, :]
        acc = tl.dot(weights.to(DOT), values.to(DOT), acc, input_precision=precision)
    return maximum, total, acc


@triton.jit
def _attend_keys(
    q, begin, end, all_see, row_positions, row_tokens, context, seq_len,
    kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends, scale,
    first_maximum,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DOT: tl.constexpr, UNIFIED: tl.constexpr,
):  # fmt: skip
    """Softmax sums of the rows over keys [begin, end), of which all rows see those before `all_see`."""
    middle = tl.maximum(begin, tl.minimum(end, all_see) // BLOCK_N * BLOCK_N)
    maximum = tl.full([BLOCK_M], 0.0, tl.float32) + first_maximum
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    maximum, total, acc = _attend(
        q, maximum, total, acc, begin, middle, row_positions, row_tokens, context, seq_len,
        kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends, scale,
        HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, DOT, False, UNIFIED,
    )  # fmt: skip
    maximum, total, acc = _attend(
        q, maximum, total, acc, middle, end, row_positions, row_tokens, context, seq_len,
        kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends, scale,
        HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, WINDOW, SOFT_CAP, DOT, True, UNIFIED,
    )  # fmt: skip
    return maximum, total, acc


@triton.jit
def _attend_split(
    q, begin, end, all_see, row_positions, row_tokens, real_rows, context, seq_len,
    kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends, scale,
    unified_maximum, fallbacks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DOT: tl.constexpr, UNIFIED: tl.constexpr,
):  # fmt: skip
    """`_attend_keys`, or with UNIFIED first an attempt to do without running maxima (FlashDecoding++).

    All weights are then taken relative to one number, and nothing is rescaled from tile to tile. It fails, and is
    counted and done over, where a row's sum shows that its weights may have left the range in which they are exact.
    """
    if UNIFIED:
        # float16 weights end at 2^16 and lose digits below 2^-14; bfloat16 and float32 reach much further.
        least: tl.constexpr = 1.0 if tl.float16 == DOT else 2.0**-60
        most: tl.constexpr = 2.0**15 if tl.float16 == DOT else 2.0**60
        maximum, total, acc = _attend_keys(
            q, begin, end, all_see, row_positions, row_tokens, context, seq_len,
            kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends,
            scale, unified_maximum,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, DOT, True,
        )  # fmt: skip
        sees = real_rows & (row_positions >= begin)
        if WINDOW > 0:
            sees = sees & (row_positions - WINDOW + 1 < end)
        failed = sees & ((total < least) | (total > most) | (total != total))
        if tl.max(failed.to(tl.int32), 0) > 0:
            tl.atomic_add(fallbacks, 1)
            maximum, total, acc = _attend_keys(
                q, begin, end, all_see, row_positions, row_tokens, context, seq_len,
                kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends,
                scale, NO_MAXIMUM,
                HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, DOT, False,
            )  # fmt: skip
    else:
        maximum, total, acc = _attend_keys(
            q, begin, end, all_see, row_positions, row_tokens, context, seq_len,
            kv, stride_block, stride_kv, stride_slot, scales, stride_scale_block, stride_scale_kv, table, tree_ends,
            scale, NO_MAXIMUM,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, DOT, False,
        )  # fmt: skip
    return maximum, total, acc


@triton.jit
def attention_kernel(
    q, kv, scales, out, partials, stats, split_sizes, fallbacks, cu_seqlens_q, seq_lens, block_tables, tree_ends,
    num_seqs, tile_bound, max_splits, num_tokens, scale, unified_maximum,
    stride_q, stride_q_head, stride_out, stride_out_head, stride_block, stride_head, stride_kv, stride_slot,
    stride_scale_block, stride_scale_head, stride_scale_kv, stride_table,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, DOT: tl.constexpr, ONE_TOKEN: tl.constexpr,
    PARALLEL_SPLITS: tl.constexpr, UNIFIED: tl.constexpr,
):  # fmt: skip
    """Attention of a packed batch; persistent: any number of programs does all the work that `cu_seqlens_q` names.

    q, out [T, KV_HEADS * GROUP, HEAD_DIM]; kv [blocks, KV_HEADS, 2, BLOCK_SIZE, HEAD_DIM] of one layer; scales [blocks,
    KV_HEADS, 2, BLOCK_SIZE]. SPLIT_SIZE > 0: keys are taken in splits of that size, each from empty sums, joined in
    order; 0: in splits that balance the programs if PARALLEL_SPLITS, else in one. PARALLEL_SPLITS: an item of work is
    one split; it writes partials [split, T, heads, BLOCK_D] and stats [split, T, heads, 2] for `combine_kernel`;
    otherwise one program goes through all splits of a tile and writes out. ONE_TOKEN: each sequence has one query row.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    HEADS: tl.constexpr = KV_HEADS * GROUP
    num_tiles = num_seqs if ONE_TOKEN else tl.load(cu_seqlens_q + num_seqs) // TOKENS + num_seqs
    num_items = num_tiles * KV_HEADS
    split_size = SPLIT_SIZE
    if PARALLEL_SPLITS:
        split_size, num_splits = _split_size(
            seq_lens, num_seqs, tile_bound * KV_HEADS, max_splits, tl.num_programs(0), SPLIT_SIZE, BLOCK_N
        )
        num_items *= num_splits
        if tl.program_id(0) == 0:
            tl.store(split_sizes, split_size)
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        # The last tile of a prompt sees the most keys: longest work first evens out the programs' ends.
        index = num_items - 1 - item
        split = 0
        if PARALLEL_SPLITS:
            split = index % num_splits
            index = index // num_splits
        kv_head = index % KV_HEADS
        tile = index // KV_HEADS
        sequence = tile if ONE_TOKEN else _find_sequence(cu_seqlens_q, tile, num_seqs, TOKENS)
        q_begin = tl.load(cu_seqlens_q + sequence)
        q_len = tl.load(cu_seqlens_q + sequence + 1) - q_begin
        first_token = 0 if ONE_TOKEN else (tile - q_begin // TOKENS - sequence) * TOKENS
        seq_len = tl.load(seq_lens + sequence)
        context = seq_len - q_len
        # `num_tiles` is a bound: a sequence may have one tile less than its share of numbers.
        if first_token < q_len:
            row_tokens = first_token + rows // GROUP
            real_rows = (row_tokens < q_len) & (rows < TOKENS * GROUP)
            row_positions = context + row_tokens
            heads = kv_head * GROUP + rows % GROUP
            tokens = (q_begin + row_tokens).to(tl.int64)
            real = real_rows[:, None] & (dims[None, :] < HEAD_DIM)
            end = tl.minimum(seq_len, context + first_token + TOKENS)
            begin = 0
            if WINDOW > 0:
                begin = tl.maximum(0, context + first_token - WINDOW + 1) // BLOCK_N * BLOCK_N
            # Keys before this one are seen by all rows of the tile: no mask. (A window's lower edge needs one.)
            all_see = 0
            if WINDOW == 0:
                all_see = context if tree_ends is not None else tl.minimum(end, context + first_token + 1)
            if PARALLEL_SPLITS:
                begin = tl.maximum(begin, split * split_size)
                end = tl.minimum(end, (split + 1) * split_size)
            table = block_tables + sequence.to(tl.int64) * stride_table
            kv_base = kv + kv_head.to(tl.int64) * stride_head
            scale_base = scales if scales is None else scales + kv_head.to(tl.int64) * stride_scale_head
            ends = tree_ends if tree_ends is None else tree_ends + q_begin

            query = tl.load(
                q + (tokens * stride_q + heads * stride_q_head)[:, None] + dims[None, :], mask=real, other=0.0
            )
            query = query.to(DOT)
            if PARALLEL_SPLITS:
                if begin < end:
                    maximum, total, acc = _attend_split(
                        query, begin, end, all_see, row_positions, row_tokens, real_rows, context, seq_len,
                        kv_base, stride_block, stride_kv, stride_slot, scale_base, stride_scale_block, stride_scale_kv,
                        table, ends, scale, unified_maximum, fallbacks,
                        HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, DOT, UNIFIED,
                    )  # fmt: skip
                    partial = (split.to(tl.int64) * num_tokens + tokens) * HEADS + heads
                    tl.store(partials + (partial * BLOCK_D)[:, None] + dims[None, :], acc, mask=real_rows[:, None])
                    tl.store(stats + partial * 2, maximum, mask=real_rows)
                    tl.store(stats + partial * 2 + 1, total, mask=real_rows)
            else:
                if SPLIT_SIZE > 0:
                    maximum = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
                    total = tl.zeros([BLOCK_M], tl.float32)
                    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                    for split_begin in range(begin // SPLIT_SIZE * SPLIT_SIZE, end, SPLIT_SIZE):
                        split_maximum, split_total, split_acc = _attend_split(
                            query, tl.maximum(begin, split_begin), tl.minimum(end, split_begin + SPLIT_SIZE), all_see,
                            row_positions, row_tokens, real_rows, context, seq_len,
                            kv_base, stride_block, stride_kv, stride_slot, scale_base, stride_scale_block,
                            stride_scale_kv, table, ends, scale, unified_maximum, fallbacks,
                            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, DOT, UNIFIED,
                        )  # fmt: skip
                        maximum, total, acc = _merge(maximum, total, acc, split_maximum, split_total, split_acc)
                else:
                    maximum, total, acc = _attend_split(
                        query, begin, end, all_see, row_positions, row_tokens, real_rows, context, seq_len,
                        kv_base, stride_block, stride_kv, stride_slot, scale_base, stride_scale_block, stride_scale_kv,
                        table, ends, scale, unified_maximum, fallbacks,
                        HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_M, BLOCK_N, WINDOW, SOFT_CAP, DOT, UNIFIED,
                    )  # fmt: skip
                result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
                out_pointers = out + (tokens * stride_out + heads * stride_out_head)[:, None] + dims[None, :]
                tl.store(out_pointers, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def combine_kernel(
    partials, stats, split_sizes, out, cu_seqlens_q, seq_lens, num_seqs, num_tokens,
    stride_out, stride_out_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, SPLIT_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
):  # fmt: skip
    """Join the splits of one token and the heads of one KV head, in order; program (token, KV head)."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    program_token = tl.program_id(0)
    token = program_token.to(tl.int64)
    kv_head = tl.program_id(1)
    sequence = program_token if ONE_TOKEN else _find_sequence(cu_seqlens_q, program_token, num_seqs, 0)
    q_begin = tl.load(cu_seqlens_q + sequence)
    q_len = tl.load(cu_seqlens_q + sequence + 1) - q_begin
    seq_len = tl.load(seq_lens + sequence)
    # Keys that this token sees end here; a padding sequence has none.
    end = seq_len - q_len + program_token - q_begin + 1
    end = tl.where(seq_len > 0, end, 0)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, end - WINDOW)
    split_size = SPLIT_SIZE if SPLIT_SIZE > 0 else tl.load(split_sizes)
    rows = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    maximum = tl.full([BLOCK_H], NO_MAXIMUM, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for split in range(begin // split_size, tl.cdiv(end, split_size)):
        partial = (tl.cast(split, tl.int64) * num_tokens + token) * HEADS + heads
        split_maximum = tl.load(stats + partial * 2, mask=rows < GROUP, other=NO_MAXIMUM)
        split_total = tl.load(stats + partial * 2 + 1, mask=rows < GROUP, other=0.0)
        pointers = partials + (partial * BLOCK_D)[:, None] + dims[None, :]
        split_acc = tl.load(pointers, mask=rows[:, None] < GROUP, other=0.0)
        maximum, total, acc = _merge(maximum, total, acc, split_maximum, split_total, split_acc)
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_pointers = out + (token * stride_out + heads * stride_out_head)[:, None] + dims[None, :]
    # A padding row has no dimensions. (As a scalar in the mask, Triton 3.9 would interpret this as int32.)
    num_dims = tl.where(program_token - q_begin < q_len, HEAD_DIM, 0)
    real = (rows[:, None] < GROUP) & (dims[None, :] < num_dims)
    tl.store(out_pointers, result.to(out.dtype.element_ty), mask=real)
