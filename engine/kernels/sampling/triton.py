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
def _field(fields, slot, FIELD: tl.constexpr):
    return tl.load(fields + slot * NUM_FIELDS + FIELD)


@triton.jit
def _real(fields, slot, FIELD: tl.constexpr):
    return _field(fields, slot, FIELD).to(tl.float64, bitcast=True)


@triton.jit
def _clean(x):
    """NaN as minus infinity, plus infinity as the greatest number, and one zero."""
    x = tl.where(x == x, tl.minimum(x, GREATEST), LOWEST)
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _raw(logits, ld, fields, slot, ids, inside):
    row = logits + _field(fields, slot, LOGITS_ROW) * ld
    return _clean(tl.load(row + ids, mask=inside, other=LOWEST).to(tl.float32))


@triton.jit
def _edited(logits, ld, edited, fields, slot, vocab, ids):
    """Logits with bans and penalties."""
    inside = ids < vocab
    edited_row = _field(fields, slot, EDITED_ROW)
    if edited_row >= 0:
        x = tl.load(edited + edited_row * vocab + ids, mask=inside, other=LOWEST)
    else:
        x = _raw(logits, ld, fields, slot, ids, inside)
    return x


@triton.jit
def _greatest(best, slot, num_tiles, TILES: tl.constexpr):
    """The row's greatest logit; 0 where every token is banned."""
    tiles = tl.arange(0, TILES)
    top = tl.max(tl.load(best + slot * num_tiles + tiles, mask=tiles < num_tiles, other=LOWEST), 0)
    return tl.where(top > LOWEST, top, 0.0)


@triton.jit
def _exponents(x, top, fields, slot):
    """What to raise e to, minus infinity for what min-p leaves out."""
    lowest = top + _real(fields, slot, MARGIN).to(tl.float32)
    return tl.where(x >= lowest, (x - top) * _real(fields, slot, SCALE).to(tl.float32), LOWEST)


@triton.jit
def _weights(exponents):
    return (tl.exp(exponents) * ONE).to(tl.int64)


@triton.jit
def _bins(exponents, weights):
    return (tl.where(weights > 0, exponents, 0.0) * -BINS_PER_E).to(tl.int32)


@triton.jit
def _keys(x):
    """Integers in the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _selects(fields, slot):
    return (_field(fields, slot, TOP_K) > 0) | (_field(fields, slot, TOP_P) != 0)


@triton.jit
def _draws_by_weight(fields, slot):
    return (_field(fields, slot, LOGITS_ROW) >= 0) & (_real(fields, slot, SCALE) > 0)


@triton.jit
def _share(fraction, total):
    """floor(fraction * total) for a fraction in units of 2^-64."""
    return tl.umulhi(fraction, total.to(tl.uint64)).to(tl.int64)


@triton.jit
def _uniform(fields, slot):
    """reference.uniform in units of 2^-64."""
    position = _field(fields, slot, POSITION).to(tl.uint32)
    choice = _field(fields, slot, CHOICE).to(tl.uint32)
    zero = position ^ position
    low, high, _, _ = tl.philox(_field(fields, slot, SEED), position, choice, zero, zero)
    return ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> 11 << 11


@triton.jit
def _gumbel_scores(exponents, ids, fields, slot):
    """Exponent plus Gumbel noise -ln(-ln(1 - u)), packed above the complement of the id: the greatest wins, the lower
    id among equals. u is small where it matters, so it keeps its digits; 1 - u near one goes through a series.
    """
    position = _field(fields, slot, POSITION).to(tl.uint32)
    choice = _field(fields, slot, CHOICE).to(tl.uint32)
    c2 = ids.to(tl.uint32)
    same = c2 ^ c2
    bits, _, _, _ = tl.philox(_field(fields, slot, SEED), same + position, same + choice, c2, same + 1)
    u = (bits.to(tl.float32) + 0.5) * 2.0**-32
    near = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    wait = tl.where(u < 0.01, near, -tl.log(tl.maximum(1 - u, 2.0**-25)))
    scores = _keys(exponents - tl.log(wait)).to(tl.int64)
    return (scores << 32) | (ids.to(tl.int64) ^ NO_ID)


@triton.jit
def prepare(
    logits, ld, fields, lists, edited, best, best_id, raw_best, raw_id, raw_sum, vocab, num_tiles,
    TILE: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _field(fields, slot, LOGITS_ROW) < 0:
        return
    at = slot * num_tiles + tile
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < vocab
    x = _raw(logits, ld, fields, slot, ids, inside)
    top, where = tl.max(x, 0, return_indices=True)
    tl.store(raw_best + at, top)
    tl.store(raw_id + at, tile * TILE + where)
    tl.store(raw_sum + at, tl.sum(tl.exp(x - tl.where(top > LOWEST, top, 0.0)), 0))
    edited_row = _field(fields, slot, EDITED_ROW)
    if edited_row >= 0:
        copy = edited + edited_row * vocab
        tl.store(copy + ids, x, mask=inside)
        tl.debug_barrier()
        _penalise(logits, ld, fields, slot, lists, copy, tile * TILE, vocab, TILE, LIST)
        tl.debug_barrier()
        _ban(fields, slot, lists, copy, tile * TILE, vocab, TILE, LIST)
        tl.debug_barrier()
        top, where = tl.max(tl.load(copy + ids, mask=inside, other=LOWEST), 0, return_indices=True)
    tl.store(best + at, top)
    tl.store(best_id + at, tile * TILE + where)


@triton.jit
def _penalise(logits, ld, fields, slot, lists, copy, start, vocab, TILE: tl.constexpr, LIST: tl.constexpr):
    """The tile's share of the ids seen. In float64 as the reference; they are few."""
    repetition, presence = _real(fields, slot, REPETITION), _real(fields, slot, PRESENCE)
    frequency = _real(fields, slot, FREQUENCY)
    num_seen = _field(fields, slot, NUM_SEEN).to(tl.int32)
    seen = lists + _field(fields, slot, LISTS)
    for first in range(0, num_seen, LIST):
        entries = first + tl.arange(0, LIST)
        ids = tl.load(seen + entries, mask=entries < num_seen, other=-1)
        mine = (ids >= start) & (ids < start + TILE) & (ids < vocab)
        counts = tl.load(seen + num_seen + entries, mask=mine, other=0).to(tl.float64)
        x = _raw(logits, ld, fields, slot, ids, mine).to(tl.float64)
        x = tl.where(x > 0, x / repetition, x * repetition).to(tl.float32).to(tl.float64)
        x = x - frequency * counts - tl.where(counts > 0, presence, 0.0)
        tl.store(copy + ids, _clean(x.to(tl.float32)), mask=mine)


@triton.jit
def _ban(fields, slot, lists, copy, start, vocab, TILE: tl.constexpr, LIST: tl.constexpr):
    num_banned = _field(fields, slot, NUM_BANNED).to(tl.int32)
    banned = lists + _field(fields, slot, LISTS) + 2 * _field(fields, slot, NUM_SEEN)
    for first in range(0, num_banned, LIST):
        entries = first + tl.arange(0, LIST)
        ids = tl.load(banned + entries, mask=entries < num_banned, other=-1)
        mine = (ids >= start) & (ids < start + TILE) & (ids < vocab)
        tl.store(copy + ids, tl.full([LIST], LOWEST, tl.float32), mask=mine)


@triton.jit
def weigh(
    logits, ld, fields, edited, best, mass, counts, vocab, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr, GUMBEL: tl.constexpr,
):  # fmt: skip
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not _draws_by_weight(fields, slot):
        return
    at = slot * num_tiles + tile
    ids = tile * TILE + tl.arange(0, TILE)
    x = _edited(logits, ld, edited, fields, slot, vocab, ids)
    exponents = _exponents(x, _greatest(best, slot, num_tiles, TILES), fields, slot)
    selects = _selects(fields, slot)
    weights = _weights(exponents)
    tl.store(mass + at, tl.sum(weights, 0))
    if selects:
        histogram = tl.histogram(_bins(exponents, weights), BINS, mask=weights > 0)
        tl.store(counts + at * BINS + tl.arange(0, BINS), histogram)
    elif GUMBEL:
        tl.store(mass + at, tl.max(_gumbel_scores(exponents, ids, fields, slot), 0))


@triton.jit
def bound(
    fields, mass, counts, starts, found, num_tiles,
    TILES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    if not (_draws_by_weight(fields, slot) & _selects(fields, slot)):
        return
    tiles, bins, group = tl.arange(0, TILES), tl.arange(0, BINS), tl.arange(0, GROUP)
    total = tl.sum(tl.load(mass + slot * num_tiles + tiles, mask=tiles < num_tiles, other=0), 0)
    rows = counts + slot * num_tiles * BINS + group[:, None] * BINS + bins[None, :]
    histogram = tl.zeros([BINS], tl.int32)
    for first in range(0, num_tiles, GROUP):
        inside = (first + group < num_tiles)[:, None]
        histogram += tl.sum(tl.load(rows + first * BINS, mask=inside, other=0), 0)
    # A bin's tokens weigh at most what its upper edge says: beyond the last bin there is surely less than top-p's tail.
    last = BINS - 1
    top_k = _field(fields, slot, TOP_K)
    if top_k > 0:
        last = tl.minimum(last, tl.sum((tl.cumsum(histogram, 0) < top_k).to(tl.int32), 0))
    if _field(fields, slot, TOP_P) != 0:
        heaviest = histogram.to(tl.float32) * tl.exp(bins.to(tl.float32) * (-1 / BINS_PER_E))
        beyond = tl.sum(heaviest, 0) - tl.cumsum(heaviest, 0)
        tail = _real(fields, slot, TAIL).to(tl.float32) * (total.to(tl.float32) / ONE)
        last = tl.minimum(last, tl.sum((beyond > tail).to(tl.int32), 0))
    num_found = 0
    for first in range(0, num_tiles, GROUP):
        inside = first + group < num_tiles
        chosen = tl.load(rows + first * BINS, mask=inside[:, None] & (bins <= last)[None, :], other=0)
        each = tl.sum(chosen, 1)
        tl.store(starts + slot * num_tiles + first + group, num_found + tl.cumsum(each, 0) - each, mask=inside)
        num_found += tl.sum(each, 0)
    tl.store(found + slot * 3, last)
    tl.store(found + slot * 3 + 1, num_found)
    tl.store(found + slot * 3 + 2, tl.sum(histogram, 0))


@triton.jit
def compact(
    logits, ld, fields, edited, best, starts, found, values, value_ids, vocab, num_tiles, capacity,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if not (_draws_by_weight(fields, slot) & _selects(fields, slot)):
        return
    if tl.load(found + slot * 3 + 1) > capacity:
        return
    ids = tile * TILE + tl.arange(0, TILE)
    x = _edited(logits, ld, edited, fields, slot, vocab, ids)
    exponents = _exponents(x, _greatest(best, slot, num_tiles, TILES), fields, slot)
    weights = _weights(exponents)
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
    if _field(fields, slot, LOGITS_ROW) < 0:
        return
    tiles = tl.arange(0, TILES)
    in_row = tiles < num_tiles
    at = slot * num_tiles + tiles
    bests = tl.load(best + at, mask=in_row, other=LOWEST)
    top, tile = tl.max(bests, 0, return_indices=True)
    token = tl.load(best_id + slot * num_tiles + tile)
    if _draws_by_weight(fields, slot) & (top > LOWEST):
        masses = tl.load(mass + at, mask=in_row, other=0)
        if _selects(fields, slot):
            token = _draw_selected(
                logits, ld, fields, slot, edited, top, tl.sum(masses, 0), found, values, value_ids, vocab, capacity,
                BLOCK, GUMBEL,
            )  # fmt: skip
        elif GUMBEL:
            token = _id_of(tl.max(tl.where(in_row, masses, NO_SCORE), 0))
        else:
            token = _draw_by_id(logits, ld, fields, slot, edited, top, masses, vocab, TILE, TILES)
    tl.store(tokens + slot, token)
    if _field(fields, slot, NUM_LOGPROBS) >= 0:
        raw = _raw(logits, ld, fields, slot, token, token >= 0)
        tl.store(logprobs + slot, raw - _log_sum_exp(raw_best, raw_sum, slot, num_tiles, TILES))


@triton.jit
def _id_of(packed):
    return ((packed & 0xFFFFFFFF) ^ NO_ID).to(tl.int32)


@triton.jit
def _draw_by_id(logits, ld, fields, slot, edited, top, masses, vocab, TILE: tl.constexpr, TILES: tl.constexpr):
    """The first id whose running sum exceeds the target."""
    target = _share(_uniform(fields, slot), tl.sum(masses, 0))
    tile = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, TILES) < tile, masses, 0), 0)
    ids = tile * TILE + tl.arange(0, TILE)
    x = _edited(logits, ld, edited, fields, slot, vocab, ids)
    sums = before + tl.cumsum(_weights(_exponents(x, top, fields, slot)), 0)
    return tile * TILE + tl.sum((sums <= target).to(tl.int32), 0)


@triton.jit
def _chunk(
    first, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(key, exponent, weight, id) of candidates, or of all tokens where there is no room for candidates."""
    entries = first + tl.arange(0, BLOCK)
    if compacted:
        x = tl.load(values + slot * capacity + entries, mask=entries < num, other=LOWEST)
        ids = tl.load(value_ids + slot * capacity + entries, mask=entries < num, other=0)
    else:
        x = _edited(logits, ld, edited, fields, slot, vocab, entries)
        ids = entries
    exponents = _exponents(x, top, fields, slot)
    return _keys(x), exponents, _weights(exponents), ids


@triton.jit
def _draw_selected(
    logits, ld, fields, slot, edited, top, total, found, values, value_ids, vocab, capacity,
    BLOCK: tl.constexpr, GUMBEL: tl.constexpr,
):  # fmt: skip
    """Top-k, nucleus and draw: three searches in the order (logit descending, id ascending), each within the last.

    A place in that order is a key, and how many of the tokens of that very key are inside.
    """
    num_found, num_alive = tl.load(found + slot * 3 + 1), tl.load(found + slot * 3 + 2)
    compacted = num_found <= capacity
    num = tl.where(compacted, num_found, vocab)
    top_k, top_p = _field(fields, slot, TOP_K), _field(fields, slot, TOP_P).to(tl.uint64)
    least = tl.full([BLOCK], HIGHEST_KEY, tl.int32)
    for first in range(0, num, BLOCK):
        keys, _, weights, _ = _chunk(
            first, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab, capacity, BLOCK
        )
        least = tl.minimum(least, tl.where(weights > 0, keys, HIGHEST_KEY))
    low = tl.min(least, 0).to(tl.int64)
    inside = num.to(tl.int64)
    for stage in range(2 if GUMBEL else 3):
        goal, wanted = top_k - 1, (top_k > 0) & (top_k < num_alive)
        if stage == 1:
            goal, wanted = tl.maximum(_share(top_p, total), 1) - 1, top_p != 0
        elif stage == 2:
            goal, wanted = _share(_uniform(fields, slot), total), total > 0
        if wanted:
            low, inside, total = _search(
                goal, low, stage > 0, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab,
                capacity, BLOCK,
            )  # fmt: skip
    num_equal = tl.zeros([], tl.int64)
    winner = tl.full([], NO_SCORE, tl.int64)
    for first in range(0, num, BLOCK):
        keys, exponents, weights, ids = _chunk(
            first, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab, capacity, BLOCK
        )
        equal = (keys == low) & (weights > 0)
        rank = num_equal + tl.cumsum(equal.to(tl.int64), 0)  # candidates lie in order of id
        num_equal += tl.sum(equal.to(tl.int64), 0)
        if GUMBEL:
            kept = ((keys > low) & (weights > 0)) | (equal & (rank <= inside))
            scores = _gumbel_scores(exponents, ids, fields, slot)
        else:
            kept = equal & (rank == inside)
            scores = ids.to(tl.int64) ^ NO_ID
        winner = tl.maximum(winner, tl.max(tl.where(kept, scores, NO_SCORE), 0))
    return _id_of(winner)


@triton.jit
def _search(
    goal, low, by_weight, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab, capacity,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The place of the first token at which the running sum, of weights or of ones, exceeds `goal`.

    Returns its key, how many tokens of that key are inside, and the weight of all up to it. The sum from `low` on
    exceeds the goal, the sum from `high` on does not.
    """
    high = _keys(top).to(tl.int64) + 1
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        bounds = tl.minimum(low + step * tl.arange(0, WAYS), high).to(tl.int32)
        sums = tl.zeros([BLOCK, WAYS], tl.int64)
        for first in range(0, num, BLOCK):
            keys, _, weights, _ = _chunk(
                first, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab, capacity, BLOCK
            )
            each = tl.where(by_weight, weights, (weights > 0).to(tl.int64))
            sums += tl.where(keys[:, None] >= bounds[None, :], each[:, None], 0)
        passed = tl.maximum(tl.sum((tl.sum(sums, 0) > goal).to(tl.int32), 0), 1)
        high = tl.minimum(high, low + passed * step)
        low += (passed - 1) * step
    above, num_above = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    weight = tl.zeros([BLOCK], tl.int64)
    for first in range(0, num, BLOCK):
        keys, _, weights, _ = _chunk(
            first, num, compacted, logits, ld, fields, slot, edited, top, values, value_ids, vocab, capacity, BLOCK
        )
        above += tl.where(keys > low, weights, 0)
        num_above += ((keys > low) & (weights > 0)).to(tl.int64)
        weight = tl.maximum(weight, tl.where(keys == low, weights, 0))
    total, each = tl.sum(above, 0), tl.max(weight, 0)
    if by_weight:
        inside = (goal - total) // tl.maximum(each, 1) + 1
    else:
        inside = goal - tl.sum(num_above, 0) + 1
    return low, inside, total + inside * each


@triton.jit
def _log_sum_exp(raw_best, raw_sum, slot, num_tiles, TILES: tl.constexpr):
    """Of the raw row, from the sums of its tiles: a tree of fixed shape."""
    tiles = tl.arange(0, TILES)
    tops = tl.load(raw_best + slot * num_tiles + tiles, mask=tiles < num_tiles, other=LOWEST)
    sums = tl.load(raw_sum + slot * num_tiles + tiles, mask=tiles < num_tiles, other=0.0)
    top = tl.max(tops, 0)
    top = tl.where(top > LOWEST, top, 0.0)
    return tl.log(tl.sum(sums * tl.exp(tops - top), 0)) + top


@triton.jit
def top(
    logits, ld, fields, raw_best, raw_id, raw_sum, top_ids, top_logprobs, max_top, vocab, num_tiles,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    if _field(fields, slot, LOGITS_ROW) < 0:
        return
    log_total = _log_sum_exp(raw_best, raw_sum, slot, num_tiles, TILES)
    tiles = tl.arange(0, TILES)
    bests = tl.load(raw_best + slot * num_tiles + tiles, mask=tiles < num_tiles, other=LOWEST)
    best_ids = tl.load(raw_id + slot * num_tiles + tiles, mask=tiles < num_tiles, other=vocab)
    for i in range(0, tl.minimum(_field(fields, slot, NUM_LOGPROBS), max_top).to(tl.int32)):
        best = tl.max(bests, 0)
        best_id = tl.min(tl.where(bests == best, best_ids, vocab), 0)
        tl.store(top_ids + slot * max_top + i, best_id)
        tl.store(top_logprobs + slot * max_top + i, best - log_total)
        # The tile that lost its best offers its next one.
        tile = best_id // TILE
        ids = tile * TILE + tl.arange(0, TILE)
        x = _raw(logits, ld, fields, slot, ids, ids < vocab)
        later = (ids < vocab) & ((x < best) | ((x == best) & (ids > best_id)))
        following = tl.max(tl.where(later, x, LOWEST), 0)
        following_id = tl.min(tl.where(later & (x == following), ids, vocab), 0)
        bests = tl.where(tiles == tile, following, bests)
        best_ids = tl.where(tiles == tile, following_id, best_ids)
