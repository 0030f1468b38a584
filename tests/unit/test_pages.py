"""The page pool: no page lost, none handed out twice, each found only under its own tokens and namespace."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import PAGE_SIZE
from engine.pages import PagePool, hash_page, pages_for


def chain(pool: PagePool, length: int, first_token: int = 0) -> list[bytes]:
    """Keys of `length` full pages of consecutive tokens."""
    keys = [pool.root_hash]
    for index in range(length):
        start = first_token + index * PAGE_SIZE
        keys.append(hash_page(keys[-1], range(start, start + PAGE_SIZE)))
    return keys[1:]


def make_pool(num_pages: int = 8, *, caching: bool = True, namespace: str = "a") -> PagePool:
    return PagePool(num_pages, enable_prefix_caching=caching, namespace=namespace)


def cache_chain(pool: PagePool, keys: list[bytes]) -> list[int]:
    """Compute, register and release one page per key."""
    page_ids = pool.allocate(len(keys))
    assert page_ids is not None
    for page_id, key in zip(page_ids, keys, strict=True):
        pool.register(page_id, key)
    pool.free(page_ids)
    return page_ids


def test_pages_for_rounds_up() -> None:
    assert [pages_for(n) for n in (0, 1, 127, 128, 129, 256, 257)] == [0, 1, 1, 1, 2, 2, 3]


def test_key_depends_on_tokens_parent_and_namespace() -> None:
    tokens = list(range(PAGE_SIZE))
    keys = {
        hash_page(make_pool(namespace="a").root_hash, tokens),
        hash_page(make_pool(namespace="b").root_hash, tokens),
        hash_page(make_pool(namespace="a").root_hash, [*tokens[:-1], 7]),
        hash_page(hash_page(make_pool(namespace="a").root_hash, tokens), tokens),
    }
    assert len(keys) == 4
    # An id that needs more than one byte is not cut to it.
    assert hash_page(b"", [1]) != hash_page(b"", [257])


def test_allocate_is_all_or_nothing() -> None:
    pool = make_pool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    page_ids = pool.allocate(4)
    assert page_ids is not None and sorted(page_ids) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []
    pool.check([page_ids])


def test_released_pages_stay_findable() -> None:
    pool = make_pool()
    keys = chain(pool, 3)
    page_ids = cache_chain(pool, keys)
    assert pool.num_free == 8
    assert pool.match_prefix(keys) == page_ids
    assert pool.match_prefix(chain(pool, 3, first_token=1)) == []
    # Without its head a chain is not found, even where the page itself is there.
    assert pool.match_prefix(keys[1:]) == page_ids[1:]
    assert pool.match_prefix([b"unknown", *keys[1:]]) == []
    pool.touch(page_ids[:2])
    assert pool.num_free == 6 and pool.num_held == 2
    pool.check([page_ids[:2]])


def test_eviction_takes_blank_pages_then_oldest_chain_from_its_tail() -> None:
    pool = make_pool(6)
    old, recent = chain(pool, 2, first_token=0), chain(pool, 2, first_token=1000)
    old_ids, recent_ids = cache_chain(pool, old), cache_chain(pool, recent)
    pool.touch(old_ids)
    pool.free(old_ids)  # used again: now `recent` is the older one
    held = pool.allocate(2)
    assert held is not None and not set(held) & {*old_ids, *recent_ids}
    assert pool.allocate(1) == [recent_ids[1]]
    assert pool.match_prefix(recent) == recent_ids[:1]
    assert pool.allocate(1) == [recent_ids[0]]
    assert pool.match_prefix(recent) == []
    assert pool.match_prefix(old) == old_ids
    assert pool.allocate(1) == [old_ids[1]]
    assert pool.match_prefix(old) == old_ids[:1]


def test_shared_page_is_free_only_after_its_last_holder() -> None:
    pool = make_pool(2)
    [page_id] = cache_chain(pool, chain(pool, 1))
    pool.touch([page_id])
    pool.touch([page_id])
    pool.free([page_id])
    assert pool.num_free == 1
    pool.check([[page_id]])
    pool.free([page_id])
    assert pool.num_free == 2
    with pytest.raises(AssertionError, match="free already"):
        pool.free([page_id])


def test_first_of_two_equal_pages_is_the_one_found() -> None:
    pool = make_pool()
    [key] = chain(pool, 1)
    first, second = pool.allocate(1) or [], pool.allocate(1) or []
    pool.register(first[0], key)
    pool.register(second[0], key)
    assert pool.match_prefix([key]) == first
    pool.free(second)
    assert pool.match_prefix([key]) == first
    pool.check([first])


def test_distrusted_pages_are_never_found_again() -> None:
    pool = make_pool()
    keys = chain(pool, 2)
    page_ids = cache_chain(pool, keys)
    pool.touch(page_ids)
    pool.touch(page_ids[:1])  # another request shares the head
    pool.free(page_ids, findable=False)
    assert pool.match_prefix(keys) == []
    pool.free(page_ids[:1])
    assert pool.match_prefix(keys) == []
    assert pool.num_free == 8
    pool.check([])


def test_new_namespace_makes_old_pages_unreachable_for_good() -> None:
    pool = make_pool(namespace="plan a")
    keys = chain(pool, 2)
    page_ids = cache_chain(pool, keys)
    pool.touch(page_ids[:1])
    pool.set_namespace("plan b")
    assert pool.match_prefix(keys) == [] and pool.match_prefix(chain(pool, 2)) == []
    pool.set_namespace("plan a")
    assert chain(pool, 2) == keys
    assert pool.match_prefix(keys) == []
    pool.free(page_ids[:1])
    assert pool.match_prefix(keys) == []
    pool.check([])


def test_without_prefix_caching_nothing_is_found() -> None:
    pool = make_pool(caching=False)
    keys = chain(pool, 2)
    cache_chain(pool, keys)
    assert pool.match_prefix(keys) == []
    pool.check([])


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, against books kept here: what is held, and which pages each key may find."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.pool = make_pool(num_pages, namespace="0")
        self.num_namespaces = 1
        self.held: list[tuple[list[bytes], list[int]]] = []
        self.written: dict[int, bytes] = {}  # page -> key of what it holds now

    @rule(num_pages=st.integers(0, 5), first_token=st.integers(0, 3))
    def admit(self, num_pages: int, first_token: int) -> None:
        keys = chain(self.pool, num_pages, first_token * 10_000)
        hits = self.pool.match_prefix(keys)
        for page_id, key in zip(hits, keys, strict=False):
            assert self.written[page_id] == key
        num_free = self.pool.num_free
        self.pool.touch(hits)
        fresh = self.pool.allocate(num_pages - len(hits))
        if fresh is None:
            self.pool.free(hits)
            assert self.pool.num_free == num_free
            return
        for _, page_ids in self.held:
            assert not set(page_ids) & set(fresh)
        assert not set(hits) & set(fresh)
        for page_id, key in zip(fresh, keys[len(hits) :], strict=True):
            self.written[page_id] = key
            self.pool.register(page_id, key)
        self.held.append((keys, hits + fresh))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), findable=st.booleans())
    def release(self, data: st.DataObject, findable: bool) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        keys, page_ids = self.held.pop(index)
        self.pool.free(page_ids, findable=findable)
        if not findable:
            assert not set(self.pool.match_prefix(keys)) & set(page_ids)

    @rule()
    def change_namespace(self) -> None:
        self.num_namespaces += 1
        self.pool.set_namespace(str(self.num_namespaces))

    @invariant()
    def books_balance(self) -> None:
        holders = [page_ids for _, page_ids in self.held]
        self.pool.check(holders)
        assert self.pool.num_held == len({page_id for page_ids in holders for page_id in page_ids})


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
