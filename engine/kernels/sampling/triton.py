"""From rows of logits to tokens without a sort: device code.

A weight e^((logit - greatest) / temperature) is held in fixed point, 2^-44 to the unit, in int64. Integer sums do not
depend on their order, so tiles, chunks and neighbours cannot change a draw, and "the first token whose running sum
exceeds the target" is found by counting instead of by sorting: the order by (logit, lower id) is searched by bisection
over the bits of the logits, eight ways at a time. Top-k, the nucleus and the draw itself are that one search with
another target; each lies within the one before.

prepare   per tile: apply bans and penalties to a copy, greatest logit, raw log-sum-exp
weigh     per tile: sum of weights; histogram of weights over bins of a quarter of e-folding
bound     per row: the last bin that top-k or the nucleus can reach, and where each tile's candidates start
compact   per tile: copy the candidates, in order of id
draw      per row: top-k, nucleus and draw among the candidates (among all, where they outgrow their room)
top       per row: the most likely tokens of the raw distribution, from the tiles' maxima (LightSeq's hierarchy)
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.kernels.sampling.packed_rows import ROW

_NAMES = list(ROW.names or ())
NUM_FIELDS = tl.constexpr(len(_NAMES))
LOGITS_ROW = tl.constexpr(_NAMES.index("logits_row"))
SEED = tl.constexpr(_NAMES.index("seed"))
CHOICE = tl.constexpr(_NAMES.index("choice"))
POSITION = tl.constexpr(_NAMES.index("position"))
TOP_K = tl.constexpr(_NAMES.index("top_k"))
TOP_P = tl.constexpr(_NAMES.index("top_p"))
TAIL = tl.constexpr(_NAMES.index("tail"))
NUM_LOGPROBS = tl.constexpr(_NAMES.index("num_logprobs"))
SCALE = tl.constexpr(_NAMES.index("scale"))
MARGIN = tl.constexpr(_NAMES.index("margin"))
REPETITION = tl.constexpr(_NAMES.index("repetition"))
FREQUENCY = tl.constexpr(_NAMES.index("frequency"))
PRESENCE = tl.constexpr(_NAMES.index("presence"))
EDITED_ROW = tl.constexpr(_NAMES.index("edited_row"))
LISTS = tl.constexpr(_NAMES.index("lists"))
NUM_SEEN = tl.constexpr(_NAMES.index("num_seen"))
NUM_BANNED = tl.constexpr(_NAMES.index("num_banned"))

LOWEST = tl.constexpr(float("-inf"))
GREATEST = tl.constexpr(3.4028234663852886e38)
ONE = tl.constexpr(2.0**44)
"""A weight of one. 2^18 tokens of it sum to 2^62."""
BINS = tl.constexpr(128)
BINS_PER_E = tl.constexpr(4.0)
"""Weights of less than one unit lie beyond e^-30.5, so beyond bin 121."""
WAYS = tl.constexpr(8)
HIGHEST_KEY = tl.constexpr(0x7F7FFFFF)
NO_ID = tl.constexpr(0x7FFFFFFF)
NO_SCORE = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit
def _read(logits_at, ids, inside):
    """Float32 with NaN as minus infinity, plus infinity as the greatest number, and one zero."""
    x = tl.load(logits_at + ids, mask=inside, other=LOWEST).to(tl.float32)
    x = tl.where(x == x, tl.minimum(x, GREATEST), LOWEST)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _row(logits, ld, edited, fields_at, vocab):
    """A row's logits as (raw, copy with edits, whether that one counts, vocab)."""
    edited_row = tl.load(fields_at + EDITED_ROW)
    return logits + tl.load(fields_at + LOGITS_ROW) * ld, edited + edited_row * vocab, edited_row >= 0, vocab


@triton.jit
def _scale(fields_at, top):
    """How logits become weights: (greatest logit, least that min-p keeps, 1 / temperature)."""
    margin = tl.load(fields_at + MARGIN).to(tl.float64, bitcast=True).to(tl.float32)
    return top, top + margin, tl.load(fields_at + SCALE).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _weights(row, scale, ids):
    """(logits, exponents, weights) of ids of the row."""
    logits_at, copy_at, is_edited, vocab = row
    if is_edited:
        x = tl.load(copy_at + ids, mask=ids < vocab, other=LOWEST)
    else:
        x = _read(logits_at, ids, ids < vocab)
    top, lowest, factor = scale
    exponents = tl.where(x >= lowest, (x - top) * factor, LOWEST)
    return x, exponents, (tl.exp(exponents) * ONE).to(tl.int64)


@triton.jit
def _greatest(best_at, num_tiles, TILES: tl.constexpr):
    """The row's greatest logit; 0 where every token is banned."""
    tiles = tl.arange(0, TILES)
    top = tl.max(tl.load(best_at + tiles, mask=tiles < num_tiles, other=LOWEST), 0)
    return tl.where(top > LOWEST, top, 0.0)


@triton.jit
def _bins(exponents, weights):
    return (tl.where(weights > 0, exponents, 0.0) * -BINS_PER_E).to(tl.int32)


@triton.jit
def _draws_by_weight(fields_at):
    scale = tl.load(fields_at + SCALE).to(tl.float64, bitcast=True)
    return (tl.load(fields_at + LOGITS_ROW) >= 0) & (scale > 0)


@triton.jit
def _selects(fields_at):
    return (tl.load(fields_at + TOP_K) > 0) | (tl.load(fields_at + TOP_P) != 0)


@triton.jit
def _uniform(fields_at):
    """reference.uniform in units of 2^-64."""
    position = tl.load(fields_at + POSITION).to(tl.uint32)
    choice = tl.load(fields_at + CHOICE).to(tl.uint32)
    zero = position ^ position
    low, high, _, _ = tl.philox(tl.load(fields_at + SEED), position, choice, zero, zero)
    return ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11 << 11


@triton.jit
def _gumbel_scores(fields_at, exponents, ids):
    """Exponent plus Gumbel noise -ln(-ln(1 - u)), packed above the complement of the id: the greatest wins, the lower
    id among equals. u keeps its digits where it is small, which is where it decides.
    """
    position = tl.load(fields_at + POSITION).to(tl.uint32)
    choice = tl.load(fields_at + CHOICE).to(tl.uint32)
    each = ids.to(tl.uint32)
    zero = each ^ each
    bits, _, _, _ = tl.philox(tl.load(fields_at + SEED), zero + position, zero + choice, each, zero + 1)
    u = (bits.to(tl.float32) + 0.5) * 2.0**-32
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    wait = tl.where(u < 0.01, series, -tl.log(tl.maximum(1 - u, 2.0**-25)))
    bits = (exponents - tl.log(wait)).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (keys.to(tl.int64) << 32) | (ids.to(tl.int64) ^ NO_ID)


@triton.jit
def _id_of(score):
    return ((score & 0xFFFFFFFF) ^ NO_ID).to(tl.int32)


@triton.jit
def prepare(
    logits, ld, fields, lists, edited, best, best_id, raw_best, raw_id, raw_sum, vocab, num_tiles,
    TILE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields_at = fields + slot * NUM_FIELDS
    if tl.load(fields_at + LOGITS_ROW) < 0:
        return
    at = slot * num_tiles + tile
    ids = tile * TILE + tl.arange(0, TILE)
    logits_at, copy_at, is_edited, _ = _row(logits, ld, edited, fields_at, vocab)
    x = _read(logits_at, ids, ids < vocab)
    top, where = tl.max(x, 0, return_indices=True)
    tl.store(raw_best + at, top)
    tl.store(raw_id + at, tile * TILE + where)
    tl.store(raw_sum + at, tl.sum(tl.exp(x - tl.where(top > LOWEST, top, 0.0)), 0))
    if is_edited:
        tl.store(copy_at + ids, x, mask=ids < vocab)
        tl.debug_barrier()
        _penalise(logits_at, fields_at, lists, copy_at, tile * TILE, vocab, TILE, LIST)
        tl.debug_barrier()
        _ban(fields_at, lists, copy_at, tile * TILE, vocab, TILE, LIST)
        tl.debug_barrier()
        x = tl.load(copy_at + ids, mask=ids < vocab, other=LOWEST)
        top, where = tl.max(x, 0, return_indices=True)
    tl.store(best + at, top)
    tl.store(best_id + at, tile * TILE + where)


@triton.jit
def _penalise(logits_at, fields_at, lists, copy_at, start, vocab, TILE: tl.constexpr, LIST: tl.constexpr):
    """The tile's share of the ids seen. In float64 as the reference; they are few."""
    repetition = tl.load(fields_at + REPETITION).to(tl.float64, bitcast=True)
    frequency = tl.load(fields_at + FREQUENCY).to(tl.float64, bitcast=True)
    presence = tl.load(fields_at + PRESENCE).to(tl.float64, bitcast=True)
    num_seen = tl.load(fields_at + NUM_SEEN).to(tl.int32)
    seen = lists + tl.load(fields_at + LISTS)
    for first in range(0, num_seen, LIST):
        entries = first + tl.arange(0, LIST)
        ids = tl.load(seen + entries, mask=entries < num_seen, other=-1)
        mine = (ids >= start) & (ids < start + TILE) & (ids < vocab)
        counts = tl.load(seen + num_seen + entries, mask=mine, other=0).to(tl.float64)
        x = _read(logits_at, ids, mine).to(tl.float64)
        x = tl.where(x > 0, x / repetition, x * repetition).to(tl.float32).to(tl.float64)
        x = (x - frequency * counts - tl.where(counts > 0, presence, 0.0)).to(tl.float32)
        tl.store(copy_at + ids, tl.where(x == 0.0, 0.0, x), mask=mine)


@triton.jit
def _ban(fields_at, lists, copy_at, start, vocab, TILE: tl.constexpr, LIST: tl.constexpr):
    num_banned = tl.load(fields_at + NUM_BANNED).to(tl.int32)
    banned = lists + tl.load(fields_at + LISTS) + 2 * tl.load(fields_at + NUM_SEEN)
    for first in range(0, num_banned, LIST):
        entries = first + tl.arange(0, LIST)
        ids = tl.load(banned + entries, mask=entries < num_banned, other=-1)
        mine = (ids >= start) & (ids < start + TILE) & (ids < vocab)
        tl.store(copy_at + ids, tl.full([LIST], LOWEST, tl.float32), mask=mine)


@triton.jit
def weigh(
    logits, ld, fields, edited, best, mass, counts, vocab, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, GUMBEL: tl.constexpr,
):  # fmt: skip
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields_at = fields + slot * NUM_FIELDS
    if not _draws_by_weight(fields_at):
        return
    at = slot * num_tiles + tile
    ids = tile * TILE + tl.arange(0, TILE)
    scale = _scale(fields_at, _greatest(best + slot * num_tiles, num_tiles, TILES))
    _, exponents, weights = _weights(_row(logits, ld, edited, fields_at, vocab), scale, ids)
    tl.store(mass + at, tl.sum(weights, 0))
    if _selects(fields_at):
        histogram = tl.histogram(_bins(exponents, weights), BINS, mask=weights > 0)
        tl.store(counts + at * BINS + tl.arange(0, BINS), histogram)
    elif GUMBEL:
        tl.store(mass + at, tl.max(_gumbel_scores(fields_at, exponents, ids), 0))


@triton.jit
def bound(fields, mass, counts, starts, found, num_tiles, TILES: tl.constexpr, GROUP: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    fields_at = fields + slot * NUM_FIELDS
    if not (_draws_by_weight(fields_at) & _selects(fields_at)):
        return
    tiles, bins, group = tl.arange(0, TILES), tl.arange(0, BINS), tl.arange(0, GROUP)
    rows = counts + slot * num_tiles * BINS + group[:, None] * BINS + bins[None, :]
    histogram = tl.full([BINS], 0, tl.int32)
    for first in range(0, num_tiles, GROUP):
        inside = (first + group < num_tiles)[:, None]
        histogram += tl.sum(tl.load(rows + first * BINS, mask=inside, other=0), 0)
    num_alive = tl.sum(histogram, 0)
    last = BINS - 1
    top_k = tl.load(fields_at + TOP_K)
    if (top_k > 0) & (top_k < num_alive):
        # All k of them, although the nucleus is smaller: it is measured by what they weigh together.
        last = tl.sum((tl.cumsum(histogram, 0) < top_k).to(tl.int32), 0)
    elif tl.load(fields_at + TOP_P) != 0:
        # No token weighs more than its bin's upper edge: what lies beyond the last bin is surely less than the tail.
        total = tl.sum(tl.load(mass + slot * num_tiles + tiles, mask=tiles < num_tiles, other=0), 0)
        tail = tl.load(fields_at + TAIL).to(tl.float64, bitcast=True).to(tl.float32) * (total.to(tl.float32) / ONE)
        heaviest = histogram.to(tl.float32) * tl.exp(bins.to(tl.float32) * (-1 / BINS_PER_E))
        beyond = tl.cumsum(heaviest, 0, reverse=True) - heaviest
        last = tl.sum((beyond > tail).to(tl.int32), 0)
    num_found = 0
    for first in range(0, num_tiles, GROUP):
        inside = first + group < num_tiles
        chosen = tl.load(rows + first * BINS, mask=inside[:, None] & (bins <= last)[None, :], other=0)
        each = tl.sum(chosen, 1)
        tl.store(starts + slot * num_tiles + first + group, num_found + tl.cumsum(each, 0) - each, mask=inside)
        num_found += tl.sum(each, 0)
    tl.store(found + slot * 3, last)
    tl.store(found + slot * 3 + 1, num_found)
    tl.store(found + slot * 3 + 2, num_alive)


@triton.jit
def compact(
    logits, ld, fields, edited, best, starts, found, values, value_ids, vocab, num_tiles, capacity,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    fields_at = fields + slot * NUM_FIELDS
    if not (_draws_by_weight(fields_at) & _selects(fields_at)):
        return
    if tl.load(found + slot * 3 + 1) > capacity:
        return
    ids = tile * TILE + tl.arange(0, TILE)
    scale = _scale(fields_at, _greatest(best + slot * num_tiles, num_tiles, TILES))
    x, exponents, weights = _weights(_row(logits, ld, edited, fields_at, vocab), scale, ids)
    chosen = (weights > 0) & (_bins(exponents, weights) <= tl.load(found + slot * 3))
    at = tl.load(starts + slot * num_tiles + tile) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    chosen = chosen & (at < capacity)
    tl.store(values + slot * capacity + at, x, mask=chosen)
    tl.store(value_ids + slot * capacity + at, ids, mask=chosen)


@triton.jit
def draw(
    logits, ld, fields, edited, best, best_id, raw_best, raw_sum, mass, found, values, value_ids, tokens, logprobs,
    vocab, num_tiles, capacity,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, GUMBEL: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    fields_at = fields + slot * NUM_FIELDS
    if tl.load(fields_at + LOGITS_ROW) < 0:
        return
    tiles = tl.arange(0, TILES)
    at = slot * num_tiles + tiles
    top, tile = tl.max(tl.load(best + at, mask=tiles < num_tiles, other=LOWEST), 0, return_indices=True)
    token = tl.load(best_id + slot * num_tiles + tile)
    row = _row(logits, ld, edited, fields_at, vocab)
    if _draws_by_weight(fields_at) & (top > LOWEST):
        scale = _scale(fields_at, top)
        masses = tl.load(mass + at, mask=tiles < num_tiles, other=0)
        if _selects(fields_at):
            num_found, num_alive = tl.load(found + slot * 3 + 1), tl.load(found + slot * 3 + 2)
            compacted = num_found <= capacity
            num = tl.where(compacted, num_found, vocab)
            candidates = (values + slot * capacity, value_ids + slot * capacity, compacted, num)
            token = _draw_selected(fields_at, row, scale, candidates, tl.sum(masses, 0), num_alive, BLOCK, GUMBEL)
        elif GUMBEL:
            token = _id_of(tl.max(tl.where(tiles < num_tiles, masses, NO_SCORE), 0))
        else:
            token = _draw_by_id(fields_at, row, scale, masses, TILE, TILES)
    tl.store(tokens + slot, token)
    if tl.load(fields_at + NUM_LOGPROBS) >= 0:
        log_total = _log_sum_exp(raw_best + slot * num_tiles, raw_sum + slot * num_tiles, num_tiles, TILES)
        tl.store(logprobs + slot, _read(row[0], token, token < vocab) - log_total)


@triton.jit
def _draw_by_id(fields_at, row, scale, masses, TILE: tl.constexpr, TILES: tl.constexpr):
    """The first id whose running sum exceeds the target."""
    target = tl.umulhi(_uniform(fields_at), tl.sum(masses, 0).to(tl.uint64)).to(tl.int64)
    tile = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, TILES) < tile, masses, 0), 0)
    _, _, weights = _weights(row, scale, tile * TILE + tl.arange(0, TILE))
    return tile * TILE + tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)


@triton.jit
def _chunk(row, scale, candidates, first, BLOCK: tl.constexpr):
    """(keys, exponents, weights, ids) of candidates, or of all tokens where there is no room for candidates.

    Keys are integers in the order of the logits.
    """
    values_at, ids_at, compacted, num = candidates
    entries = first + tl.arange(0, BLOCK)
    if compacted:
        top, lowest, factor = scale
        x = tl.load(values_at + entries, mask=entries < num, other=LOWEST)
        ids = tl.load(ids_at + entries, mask=entries < num, other=0)
        exponents = tl.where(x >= lowest, (x - top) * factor, LOWEST)
        weights = (tl.exp(exponents) * ONE).to(tl.int64)
    else:
        ids = entries
        x, exponents, weights = _weights(row, scale, ids)
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF), exponents, weights, ids


@triton.jit
def _draw_selected(
    fields_at, row, scale, candidates, total, num_alive, BLOCK: tl.constexpr, GUMBEL: tl.constexpr
):  # fmt: skip
    """Top-k, nucleus and draw: three searches in the order (logit descending, id ascending), each within the last.

    A place in that order is a key, and how many of the tokens of that very key are inside.
    """
    num = candidates[3]
    top_k, top_p = tl.load(fields_at + TOP_K), tl.load(fields_at + TOP_P).to(tl.uint64)
    least = tl.full([BLOCK], HIGHEST_KEY, tl.int32)
    for first in range(0, num, BLOCK):
        keys, _, weights, _ = _chunk(row, scale, candidates, first, BLOCK)
        least = tl.minimum(least, tl.where(weights > 0, keys, HIGHEST_KEY))
    low = tl.min(least, 0).to(tl.int64)
    inside = num.to(tl.int64)
    for stage in range(2 if GUMBEL else 3):
        goal, wanted = top_k - 1, (top_k > 0) & (top_k < num_alive)
        if stage == 1:
            goal = tl.maximum(tl.umulhi(top_p, total.to(tl.uint64)).to(tl.int64), 1) - 1
            wanted = top_p != 0
        elif stage == 2:
            goal, wanted = tl.umulhi(_uniform(fields_at), total.to(tl.uint64)).to(tl.int64), total > 0
        if wanted:
            low, inside, total = _search(goal, low, stage > 0, row, scale, candidates, BLOCK)
    num_equal = tl.full([], 0, tl.int64)
    winner = tl.full([], NO_SCORE, tl.int64)
    for first in range(0, num, BLOCK):
        keys, exponents, weights, ids = _chunk(row, scale, candidates, first, BLOCK)
        equal = (keys == low) & (weights > 0)
        rank = num_equal + tl.cumsum(equal.to(tl.int64), 0)  # candidates lie in order of id
        num_equal = tl.max(rank, 0)
        if GUMBEL:
            kept = ((keys > low) & (weights > 0)) | (equal & (rank <= inside))
            scores = _gumbel_scores(fields_at, exponents, ids)
        else:
            kept = equal & (rank == inside)
            scores = ids.to(tl.int64) ^ NO_ID
        winner = tl.maximum(winner, tl.max(tl.where(kept, scores, NO_SCORE), 0))
    return _id_of(winner)


@triton.jit
def _search(goal, low, by_weight, row, scale, candidates, BLOCK: tl.constexpr):
    """The place of the first token at which the running sum, of weights or of ones, exceeds `goal`.

    Returns its key, how many tokens of that key are inside, and the weight of all up to it. The sum from `low` on
    exceeds the goal, the sum from `high` on does not.
    """
    num = candidates[3]
    bits = scale[0].to(tl.int32, bitcast=True)
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        bounds = tl.minimum(low + step * tl.arange(0, WAYS), high).to(tl.int32)
        sums = tl.full([BLOCK, WAYS], 0, tl.int64)
        for first in range(0, num, BLOCK):
            keys, _, weights, _ = _chunk(row, scale, candidates, first, BLOCK)
            each = tl.where(by_weight, weights, (weights > 0).to(tl.int64))
            sums += tl.where(keys[:, None] >= bounds[None, :], each[:, None], 0)
        passed = tl.maximum(tl.sum((tl.sum(sums, 0) > goal).to(tl.int32), 0), 1)
        high = tl.minimum(high, low + passed * step)
        low += (passed - 1) * step
    above, num_above = tl.full([BLOCK], 0, tl.int64), tl.full([BLOCK], 0, tl.int32)
    weight = tl.full([BLOCK], 0, tl.int64)
    for first in range(0, num, BLOCK):
        keys, _, weights, _ = _chunk(row, scale, candidates, first, BLOCK)
        above += tl.where(keys > low, weights, 0)
        num_above += ((keys > low) & (weights > 0)).to(tl.int32)
        weight = tl.maximum(weight, tl.where(keys == low, weights, 0))
    total, each = tl.sum(above, 0), tl.max(weight, 0)
    inside = tl.where(by_weight, (goal - total) // tl.maximum(each, 1), goal - tl.sum(num_above, 0)) + 1
    return low, inside, total + inside * each


@triton.jit
def _log_sum_exp(best_at, sum_at, num_tiles, TILES: tl.constexpr):
    """Of the raw row, from the sums of its tiles: a tree of fixed shape."""
    tiles = tl.arange(0, TILES)
    tops = tl.load(best_at + tiles, mask=tiles < num_tiles, other=LOWEST)
    sums = tl.load(sum_at + tiles, mask=tiles < num_tiles, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top > LOWEST, top, 0.0)
    return tl.log(tl.sum(sums * tl.exp(tops - top), 0)) + top


@triton.jit
def top(
    logits, ld, fields, raw_best, raw_id, raw_sum, top_ids, top_logprobs, max_top, vocab, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    fields_at = fields + slot * NUM_FIELDS
    if tl.load(fields_at + LOGITS_ROW) < 0:
        return
    logits_at = logits + tl.load(fields_at + LOGITS_ROW) * ld
    log_total = _log_sum_exp(raw_best + slot * num_tiles, raw_sum + slot * num_tiles, num_tiles, TILES)
    tiles = tl.arange(0, TILES)
    bests = tl.load(raw_best + slot * num_tiles + tiles, mask=tiles < num_tiles, other=LOWEST)
    best_ids = tl.load(raw_id + slot * num_tiles + tiles, mask=tiles < num_tiles, other=vocab)
    for i in range(0, tl.minimum(tl.load(fields_at + NUM_LOGPROBS), max_top).to(tl.int32)):
        best = tl.max(bests, 0)
        best_id = tl.min(tl.where(bests == best, best_ids, vocab), 0)
        tl.store(top_ids + slot * max_top + i, best_id)
        tl.store(top_logprobs + slot * max_top + i, best - log_total)
        # The tile that lost its best offers its next one.
        tile = best_id // TILE
        ids = tile * TILE + tl.arange(0, TILE)
        x = _read(logits_at, ids, ids < vocab)
        later = (ids < vocab) & ((x < best) | ((x == best) & (ids > best_id)))
        following = tl.max(tl.where(later, x, LOWEST), 0)
        following_id = tl.min(tl.where(later & (x == following), ids, vocab), 0)
        bests = tl.where(tiles == tile, following, bests)
        best_ids = tl.where(tiles == tile, following_id, best_ids)
