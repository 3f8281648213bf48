"""What the engine is doing, among Triton's own metrics, under the names that vLLM has made usual. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from weft.serve.stats import Stats

TELL_SECONDS = 1.0

Values = dict[tuple[str, str], float]
"""By name and reason; most have no reason."""

GAUGES = {
    "vllm:num_requests_running": "Completions that are computed now.",
    "vllm:num_requests_waiting": "Completions that wait.",
    "vllm:kv_cache_usage_perc": "Share of the cache that running sequences hold; 1 is all.",
}
COUNTERS = {
    "vllm:prompt_tokens_total": "Tokens of prompts that were begun.",
    "vllm:prefix_cache_hits_total": "Tokens of prompts that were found in the cache.",
    "vllm:generation_tokens_total": "New tokens.",
    "vllm:num_preemptions_total": "Sequences that were stopped to make room.",
    "vllm:request_success_total": "Completions by why they ended.",
}


class Metrics:
    """Tells Triton what has changed.

    Args:
        pb_utils: Triton's own module.
        labels: of every metric.
    """

    def __init__(self, pb_utils: Any, labels: dict[str, str]) -> None:
        family = pb_utils.MetricFamily
        kinds = {name: (family.GAUGE, what) for name, what in GAUGES.items()}
        kinds |= {name: (family.COUNTER, what) for name, what in COUNTERS.items()}
        self.families = {name: family(name=name, description=what, kind=kind) for name, (kind, what) in kinds.items()}
        self.labels = labels
        self._metrics: dict[tuple[str, str], Any] = {}
        self._told: Values = {}
        self._next = 0.0

    def tell(self, stats: Callable[[], Stats | None]) -> None:
        """To be called often; it asks for the numbers once in a while."""
        if time.monotonic() < self._next or (now := stats()) is None:
            return
        self._next = time.monotonic() + TELL_SECONDS
        for key, value in values_of(now).items():
            told = self._told.get(key)
            if value != told:
                self._change(key, value, told or 0.0)
        self._told = values_of(now)

    def _change(self, key: tuple[str, str], value: float, told: float) -> None:
        name, reason = key
        if key not in self._metrics:
            labels = self.labels | ({"finished_reason": reason} if reason else {})
            self._metrics[key] = self.families[name].Metric(labels=labels)
        if name in GAUGES:
            self._metrics[key].set(value)
        else:  # an engine that was built anew counts from 0
            self._metrics[key].increment(value - told if value >= told else value)


def values_of(stats: Stats) -> Values:
    plain = {
        "vllm:num_requests_running": stats.running,
        "vllm:num_requests_waiting": stats.waiting,
        "vllm:kv_cache_usage_perc": stats.cache_used,
        "vllm:prompt_tokens_total": stats.prompt_tokens,
        "vllm:prefix_cache_hits_total": stats.cached_tokens,
        "vllm:generation_tokens_total": stats.new_tokens,
        "vllm:num_preemptions_total": stats.preemptions,
    }
    ends = {("vllm:request_success_total", reason): float(count) for reason, count in stats.finished.items()}
    return {(name, ""): float(value) for name, value in plain.items()} | ends
