"""One question to a collection without a server, answered as a server would."""

import asyncio

from serving.metrics import Metrics
from serving.services.embedding import Embedder
from serving.services.recall import read_measurement
from serving.services.searching import Part, Question, Searcher, Tuning
from serving.services.workers import Workers
from serving.settings import ServingSettings
from serving.stores import Filter, Hit, Store
from vlm.inference import Encoder

__all__ = ["ask"]


def ask(
    encoder: Encoder,
    store: Store,
    asked: str | bytes,
    *,
    limit: int,
    where: Filter,
    note: str | None,
) -> list[Hit]:
    """The items that fit a text or an image file best.

    Args:
        encoder: Of the model that made the vectors.
        store: The collection.
        asked: Words, or the bytes of a picture.
        limit: Most hits.
        where: What items must fulfil.
        note: What was measured of the collection, as its catalog keeps it.
    """
    settings, metrics, workers = ServingSettings(), Metrics(), Workers(1)
    try:
        embedder = Embedder(encoder, settings, metrics, workers=workers)
        tuning = Tuning(
            exact_below=settings.exact_below, note=note, measurement=read_measurement(note)
        )
        part = Part(texts=[asked]) if isinstance(asked, str) else Part(image=asked, field="image")
        question = Question(parts=[part], limit=limit, where=where)
        answer = asyncio.run(Searcher(embedder, store, tuning).answer(question))
        return [ranked.hit for ranked in answer.hits]
    finally:
        workers.close()
