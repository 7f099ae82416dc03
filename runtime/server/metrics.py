"""Figures for Prometheus at ``/metrics``, in a registry of their own.

Of requests, by the names of OpenTelemetry's conventions for generative AI, as its exporter writes them for Prometheus:

    gen_ai_server_time_to_first_token_seconds      body has come → first token known; chats and completions
    gen_ai_server_time_per_output_token_seconds    (last − first) / (tokens − 1) of each answer
    gen_ai_server_request_duration_seconds         body has come → end; label error_type where it failed
    gen_ai_client_token_usage                      tokens of each request, by gen_ai_token_type input or output

``roundexport_queue_seconds`` (submission of an answer → its admission) has no name there, nor has
``roundexport_refused_requests_total``: turned away at their heads, by code.  Of the packages:
``roundexport_requests`` (waiting, writing), ``roundexport_cache_tokens`` and its limit, and what their
graphs have done (prompt tokens read and reused, tokens written, runs, guesses).  Times are measured where they happen,
in the engine's thread.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/; its buckets, with smaller ones added.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .models import DecoderModel, Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("gen_ai_operation_name", "gen_ai_request_model")
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WHOLE = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS = tuple(float(4**power) for power in range(14))


class Metrics:
    """What a server counts.

    Args:
        models: the packages, asked when somebody reads.
    """

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry()
        self.first = self._histogram("gen_ai_server_time_to_first_token_seconds", "Time to first token.", _FIRST)
        self.each = self._histogram("gen_ai_server_time_per_output_token_seconds", "Time per further token.", _EACH)
        self.whole = self._histogram(
            "gen_ai_server_request_duration_seconds", "Duration of requests.", _WHOLE, "error_type"
        )
        self.tokens = self._histogram("gen_ai_client_token_usage", "Tokens of requests.", _TOKENS, "gen_ai_token_type")
        self.queue = self._histogram("roundexport_queue_seconds", "Wait of an answer for its admission.", _FIRST)
        self.refused = Counter(
            "roundexport_refused_requests", "Requests turned away unread.", ["code"], registry=self._registry
        )
        self._registry.register(_Packages(models))

    def _histogram(self, name: str, about: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, about, (*_LABELS, *labels), registry=self._registry, buckets=tuple(buckets))

    def begin(self, operation: str, model: str) -> Observation:
        """A request begins now."""
        return Observation(self, operation, model)

    def text(self) -> bytes:
        """Everything in Prometheus' format."""
        return generate_latest(self._registry)


class Observation:
    """One request, being watched; the first call of `end` counts.

    Args:
        metrics: where it is counted.
        operation: ``chat``, ``text_completion``, ``embeddings``, ``rerank`` or ``transcription``.
        model: the package's name.
    """

    def __init__(self, metrics: Metrics, operation: str, model: str) -> None:
        self._metrics, self._labels = metrics, (operation, model)
        self._began_ns = time.perf_counter_ns()
        self._over = False

    def first(self, t_ns: int) -> None:
        """The first token was known then."""
        self._metrics.first.labels(*self._labels).observe((t_ns - self._began_ns) / 1e9)

    def answer(self, tokens: int, first_ns: int, last_ns: int) -> None:
        """An answer is finished."""
        if tokens > 1:
            self._metrics.each.labels(*self._labels).observe((last_ns - first_ns) / 1e9 / (tokens - 1))

    def waited(self, each_ns: Iterable[int]) -> None:
        """Its answers have waited so long."""
        for wait in each_ns:
            self._metrics.queue.labels(*self._labels).observe(wait / 1e9)

    def end(self, error: str = "", read: int = 0, written: int = 0) -> None:
        """The request is over.

        Args:
            error: what ended it; empty: nothing did.
            read: tokens of its prompts.
            written: tokens of its answers.
        """
        if self._over:
            return
        self._over = True
        seconds = (time.perf_counter_ns() - self._began_ns) / 1e9
        self._metrics.whole.labels(*self._labels, error).observe(seconds)
        if read:
            self._metrics.tokens.labels(*self._labels, "input").observe(read)
        if written:
            self._metrics.tokens.labels(*self._labels, "output").observe(written)


class _Packages(Collector):
    """Figures that packages keep themselves."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """One family per figure, one sample per package."""
        requests = GaugeMetricFamily(
            "roundexport_requests", "Answers waiting or being written.", labels=["model", "state"]
        )
        cache = GaugeMetricFamily("roundexport_cache_tokens", "Tokens in the cache.", labels=["model"])
        limit = GaugeMetricFamily("roundexport_cache_tokens_limit", "Tokens that fit.", labels=["model"])
        done = CounterMetricFamily(
            "roundexport_tokens", "Tokens read, reused, written, guessed, accepted; runs of the graph.",
            labels=["model", "kind"],
        )  # fmt: skip
        for model in self._models:
            if not isinstance(model, DecoderModel):
                requests.add_metric([model.name, "writing"], model.busy())
                continue
            load = model.scheduler.load
            requests.add_metric([model.name, "waiting"], load.waiting)
            requests.add_metric([model.name, "writing"], load.writing)
            cache.add_metric([model.name], load.cache_tokens)
            limit.add_metric([model.name], load.cache_limit)
            for kind, value in asdict(model.scheduler.counts).items():
                done.add_metric([model.name, kind], value)
        yield from (requests, cache, limit, done)
