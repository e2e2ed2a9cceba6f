"""The prefix cache: what is found, by whom, and that eviction and collisions never serve a wrong block."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.block_pool import BlockPool
from engine.prefix_cache import Link, PrefixCache

SIZE = 2


def links_of(cache: PrefixCache, token_ids: list[int], salt: bytes = b"") -> list[Link]:
    links: list[Link] = []
    cache.extend(links, cache.root(salt), token_ids, len(token_ids) // SIZE)
    return links


def remember(cache: PrefixCache, pool: BlockPool, token_ids: list[int], salt: bytes = b"") -> list[int]:
    """Compute a prompt that nobody knows, enter its full blocks and release them."""
    links = links_of(cache, token_ids, salt)
    blocks = pool.allocate(len(links))
    for link, block in zip(links, blocks, strict=True):
        pool.fill(block)
        cache.insert(link, block)
    pool.release(blocks)
    return blocks


def make(num_blocks: int = 8, namespace: bytes = b"model") -> tuple[PrefixCache, BlockPool]:
    pool = BlockPool(num_blocks)
    return PrefixCache(pool, SIZE, namespace), pool


def test_the_longest_known_prefix_is_found_and_the_rest_is_not():
    cache, pool = make()
    blocks = remember(cache, pool, [1, 2, 3, 4, 5, 6])
    assert cache.match(links_of(cache, [1, 2, 3, 4, 9, 9])) == blocks[:2]
    assert cache.match(links_of(cache, [9, 2, 3, 4])) == []


def test_equal_blocks_behind_different_prefixes_are_different():
    cache, pool = make()
    remember(cache, pool, [1, 2, 7, 8])
    assert cache.match(links_of(cache, [3, 4, 7, 8])) == []


def test_another_salt_or_model_never_finds_a_block():
    cache, pool = make()
    remember(cache, pool, [1, 2, 3, 4], salt=b"tenant a")
    assert cache.match(links_of(cache, [1, 2, 3, 4], salt=b"tenant b")) == []
    assert cache.match(links_of(cache, [1, 2, 3, 4])) == []
    other, _ = make(namespace=b"other model")
    assert other.root(b"tenant a") != cache.root(b"tenant a")


def test_salt_and_namespace_cannot_be_shifted_into_each_other():
    one, _ = make(namespace=b"bc")
    two, _ = make(namespace=b"c")
    assert one.root(b"a") != two.root(b"ab")


def test_a_digest_collision_is_caught_by_comparing_token_ids():
    cache, pool = make()
    remember(cache, pool, [1, 2])
    forged = links_of(cache, [5, 6])[0]._replace(digest=links_of(cache, [1, 2])[0].digest)
    assert cache.match([forged]) == []


def test_a_link_extended_in_two_goes_equals_one_go():
    cache, _ = make()
    tokens = list(range(10))
    links: list[Link] = []
    cache.extend(links, cache.root(b""), tokens, 2)
    cache.extend(links, links[-1].digest, tokens, 5)
    assert links == links_of(cache, tokens)


def test_an_evicted_block_is_not_found_and_may_be_entered_anew():
    cache, pool = make(num_blocks=2)
    remember(cache, pool, [1, 2, 3, 4])
    pool.release(pool.allocate(2))
    assert cache.match(links_of(cache, [1, 2, 3, 4])) == []
    assert len(cache) == 0
    assert remember(cache, pool, [1, 2]) == cache.match(links_of(cache, [1, 2]))


def test_the_first_of_two_equal_blocks_stays_and_the_second_is_freed():
    cache, pool = make()
    first = remember(cache, pool, [1, 2])
    second = remember(cache, pool, [1, 2])
    assert cache.match(links_of(cache, [1, 2])) == first
    assert second != first
    assert pool.num_cached == 1


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=12), st.integers(0, 11))
@settings(max_examples=60, deadline=None)
def test_changing_any_token_changes_every_link_from_its_block_on(token_ids: list[int], where: int):
    cache, _ = make()
    where %= len(token_ids)
    changed = [*token_ids]
    changed[where] ^= 1
    pairs = list(zip(links_of(cache, token_ids), links_of(cache, changed), strict=True))
    for index, (one, two) in enumerate(pairs):
        assert (one.digest == two.digest) == (index < where // SIZE)


class PrefixCacheMachine(RuleBasedStateMachine):
    """Prompts over a tiny alphabet come and go in a tiny pool; the truth of each block is kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.cache, self.pool = make(num_blocks=6)
        self.truth: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=2, max_size=8), salt=st.sampled_from([b"", b"x"]))
    def serve(self, token_ids: list[int], salt: bytes) -> None:
        links = links_of(self.cache, token_ids, salt)
        matched = self.cache.match(links)
        for index, block in enumerate(matched):
            prefix = tuple(token_ids[: (index + 1) * SIZE])
            assert self.truth[block] == (salt, prefix), "a block of another prefix or tenant (T9)"
        self.pool.share(matched)
        if len(links) - len(matched) > self.pool.num_available:
            self.pool.release(matched)
            return
        new = self.pool.allocate(len(links) - len(matched))
        for index, block in enumerate(new, len(matched)):
            self.truth[block] = salt, tuple(token_ids[: (index + 1) * SIZE])
            self.pool.fill(block)
            self.cache.insert(links[index], block)
        self.pool.release([*matched, *new])
        assert self.cache.match(links) == [*matched, *new], "what was just served is found"

    @invariant()
    def consistent(self) -> None:
        self.pool.check()
        self.cache.check()
        assert self.pool.num_cached == len(self.cache)


PrefixCacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPrefixCacheMachine = PrefixCacheMachine.TestCase
