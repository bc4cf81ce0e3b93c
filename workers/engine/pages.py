"""Pages of a cache: who holds them, and which finished prefixes they still contain."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np

Key = bytes
"""Names the content of a page by all tokens up to its end."""


class PageList:
    """Numbers of pages in order: a list that is an array too, so that a step does not turn 1,000 pages into one."""

    def __init__(self, pages: Iterable[int] = ()) -> None:
        self._array = np.fromiter(pages, np.int64)
        self._start, self._stop = 0, len(self._array)

    @property
    def array(self) -> np.ndarray:
        """``[n]`` int64; what is appended or taken away later does not change it."""
        return self._array[self._start : self._stop]

    def append(self, page: int) -> None:
        """One more at the end."""
        if self._stop == len(self._array):
            self._array = np.concatenate([self.array, np.zeros(max(16, len(self)), np.int64)])
            self._start, self._stop = 0, len(self)
        self._array[self._stop] = page
        self._stop += 1

    def popleft(self) -> int:
        """Takes the first away; there must be one."""
        page = self[0]
        self._start += 1
        return page

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, at: int) -> int:
        return int(self.array[at])

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __reversed__(self) -> Iterator[int]:
        return iter(self.array[::-1].tolist())


class PagePool:
    """``size`` pages. A page that nobody holds keeps its content, findable by key, until it is taken for another.

    Of the pages that nobody holds, those without a key are taken first, then the ones let go longest ago.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._holders = [0] * size
        self._keys: list[Key | None] = [None] * size
        self._by_key: dict[Key, int] = {}
        self._empty = list(range(size - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that nobody holds, with or without content."""
        return len(self._empty) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that still can be found."""
        return len(self._cached)

    def take(self) -> int:
        """A page to write to, held once. There must be a free one."""
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Holds a page that was found."""
        self._cached.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int, soon: bool = False) -> None:
        """Lets go of a page, held before by this caller. soon: it is to be taken before all others with a content."""
        self._holders[page] -= 1
        assert self._holders[page] >= 0, f"page {page} released more often than held"
        if self._holders[page] == 0:
            if self._keys[page] is None:
                self._empty.append(page)
            else:
                self._cached[page] = None
                self._cached.move_to_end(page, last=not soon)

    def publish(self, page: int, key: Key) -> None:
        """Says that a held page now holds the whole content that ``key`` names. A twin published before stays."""
        if self._keys[page] is None and key not in self._by_key:
            self._keys[page], self._by_key[key] = key, page

    def sole(self, pages: Iterable[int]) -> list[int]:
        """Those of the pages, held by the caller, that nobody else holds. They are not found any more."""
        found = [page for page in pages if self._holders[page] == 1]
        for page in found:
            if self._keys[page] is not None:
                self._forget(page)
        return found

    def find(self, key: Key) -> int | None:
        """The page with this content."""
        return self._by_key.get(key)

    def is_free(self, page: int) -> bool:
        """Whether nobody holds the page."""
        return self._holders[page] == 0

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        del self._by_key[key]
        self._keys[page] = None


def page_keys(tokens: Sequence[int], page: int, known: list[Key]) -> list[Key]:
    """Keys of all whole pages of ``tokens``; ``known`` are those of the first pages, and is extended."""
    for start, stop in pairwise(range(len(known) * page, len(tokens) + 1, page)):
        before = known[-1] if known else b""
        known.append(hashlib.sha256(before + np.asarray(tokens[start:stop], np.int64).tobytes()).digest())
    return known
