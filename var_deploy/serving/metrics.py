"""The metrics of the service, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

MEDIA_TYPE = CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one service, in a registry of its own, so that a process can hold several."""

    def __init__(self) -> None:
        self._registry = of = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"var_deploy_{name}", text, buckets=buckets, registry=of)

        self.requests = Counter(
            "var_deploy_requests", "Requests answered.", ["route", "status"], registry=of
        )
        self.rejected = Counter(
            "var_deploy_rejected", "Requests not drawn, by reason.", ["reason"], registry=of
        )
        self.images = Counter("var_deploy_images", "Images drawn.", registry=of)
        self.waiting = histogram(
            "waiting_seconds", "From a request to its first launch.", SECONDS
        )
        self.drawing = histogram("drawing_seconds", "All launches of one batch.", SECONDS)
        self.batch = histogram("batch_images", "Images of one batch.", IMAGES)
        self.batch_seconds: float | None = None  # moving average
        self._depth = Gauge("var_deploy_queue_depth", "Requests that wait.", registry=of)

    def watch_queue(self, depth: Callable[[], float]) -> None:
        """Report the result of `depth` as the length of the queue."""
        self._depth.set_function(depth)

    def drew(self, images: int, seconds: float) -> None:
        """Count a batch of images that took `seconds`."""
        self.images.inc(images)
        self.batch.observe(images)
        self.drawing.observe(seconds)
        former = self.batch_seconds
        self.batch_seconds = seconds if former is None else 0.7 * former + 0.3 * seconds

    def page(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
