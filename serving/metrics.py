"""What Prometheus is told: where the time goes, how full the queues are, who was turned away."""

from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

__all__ = ["METRICS_TYPE", "REFUSALS", "Metrics"]

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
REFUSALS: Final = frozenset({401, 403, 413, 415, 421, 429, 503, 504})
"""Statuses of requests that were turned away without being wrong in themselves."""
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ITEMS: Final = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The instruments of one application; nothing is shared between applications."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "vlm_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["method", "route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "vlm_stage_seconds",
            "Of one image: decode; of one item: wait in the queue; of one batch: image, text.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_items = Histogram(
            "vlm_batch_items",
            "Items of one forward pass.",
            ["tower"],
            buckets=_ITEMS,
            registry=self.registry,
        )
        self.queue_items = Gauge(
            "vlm_queue_items",
            "Items that wait for the model now.",
            ["tower"],
            registry=self.registry,
        )
        self.cache = Counter(
            "vlm_cache_lookups",
            "Rows looked up among those computed before.",
            ["kind", "result"],
            registry=self.registry,
        )
        self.cache_bytes = Gauge(
            "vlm_cache_bytes", "Size of the rows that are remembered.", registry=self.registry
        )
        self.refusals = Counter(
            "vlm_refusals",
            "Requests turned away: no key, too large, too many, too late.",
            ["status"],
            registry=self.registry,
        )
        self.collection_items = Gauge(
            "vlm_collection_items", "Size of a collection.", ["collection"], registry=self.registry
        )
        self.collection_recall = Gauge(
            "vlm_collection_recall",
            "Share of the 10 nearest items that searches find, measured against exact search.",
            ["collection", "query"],
            registry=self.registry,
        )
        self.model = Gauge(
            "vlm_model_info",
            "1 for each model that is being served.",
            ["name", "fingerprint", "runtime"],
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
