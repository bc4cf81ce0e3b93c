"""A request that an engine works on: its tokens, and the pages that hold their keys and values."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from shoal.workers.engine.pages import Key, PageList, PagePool, page_keys
from shoal.workers.engine.request import Request


class Pools:
    """The pages of all layers of a model, which every layer numbers alike.

    page: tokens of a page. reach: tokens before a position whose near pages its computation reads; 0: near pages are
    not used (full attention).
    """

    def __init__(self, far: int, near: int, page: int, reach: int, prefix_cache: bool = True) -> None:
        self.far, self.near = PagePool(far), PagePool(near)
        self.page, self.reach, self.prefix_cache = page, reach, prefix_cache

    def first_near(self, position: int) -> int:
        """The first near page that computing ``position`` and what follows reads."""
        return max(0, position - self.reach) // self.page

    def pages(self, tokens: int) -> int:
        """Pages that hold the first ``tokens`` tokens."""
        return -(-tokens // self.page)


class Sequence:
    """tokens: prompt and what was generated so far. computed: how many of them have their keys and values in pages.

    cached: those of the prompt that the cache had when the work began. told: whether that was reported.
    far: pages from the start. near: pages from page number ``near_start`` on, as many as are still read.
    """

    def __init__(self, request: Request, pools: Pools) -> None:
        self.request, self.pools = request, pools
        self.tokens = [*request.prompt, *request.generated]
        self.computed = 0
        self.cached: int | None = None
        self.told = False
        self.far = PageList()
        self.near = PageList()
        self.near_start = 0
        self.ngrams = Ngrams(self.tokens)
        self._keys: list[Key] = []
        self._ends = {(len(request.prompt) - 1) // pools.page}  # pages after which others may go on from here

    @property
    def generated(self) -> int:
        """New tokens so far, those of an earlier engine included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are not in the cache; 1 once the prompt is done."""
        return len(self.tokens) - self.computed

    def missing(self, upto: int) -> tuple[int, int]:
        """Far and near pages still needed to compute the tokens up to ``upto``."""
        pages = self.pools.pages(upto)
        return pages - len(self.far), pages - self.near_start - len(self.near) if self.pools.reach else 0

    def fits(self, upto: int) -> bool:
        """Whether there are free pages to compute the tokens up to ``upto``."""
        return self._free(*self.missing(upto))

    def _free(self, far: int, near: int) -> bool:
        """Whether so many pages are."""
        return far <= self.pools.far.free and near <= self.pools.near.free

    def reserve(self, upto: int) -> bool:
        """Takes the pages for the tokens up to ``upto``. False when they are not free: then it takes none."""
        far, near = self.missing(upto)
        if not self._free(far, near):
            return False
        for _ in range(far):
            self.far.append(self.pools.far.take())
        for _ in range(near):
            self.near.append(self.pools.near.take())
        return True

    def advance(self, count: int) -> None:
        """``count`` more tokens are in the cache: makes whole pages findable, lets go of near ones out of reach."""
        before, self.computed = self.computed, self.computed + count
        assert self.computed <= len(self.tokens)
        pools = self.pools
        if pools.prefix_cache:
            keys = page_keys(self.tokens, pools.page, self._keys)
            for number in range(before // pools.page, self.computed // pools.page):
                pools.far.publish(self.far[number], keys[number])
                if pools.reach:
                    pools.near.publish(self.near[number - self.near_start], keys[number])
        self._drop_near(pools.first_near(self.computed))

    def adopt_prefix(self) -> None:
        """Holds the pages of the longest prefix that is cached whole. At least one token is left to compute."""
        if not self.pools.prefix_cache:
            return
        pools = self.pools
        keys = page_keys(self.tokens, pools.page, self._keys)[: (len(self.tokens) - 1) // pools.page]
        found: list[int] = []
        for key in keys:
            page = pools.far.find(key)
            if page is None:
                break
            found.append(page)
        for count in range(len(found), 0, -1):
            near = [pools.near.find(key) for key in keys[self._near_of(count) : count]] if pools.reach else []
            if None not in near:
                self._adopt(found[:count], [page for page in near if page is not None])
                return

    def _near_of(self, pages: int) -> int:
        return self.pools.first_near(pages * self.pools.page)

    def _adopt(self, far: SequenceOf[int], near: SequenceOf[int]) -> None:
        for page in far:
            self.pools.far.hold(page)
        for page in near:
            self.pools.near.hold(page)
        self.far, self.near = PageList(far), PageList(near)
        self.near_start = self._near_of(len(far)) if self.pools.reach else 0
        self.computed = len(far) * self.pools.page
        self._ends.add(len(far))

    def release(self) -> None:
        """Lets go of all pages; what was computed has to be computed again."""
        # the end of a prefix is of less use than its beginning, without which it cannot be found: it goes first
        for page in reversed(self.far):
            self.pools.far.release(page)
        for page in reversed(self.near):
            self.pools.near.release(page)
        self.far, self.near, self.near_start, self.computed = PageList(), PageList(), 0, 0

    def _drop_near(self, first: int) -> None:
        while self.near and self.near_start < first:
            # A prefix is found again by the near pages before its end: others are the first to be overwritten.
            ends = any(self._near_of(pages) <= self.near_start < pages for pages in self._ends)
            self.pools.near.release(self.near.popleft(), soon=not ends)
            self.near_start += 1


class Ngrams:
    """Guesses what follows from what followed the last time that the same few tokens stood at the end.

    What is new is learned at once; of what was there at the beginning the newest part, a little with every guess.
    """

    SIZES = (3, 2)
    NEWEST = 4096  # tokens of a beginning that are learned: more would be a lot of memory
    AT_ONCE = 128  # of those, with one guess: they hold up the step of all sequences

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens  # the sequence's own list, which grows
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = self._old = len(tokens)
        self._oldest = max(1, len(tokens) - self.NEWEST)

    def propose(self, count: int) -> list[int]:
        """Up to ``count`` tokens that may come next."""
        self._learn()
        for size in self.SIZES:
            at = self._after.get(tuple(self.tokens[-size:]))
            if at is not None:
                return self.tokens[at : at + count]
        return []

    def _learn(self) -> None:
        """Notes what follows each n-gram; the one at the end is followed by nothing yet."""
        for end in range(max(1, self._seen), len(self.tokens)):
            for size in self.SIZES:
                if end >= size:
                    self._after[tuple(self.tokens[end - size : end])] = end
        self._seen = len(self.tokens)
        until = max(self._oldest, self._old - self.AT_ONCE)
        for end in range(self._old - 1, until - 1, -1):  # backwards: what is known already came later
            for size in self.SIZES:
                if end >= size:
                    self._after.setdefault(tuple(self.tokens[end - size : end]), end)
        self._old = until
