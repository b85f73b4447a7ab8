"""Pages of the key/value pool by number: who holds each, and which of them hold the keys and values of known tokens.

In: page numbers and token ids. Out: pages to write to, and pages that hold the beginning of a prompt already. No tensor is touched.

A page is free, held by one or more slots, or kept: held by none, but known, so that a later prompt may begin with it. Known are whole pages
alone. A page's key is the page before it and its own ids, which are compared, not only hashed. Who holds a known page holds those before it
too and gives them back after it. So no known page follows the one that was given back longest ago: it can be taken, and what is still
known can still be reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Key = tuple[int, tuple[int, ...]]
FIRST = -1  # in place of the page before a sequence's first


class PagePool:
    """Counts holders of `num_pages` pages, and knows pages by what they hold."""

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._known: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._kept: dict[int, None] = {}  # in the order in which they were given back

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds, known ones included."""
        return len(self._free) + len(self._kept)

    def holders(self, page: int) -> int:
        return self._holders[page]

    def take(self) -> int:
        """A page that nobody else holds or knows: a free one, or else the kept one given back longest ago."""
        assert self.free_pages > 0, "ask free_pages first"
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._kept))
            del self._kept[page], self._known[self._keys.pop(page)]
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Count one holder more of a known page."""
        assert page in self._keys, f"{page=} is not known: it belongs to one holder"
        self._kept.pop(page, None)
        self._holders[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """Count one holder fewer of each page of a sequence, in its order."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"{page=} was given back too often"
            if self._holders[page] > 0:
                continue
            if page in self._keys:
                self._kept[page] = None
            else:
                self._free.append(page)

    def find(self, parts: Iterable[tuple[int, ...]]) -> list[int]:
        """The known pages of the longest beginning of a sequence. parts: the ids of its pages, in order."""
        pages: list[int] = []
        for part in parts:
            page = self._known.get((pages[-1] if pages else FIRST, part))
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, pages: Sequence[int], parts: Sequence[tuple[int, ...]]) -> list[int]:
        """Make a sequence's first pages, which its caller holds, known by their ids; the pages that the caller holds from now on.

        Where another page is known of the same ids the caller gets that one for its own.
        """
        held: list[int] = []
        for page, part in zip(pages, parts, strict=True):
            key = held[-1] if held else FIRST, part
            known = self._known.setdefault(key, page)
            if known != page:
                self.hold(known)
                self.give_back((page,))
            else:
                assert self._keys.setdefault(page, key) == key, f"{page=} is known as {self._keys[page]}, not {key}"
            held.append(known)
        return held
