"""Page pool: which pages are free, who holds them, and which can be found again by the tokens they hold.

Whole pages are cached under a hash chain, so that a page is found only together with everything before it:
the idea of vLLM's automatic prefix caching. Plain Python: a page is a number, its bytes live in the workers.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from engine.config import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    """How many pages hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE_SIZE)


def hash_page(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full page: over its tokens and the key of the page before it (for the first: `root_hash`)."""
    return hashlib.blake2b(array("I", token_ids).tobytes(), key=parent, digest_size=32).digest()


class PagePool:
    """Reference counts and prefix hashes of `num_pages` pages.

    A page is in exactly one of three states: blank (nobody holds it, nothing to find), cached (nobody holds
    it, but its hash finds it until it is evicted), held (reference count > 0; it may have a hash too).

    namespace: what the content of a page depends on besides its tokens; see `set_namespace`.
    """

    def __init__(self, num_pages: int, *, enable_prefix_caching: bool, namespace: str) -> None:
        self.num_pages = num_pages
        self.enable_prefix_caching = enable_prefix_caching
        self.epoch = 0
        self.num_evictions = 0
        self.root_hash = b""
        self._ref_counts = [0] * num_pages
        # Taken from the end: low ids first, so that a lightly used pool touches little memory.
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._unchecked: set[int] = set()
        self._dirty: list[int] = []
        self.set_namespace(namespace)

    @property
    def num_free(self) -> int:
        """Pages that `allocate` could hand out now, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def set_namespace(self, namespace: str) -> None:
        """Make every cached page unreachable, now and for good.

        Pages that running requests hold mix both namespaces from here on: `epoch` changes, and whoever was
        admitted in an earlier epoch must not register pages.
        """
        self.epoch += 1
        self.root_hash = hashlib.blake2b(namespace.encode(), digest_size=32).digest()
        self._blank.extend(reversed(self._cached))
        self._cached.clear()
        self._page_of.clear()
        self._hash_of.clear()

    def match_prefix(self, page_hashes: Sequence[bytes]) -> list[int]:
        """The longest run of pages, from the first on, that can be found. Takes no reference: see `touch`."""
        page_ids: list[int] = []
        for page_hash in page_hashes:
            page_id = self._page_of.get(page_hash)
            if page_id is None:
                break
            page_ids.append(page_id)
        return page_ids

    def num_free_among(self, page_ids: Sequence[int]) -> int:
        """How many of these pages nobody holds: `num_free` falls by as much when they are touched."""
        return sum(self._ref_counts[page_id] == 0 for page_id in page_ids)

    def touch(self, page_ids: Sequence[int]) -> None:
        """Take one more reference to each of these held or cached pages."""
        for page_id in page_ids:
            if self._ref_counts[page_id] == 0:
                del self._cached[page_id]
            self._ref_counts[page_id] += 1

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take `num_pages` pages of undefined content, or none at all: None when there are too few."""
        if num_pages > self.num_free:
            return None
        page_ids: list[int] = []
        for _ in range(num_pages):
            if self._blank:
                page_id = self._blank.pop()
            else:
                page_id, _ = self._cached.popitem(last=False)
                self._forget(page_id)
                self.num_evictions += 1
            self._ref_counts[page_id] = 1
            page_ids.append(page_id)
            if page_id in self._unchecked:
                self._unchecked.remove(page_id)
                self._dirty.append(page_id)
        return page_ids

    def take_dirty(self) -> list[int]:
        """Pages that were allocated since the last call and may hold numbers that are not finite: the next step must
        clear them before it runs."""
        dirty, self._dirty = self._dirty, []
        return dirty

    def register(self, page_id: int, page_hash: bytes) -> None:
        """Make a held page findable: all its tokens are computed. The first page with these tokens wins."""
        assert self._ref_counts[page_id] > 0, f"page {page_id} is free"
        assert page_id not in self._hash_of, f"page {page_id} is registered already"
        if self.enable_prefix_caching and page_hash not in self._page_of:
            self._page_of[page_hash] = page_id
            self._hash_of[page_id] = page_hash

    def free(self, page_ids: Sequence[int], *, findable: bool = True, unchecked: Sequence[int] = ()) -> None:
        """Give one reference back for each page of a chain.

        findable=False: what they hold is not to be trusted, so nobody may find them again.  unchecked: those of them
        that may hold numbers which are not finite, see `take_dirty`.
        """
        self._unchecked.update(unchecked)
        # The tail first: a chain without its tail is still worth something, a chain without its head is not.
        for page_id in reversed(page_ids):
            assert self._ref_counts[page_id] > 0, f"page {page_id} is free already"
            if not findable:
                self._forget(page_id)
            self._ref_counts[page_id] -= 1
            if self._ref_counts[page_id]:
                continue
            if page_id in self._hash_of:
                self._cached[page_id] = None
            else:
                self._blank.append(page_id)

    def _forget(self, page_id: int) -> None:
        page_hash = self._hash_of.pop(page_id, None)
        if page_hash is not None:
            del self._page_of[page_hash]

    def check(self, holders: Sequence[Sequence[int]] | None = None) -> None:
        """Prove that the books balance; AssertionError otherwise.

        holders: the pages of every request that holds some, to compare the reference counts with.
        """
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a page is free twice"
        for page_id, ref_count in enumerate(self._ref_counts):
            assert ref_count >= 0, f"page {page_id} has {ref_count} references"
        unreferenced = {page_id for page_id, ref_count in enumerate(self._ref_counts) if ref_count == 0}
        assert set(free) == unreferenced, "the free pages are not those without references"
        assert {page_id: page_hash for page_hash, page_id in self._page_of.items()} == self._hash_of
        assert len(self._page_of) == len(self._hash_of), "a hash finds a page that does not know it"
        assert all(page_id in self._hash_of for page_id in self._cached), "a cached page has no hash"
        assert not any(page_id in self._hash_of for page_id in self._blank), "a blank page has a hash"
        if holders is not None:
            held = Counter(page_id for page_ids in holders for page_id in page_ids)
            assert held == Counter(dict(enumerate(self._ref_counts))), "references and holders differ"
