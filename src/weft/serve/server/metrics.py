"""What the server counts, under vLLM's names, so that its dashboards work here; Prometheus fetches it at /metrics."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from weft.serve.request import Output, Request
from weft.serve.server.tracing import engine_span
from weft.serve.stats import Stats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
REASONS = {"cancelled": "abort"}
"""vLLM's words for ends, where they are others."""


class Metrics:
    """All of one server; `registry` takes more (as KServe's)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.states: dict[str, Callable[[], Stats | None]] = {}  # by model
        self.registry.register(States(self.states))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", text, ["model_name", *labels], registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(f"vllm:{name}", text, ["model_name"], registry=self.registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.new_tokens = counter("generation_tokens", "Tokens that were generated")
        self.queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the cache")
        self.hits = counter("prefix_cache_hits", "Tokens of prompts that were found there")
        self.ends = counter("request_success", "Completions that ended, by why", "finished_reason")
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token")
        self.between = histogram("inter_token_latency_seconds", "From a token to the next")
        self.whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end")
        self.queue = histogram("request_queue_time_seconds", "From a request's arrival to its turn")
        self.prefill = histogram("request_prefill_time_seconds", "From its turn to its first token")
        self.decode = histogram("request_decode_time_seconds", "From its first token to its last")
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.new = histogram("request_generation_tokens", "Tokens of a completion", TOKENS)
        self.n = histogram("request_params_n", "n of a request", (1, 2, 5, 10, 20, 128))
        self.most = histogram("request_params_max_tokens", "max_tokens of a request", TOKENS)
        self.refused = Counter(
            "weft:requests_refused", "Requests that were not begun, by why", ["model_name", "reason"],
            registry=self.registry,
        )  # fmt: skip
        self.answers = Counter("weft:http_answers", "Answers, by status", ["status"], registry=self.registry)

    def router(self) -> APIRouter:
        router = APIRouter()

        @router.get("/metrics")
        async def metrics() -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        return router


class States(Collector):
    """What engines are doing just now."""

    def __init__(self, states: dict[str, Callable[[], Stats | None]]) -> None:
        self.states = states

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "num_requests_running": ("Completions that run", lambda stats: stats.running),
            "num_requests_waiting": ("Completions that wait", lambda stats: stats.waiting),
            "kv_cache_usage_perc": (
                "Share of the cache that running ones hold, 0 to 1",
                lambda stats: stats.cache_used,
            ),
        }
        counters = {
            "num_preemptions": ("Sequences whose blocks were taken", lambda stats: stats.preemptions),
            "spec_decode_num_draft_tokens": ("Tokens that speculation proposed", lambda stats: stats.drafted),
            "spec_decode_num_accepted_tokens": ("Those that were kept", lambda stats: stats.accepted),
        }
        found = {name: stats for name, state in self.states.items() if (stats := state()) is not None}
        for kind, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for metric, (text, value) in table.items():
                family = kind(f"vllm:{metric}", text, labels=["model_name"])
                for name, stats in found.items():
                    family.add_metric([name], value(stats))
                yield family


class Meter:
    """What one model's requests come to: in Prometheus, and as plain numbers since the server began.

    Attributes:
        ends: completions by why they ended.
        queue_seconds, compute_seconds: of all requests that got a token, until their turn came, and from then on.
        requests: that ended.
        prompt_tokens, new_tokens: of them.
    """

    def __init__(self, name: str, metrics: Metrics) -> None:
        self.name, self.metrics = name, metrics
        self.ends: Tally[str] = Tally()
        self.requests = self.prompt_tokens = self.new_tokens = 0
        self.queue_seconds = self.compute_seconds = 0.0
        one = {"model_name": name}
        self._first, self._between = metrics.first.labels(**one), metrics.between.labels(**one)
        self._new_tokens = metrics.new_tokens.labels(**one)

    def refuse(self, reason: str) -> None:
        """A request was not begun."""
        self.metrics.refused.labels(self.name, reason).inc()

    def token(self, output: Output, timing: Timing) -> None:
        """An output came."""
        now = time.monotonic()
        if output.tokens:
            self.new_tokens += len(output.tokens)
            self._new_tokens.inc(len(output.tokens))
            if output.index in timing.last:
                gap = (now - timing.last[output.index]) / len(output.tokens)
                for _ in output.tokens:
                    self._between.observe(gap)
            elif timing.first is None:
                timing.first, timing.started, timing.cached = now, output.started or now, output.cached
                self._first.observe(now - timing.arrived)
            timing.last[output.index] = now
            timing.tokens[output.index] += len(output.tokens)
        if output.finish is not None:
            self._end(output.index, output.finish, timing)

    def cut(self, timing: Timing) -> None:
        """Nobody reads on: what has not ended is cancelled."""
        for index in range(timing.request.n):
            if index not in timing.ended:
                self._end(index, "cancelled", timing)

    def _end(self, index: int, finish: str, timing: Timing) -> None:
        self.ends[finish] += 1
        timing.ended.add(index)
        metrics, one, request = self.metrics, {"model_name": self.name}, timing.request
        metrics.ends.labels(self.name, REASONS.get(finish, finish)).inc()
        metrics.new.labels(**one).observe(timing.tokens[index])
        if len(timing.ended) < request.n:
            return
        now = time.monotonic()
        engine_span(self.name, timing, finish)
        self.requests += 1
        metrics.whole.labels(**one).observe(now - timing.arrived)
        metrics.n.labels(**one).observe(request.n)
        metrics.most.labels(**one).observe(request.sampling.max_tokens)
        if timing.first is None:
            return
        self.prompt_tokens += len(request.prompt)
        metrics.prompt_tokens.labels(**one).inc(len(request.prompt))
        metrics.prompt.labels(**one).observe(len(request.prompt))
        metrics.queries.labels(**one).inc(len(request.prompt))
        metrics.hits.labels(**one).inc(timing.cached)
        self.queue_seconds += timing.started - timing.arrived
        self.compute_seconds += now - timing.started
        metrics.queue.labels(**one).observe(timing.started - timing.arrived)
        metrics.prefill.labels(**one).observe(timing.first - timing.started)
        metrics.decode.labels(**one).observe(max(timing.last.values()) - timing.first)


class Timing:
    """When what happened to one request; on `time.monotonic`'s clock."""

    def __init__(self, request: Request) -> None:
        self.request, self.arrived = request, time.monotonic()
        self.first: float | None = None
        self.started, self.cached = self.arrived, 0
        self.last: dict[int, float] = {}  # by which of n
        self.tokens: Tally[int] = Tally()
        self.ended: set[int] = set()
