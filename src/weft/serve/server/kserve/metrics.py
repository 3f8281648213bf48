"""Statistics for Prometheus, under Triton's names."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from weft.serve.server.catalogue import Catalogue
from weft.serve.server.hosted import Hosted
from weft.serve.server.statistics import REASONS

DURATIONS = {
    "success": "request", "queue": "queue", "compute_input": "compute_input", "compute_infer": "compute_infer",
    "compute_output": "compute_output",
}  # fmt: skip
"""Parts of Statistics, and Triton's names for them."""

METRICS = {
    "nv_inference_request_success": "Requests that succeeded",
    "nv_inference_request_failure": "Requests that failed, by reason",
    "nv_inference_count": "Inferences: one for each request that succeeded",
    "nv_inference_exec_count": "Steps of the engine",
    "nv_inference_pending_request_count": "Completions that wait for a place in the engine",
    **{
        f"nv_inference_{name}_duration_us": f"Microseconds of requests that succeeded: {name}"
        for name in DURATIONS.values()
    },
}
"""Names are Triton's, without the _total that a counter's would have here: so they go without a type."""


class TritonMetrics(Collector):
    """`nv_inference_…` of every model: register it where the server's other metrics are.

    Times are of requests that succeeded. `nv_inference_exec_count` counts the engine's steps, of every protocol's requests.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def collect(self) -> Iterator[Metric]:
        found = {name: Metric(name, words, "unknown") for name, words in METRICS.items()}

        def tell(name: str, value: float, **labels: str) -> None:
            found[name].add_sample(name, labels, value)

        for model in self.catalogue.models.values():
            labels, counts = {"model": model.name, "version": number_of(model)}, model.statistics
            tell("nv_inference_request_success", counts.count["success"], **labels)
            tell("nv_inference_count", counts.count["success"], **labels)
            for reason in REASONS:
                tell("nv_inference_request_failure", counts.failures[reason], **labels, reason=reason)
            for part, name in DURATIONS.items():
                tell(f"nv_inference_{name}_duration_us", int(1e6 * counts.seconds[part]), **labels)
            if model.ready:
                stats = model.current.desk.stats()
                tell("nv_inference_exec_count", stats.steps, **labels)
                tell("nv_inference_pending_request_count", stats.waiting, **labels)
        yield from found.values()


def number_of(model: Hosted) -> str:
    """The version that is there; "" where none is."""
    return model.current.number if model.ready else ""
