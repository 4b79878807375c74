"""From a question to ranked items: what is asked, in which geometry, and in which order.

Vectors are stored as the model made them. Captions and pictures lie around two different means, so
cosines of different kinds of pairs cannot be compared. Where they must be (pictures with pictures
and texts ranked together, sums of both, or one modality with itself), the mean of each modality is
taken away first; a plain text among pictures alone is ranked by its cosine.
"""

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from serving.errors import BadInputError, NotFoundError
from serving.services.embedding import Embedder
from serving.services.fetching import RemoteImage
from serving.services.ranking import (
    QueryBank,
    Ranked,
    centred,
    combined,
    diversified,
    fused,
    grouped,
    percentiles,
    rescored,
    without_hubs,
)
from serving.services.recall import Measurement
from serving.stores import (
    Effort,
    Filter,
    Hit,
    IsModality,
    Item,
    Modality,
    Store,
    Versioned,
    best_first,
)
from serving.together import together
from vlm.inference import HUB_CANDIDATES, independent_probabilities

__all__ = ["Answer", "Part", "Question", "Searcher", "Tuning"]

Geometry = Literal["auto", "raw", "centred"]
_MAX_DEPTH: Final = 10_000
_MOST_SCORE: Final = 1.01
"""A cosine, with room for what rounding adds."""
_SAMPLE: Final = 512
_REMEMBER_SECONDS: Final = 300.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the things that a question adds up: texts (averaged), a picture, an item, a vector."""

    texts: Sequence[str] = ()
    image: bytes | RemoteImage | None = None
    item_id: str | None = None
    vector: Sequence[float] | None = None
    modality: Modality = "text"
    """Of `vector`."""
    field: str = "part"
    """What errors call it."""
    weight: float = 1.0
    """Negative: like the others, but without this."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is looked for, and how the answer is put together."""

    parts: Sequence[Part]
    limit: int
    where: Filter = ()
    geometry: Geometry = "auto"
    words: str | None = None
    """Captions with these words are fused into the ranking."""
    diversity: float = 0.0
    group: float | None = None
    """Cosine from which two hits are nearly the same."""
    reduce_hubs: bool = False
    """Whether items that are near to everything count less."""
    calibrate: Literal["sigmoid", "percentile"] | None = None
    after: str | None = None
    """Where the page before ended."""

    @property
    def is_plain(self) -> bool:
        """Whether hits are in the order of their scores alone, so that there is a next page."""
        rearranged = self.diversity or self.group is not None or self.reduce_hubs
        return self.words is None and not rearranged


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Ranked hits."""

    hits: list[Ranked]
    centred: bool
    """Whether the modalities' means were taken away."""
    next: str | None
    """`after` of the next page."""


@dataclass(kw_only=True)
class Tuning:
    """How hard a collection is searched."""

    exact_below: int
    """Of fewer items, all or those that a filter leaves, every one is compared."""
    measurement: Measurement | None = None
    """Without one, search is exact."""
    note: str | None = None
    """What the measurement was read from."""

    @property
    def effort(self) -> Effort | None:
        """What was chosen for the whole collection; None: exact search."""
        return None if self.measurement is None else self.measurement.chosen.effort


@dataclass
class _Sampled:
    """Some items of a collection, and queries made of them, remembered for a while."""

    at: float
    items: list[Item]
    bank: QueryBank | None = None


class Searcher:
    """Answers questions about one collection.

    Args:
        embedder: Of the model that made its vectors.
        store: Its vectors.
        tuning: How hard to search.
    """

    def __init__(self, embedder: Embedder, store: Store, tuning: Tuning) -> None:
        self._embedder = embedder
        self._store = store
        self._tuning = tuning
        self._sampled: _Sampled | None = None
        self._held: tuple[int, frozenset[Modality]] | None = None
        known = embedder.info.modality_means
        self._means: dict[Modality, np.ndarray] = {}
        if known is not None:
            self._means["image"] = np.asarray(known.image, np.float32)
            self._means["text"] = np.asarray(known.text, np.float32)

    async def answer(self, question: Question) -> Answer:
        """The items that fit best.

        Raises:
            BadInputError: If parts cancel out, a picture is none, or options do not go together.
            NotFoundError: If a part names an item that is not there.
        """
        self._check(question)
        rows, kinds = await self._rows(question.parts)
        is_centred = await self._is_centred(question, kinds)
        means = self._means if is_centred else {}
        moved = [centred(row, means.get(kind)) for row, kind in zip(rows, kinds, strict=True)]
        query = combined(moved, [part.weight for part in question.parts])
        if query is None:
            message = "the parts of the question cancel each other out; change their weights"
            raise BadInputError(message)
        own = {part.item_id for part in question.parts if part.item_id is not None}
        hits = await self._candidates(question, query, own, is_centred)
        ranked, following = await self._arranged(question, hits)
        if question.calibrate is not None:
            ranked = await self._calibrated(question, query, ranked, is_centred)
        return Answer(hits=ranked, centred=is_centred, next=following)

    async def check(self) -> None:
        """Search once, as hard as questions do; StoreUnavailableError if files are damaged."""
        first = np.eye(1, self._store.dim, dtype=np.float32)[0]
        await asyncio.to_thread(self._store.search, first, 1, effort=self._tuning.effort)

    def _check(self, question: Question) -> None:
        if question.geometry == "centred" and not self._means:
            message = "geometry: this bundle has no modality means, so nothing can be centred"
            raise BadInputError(message)
        if question.calibrate == "sigmoid" and self._embedder.info.logit_bias is None:
            message = "calibrate: this model has no logit bias; ask for percentile"
            raise BadInputError(message)
        if question.calibrate is not None and question.words is not None:
            message = "calibrate: a ranking fused with words has no cosines to calibrate"
            raise BadInputError(message)
        if question.after is not None and not question.is_plain:
            message = (
                "after: no further pages of a search with words, diversity, group or reduce_hubs"
            )
            raise BadInputError(message)

    async def _rows(self, parts: Sequence[Part]) -> tuple[list[np.ndarray], list[Modality]]:
        found = await together(*(self._row(part) for part in parts))
        return [row for row, _ in found], [kind for _, kind in found]

    async def _row(self, part: Part) -> tuple[np.ndarray, Modality]:
        if part.texts:
            rows = await self._embedder.text_rows(list(part.texts))
            mean = rows.mean(axis=0)
            return mean / max(float(np.linalg.norm(mean)), 1e-12), "text"
        if part.image is not None:
            pictures = await self._embedder.prepare({part.field: part.image})
            return (await self._embedder.image_rows(pictures))[0], "image"
        if part.vector is not None:
            return self._given(part.field, part.vector), part.modality
        item = await asyncio.to_thread(self._store.get, part.item_id or "")
        if item is None:
            message = f"no item has the id {part.item_id!r}"
            raise NotFoundError(message)
        return item.vector, item.modality

    def _given(self, field: str, vector: Sequence[float]) -> np.ndarray:
        row = np.asarray(vector, np.float32)
        norm = float(np.linalg.norm(row))
        if row.shape != (self._store.dim,) or not np.isfinite(norm) or norm < 1e-12:
            message = f"{field}: must be {self._store.dim} numbers, not all 0"
            raise BadInputError(message)
        return row / norm

    async def _is_centred(self, question: Question, kinds: Sequence[Modality]) -> bool:
        if question.geometry != "auto" or not self._means:
            return question.geometry == "centred"
        gallery = await self._gallery()
        return len(kinds) > 1 or len(gallery) > 1 or gallery == frozenset(kinds)

    async def _candidates(
        self, question: Question, query: np.ndarray, own: set[str], is_centred: bool
    ) -> list[Hit]:
        last = _read_cursor(question.after)
        wanted = question.limit + len(own) + last.seen
        if not question.is_plain:
            wanted = max(HUB_CANDIDATES, 5 * wanted)
        while True:
            ranked = await self._ranked(question, query, wanted, is_centred)
            hits = [hit for hit in ranked if hit.id not in own and best_first(hit) > last.key]
            is_short = question.after is not None and len(hits) < question.limit
            if not is_short or not wanted <= len(ranked) < _MAX_DEPTH:
                break
            wanted *= 2  # what was written since the page before has pushed the rest further down
        if question.reduce_hubs and is_centred:
            message = "reduce_hubs: is of plain cosines; ask with geometry raw"
            raise BadInputError(message)
        if question.reduce_hubs:
            hits = without_hubs(hits, await self._bank())
        if question.words is not None:
            captions = await asyncio.to_thread(
                self._store.search_captions, question.words, wanted, question.where
            )
            hits = fused(hits, [hit for hit in captions if hit.id not in own])
            hits = await self._with_vectors(hits, question)
        return hits

    async def _ranked(
        self, question: Question, query: np.ndarray, wanted: int, is_centred: bool
    ) -> list[Hit]:
        if not is_centred:
            return await self._nearest(query, wanted, question.where, not question.is_plain)
        # Within a modality the raw product with the query differs from the centred cosine by a
        # constant and the norm of the moved row, so the best are among some more of the raw best.
        kinds = sorted(await self._gallery())
        only = [(IsModality(kind),) for kind in kinds] if len(kinds) > 1 else [()]
        wheres = [(*question.where, *one) for one in only]
        found = await together(*(self._nearest(query, 4 * wanted + 64, w, True) for w in wheres))
        hits = [hit for some in found for hit in some]
        return (await asyncio.to_thread(rescored, query, hits, self._means))[:wanted]

    async def _nearest(
        self, vector: np.ndarray, limit: int, where: Filter, vectors: bool
    ) -> list[Hit]:
        effort = self._tuning.effort
        asked = [condition for condition in where if not isinstance(condition, IsModality)]
        if effort is not None and asked:
            left = await asyncio.to_thread(self._store.count, where)
            effort = None if left < self._tuning.exact_below else effort
        return await asyncio.to_thread(
            self._store.search, vector, limit, where, effort=effort, vectors=vectors
        )

    async def _arranged(
        self, question: Question, hits: list[Hit]
    ) -> tuple[list[Ranked], str | None]:
        if question.diversity:
            most = len(hits) if question.group is not None else question.limit
            hits = await asyncio.to_thread(diversified, hits, most, question.diversity)
        if question.group is not None:
            return grouped(hits, question.limit, question.group), None
        page = hits[: question.limit]
        following = None
        seen = _read_cursor(question.after).seen + len(page)
        if question.is_plain and len(page) == question.limit and seen < _MAX_DEPTH:
            following = _cursor(page[-1], seen)
        return [Ranked(hit=hit) for hit in page], following

    async def _calibrated(
        self, question: Question, query: np.ndarray, ranked: list[Ranked], is_centred: bool
    ) -> list[Ranked]:
        scores = [each.hit.score for each in ranked]
        if question.calibrate == "sigmoid":
            if is_centred:
                message = "calibrate: sigmoid is of plain cosines; ask with geometry raw"
                raise BadInputError(message)
            info = self._embedder.info
            cosines = np.array(scores)[None]
            bias = info.logit_bias or 0.0
            values = independent_probabilities(cosines, info.logit_scale, bias)[0].tolist()
        else:
            items = (await self._sample()).items
            means = self._means if is_centred else {}
            rows = [centred(item.vector, means.get(item.modality)) for item in items]
            values = percentiles(scores, np.stack(rows) @ query if rows else np.empty(0))
        return [replace(each, calibrated=v) for each, v in zip(ranked, values, strict=True)]

    async def _with_vectors(self, hits: list[Hit], question: Question) -> list[Hit]:
        """Hits of a search in captions come without; only those that stay need theirs."""
        if not question.diversity and question.group is None:
            return hits
        bare = [hit.id for hit in hits if hit.vector is None]
        items = {item_id: await asyncio.to_thread(self._store.get, item_id) for item_id in bare}
        found = [
            replace(hit, vector=item.vector)
            if hit.vector is None and (item := items[hit.id]) is not None
            else hit
            for hit in hits
        ]
        return [hit for hit in found if hit.vector is not None]

    async def _gallery(self) -> frozenset[Modality]:
        """What the collection holds now, whichever process has written it."""
        return await asyncio.to_thread(self._look)

    def _look(self) -> frozenset[Modality]:
        if not isinstance(self._store, Versioned):
            return self._counted()
        version = self._store.version
        if self._held is None or self._held[0] != version:
            self._held = version, self._counted()
        return self._held[1]

    def _counted(self) -> frozenset[Modality]:
        texts = self._store.count((IsModality("text"),))
        there: dict[Modality, int] = {"text": texts, "image": self._store.count() - texts}
        return frozenset(kind for kind, count in there.items() if count)

    async def _sample(self) -> _Sampled:
        known = self._sampled
        if known is None or time.monotonic() - known.at > _REMEMBER_SECONDS:
            items = await asyncio.to_thread(self._store.sample, _SAMPLE)
            known = self._sampled = _Sampled(at=time.monotonic(), items=items)
        return known

    async def _bank(self) -> QueryBank:
        """Captions of the collection stand for what people ask."""
        known = await self._sample()
        if known.bank is None:
            texts = [item.text for item in known.items if item.text][: _SAMPLE // 4]
            rows = await self._embedder.text_rows(texts)
            known.bank = await asyncio.to_thread(self._make_bank, rows)
        return known.bank

    def _make_bank(self, rows: np.ndarray) -> QueryBank:
        best = [self._store.search(row, 1, effort=self._tuning.effort) for row in rows]
        return QueryBank(rows=rows, best=frozenset(hits[0].id for hits in best if hits))


@dataclass(frozen=True)
class _Last:
    """Where a page ended."""

    key: tuple[float, str] = (float("-inf"), "")
    seen: int = 0


def _cursor(hit: Hit, seen: int) -> str:
    told = json.dumps([hit.score, hit.id, seen], ensure_ascii=False)
    return base64.urlsafe_b64encode(told.encode()).decode()


def _read_cursor(text: str | None) -> _Last:
    if text is None:
        return _Last()
    with suppress(ValueError, RecursionError):  # a client may make up lists within lists
        match json.loads(base64.urlsafe_b64decode(text.encode())):
            case [float() | int() as score, str() as item_id, int() as seen] if (
                abs(score) <= _MOST_SCORE and 0 < seen < _MAX_DEPTH
            ):
                return _Last((-score, item_id), seen)
    message = "after: not what a page before has given as next"
    raise BadInputError(message)
