"""Moving a collection: to another model, or as it is into another store.

Both go through the source in the order of its ids and can be stopped at any moment: what is there
already and still the same is not made again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from serving.stores import Item, Store

__all__ = ["Embed", "Moved", "checksum", "move", "verify"]

Embed = Callable[[list[Item]], list[np.ndarray]]
"""The new vectors of items."""
_PAGE: Final = 256
_Seen = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What a move did."""

    written: int
    kept: int
    """Items that an earlier, interrupted move had written."""
    removed: int


def move(
    source: Store,
    target: Store,
    *,
    embed: Embed | None = None,
    switch: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda written, kept: None,
    items_per_second: float | None = None,
) -> Moved:
    """Make `target` hold what `source` holds, then switch to it.

    Writes to the source may go on: passes are made until one finds nothing new, and after the
    switch one more takes what was acknowledged before it.

    Args:
        source: Is only read.
        target: Items that the source has not are removed from it.
        embed: New vectors for another model; None: the vectors stay as they are.
        switch: Called once, when the target is whole.
        progress: Called after each page with (written, kept) of this pass.
        items_per_second: No more than that are embedded and written; None: as fast as it goes.
    """
    total: Moved | None = None
    seen: _Seen = {}
    while True:
        before = seen
        moved, seen = _pass(source, target, before, embed, progress, items_per_second)
        if total is None:
            total = moved
        else:
            total = replace(
                total,
                written=total.written + moved.written,
                removed=total.removed + moved.removed,
            )
        if not (moved.written or moved.removed):
            break
    target.optimize()
    switch()
    ids, late = set(), []
    for item in _items(source):
        ids.add(item.id)
        if seen.get(item.id) != _digest(item):
            late.append(item)
    target.upsert(_embedded(late, {}, embed))
    gone = sorted(seen.keys() - ids)
    target.delete(gone)
    return replace(total, written=total.written + len(late), removed=total.removed + len(gone))


def verify(source: Store, target: Store) -> tuple[int, str]:
    """Count and checksum of both, which must be equal.

    Raises:
        ValueError: If they differ; the message has both.
    """
    ours, theirs = checksum(source), checksum(target)
    if ours != theirs:
        message = (
            f"the copy differs: {ours[0]} items with checksum {ours[1][:16]} in the source, "
            f"{theirs[0]} with {theirs[1][:16]} in the target; run it again"
        )
        raise ValueError(message)
    return ours


def checksum(store: Store) -> tuple[int, str]:
    """How many items there are, and a hash of all ids, vectors and payloads in order of ids."""
    digest, count = hashlib.sha256(), 0
    for item in _items(store):
        digest.update(_digest(item))
        count += 1
    return count, digest.hexdigest()


def _pass(
    source: Store,
    target: Store,
    known: Mapping[str, bytes],
    embed: Embed | None,
    progress: Callable[[int, int], None],
    items_per_second: float | None,
) -> tuple[Moved, _Seen]:
    seen: _Seen = {}
    written = kept = 0
    lookup = _Lookup(target)
    for page in _pages(source):
        start = time.monotonic()
        digests = {item.id: _digest(item) for item in page}
        seen |= digests
        # What an earlier run has written is looked at once; after that, this run knows.
        there = {} if known else lookup.find(page)
        changed = [
            item
            for item in page
            if known.get(item.id) != digests[item.id]
            and not _is_same(item, there.get(item.id), embed)
        ]
        if changed:
            target.upsert(_embedded(changed, there, embed))
        written, kept = written + len(changed), kept + len(page) - len(changed)
        progress(written, kept)
        if items_per_second is not None and changed:
            time.sleep(max(0.0, start + len(changed) / items_per_second - time.monotonic()))
    gone = [item.id for item in _items(target) if item.id not in seen]
    removed = target.delete(gone)
    return Moved(written=written, kept=kept, removed=removed), seen


class _Lookup:
    """Items of a store by id, asked for in the order of ids, in one go through the store."""

    def __init__(self, store: Store) -> None:
        self._items = _items(store)
        self._ahead = next(self._items, None)

    def find(self, page: list[Item]) -> dict[str, Item]:
        found = {}
        for item in page:
            while self._ahead is not None and self._ahead.id < item.id:
                self._ahead = next(self._items, None)
            if self._ahead is not None and self._ahead.id == item.id:
                found[item.id] = self._ahead
        return found


def _is_same(item: Item, found: Item | None, embed: Embed | None) -> bool:
    """Whether an earlier run has written this very item."""
    if found is None:
        return False
    # Of another model's vectors there is nothing to compare but what they were made of.
    ours = item if embed is None else replace(item, vector=found.vector)
    return _digest(ours) == _digest(found)


def _embedded(items: list[Item], there: Mapping[str, Item], embed: Embed | None) -> list[Item]:
    if embed is None:
        return items
    # A vector is made of a picture or a text alone: other changes leave it as it is.
    kept = {item.id: there[item.id].vector for item in items if _shows_the_same(item, there)}
    fresh = [item for item in items if item.id not in kept]
    vectors = kept | dict(zip((i.id for i in fresh), embed(fresh) if fresh else [], strict=True))
    return [replace(item, vector=vectors[item.id]) for item in items]


def _shows_the_same(item: Item, there: Mapping[str, Item]) -> bool:
    found = there.get(item.id)
    if found is None or found.modality != item.modality:
        return False
    if item.modality == "text":
        return item.text == found.text
    return item.thumbnail is None or item.thumbnail == found.thumbnail


def _items(store: Store) -> Iterator[Item]:
    for page in _pages(store):
        yield from page


def _pages(store: Store) -> Iterator[list[Item]]:
    after = ""
    while page := store.scan(_PAGE, after=after):
        yield page
        after = page[-1].id


def _digest(item: Item) -> bytes:
    told = [item.id, item.modality, item.text, item.metadata]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode())
    digest.update(np.ascontiguousarray(item.vector, np.float32).tobytes())
    digest.update(b"\0" if item.thumbnail is None else b"\1" + item.thumbnail)
    return digest.digest()
