"""The server's figures for Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

WINDOW = 10.0  # seconds over which tokens/s is measured
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters, gauges and histograms of one server; times are in seconds."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "moe_lm_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "moe_lm_request_seconds",
            "From a request's headers to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "moe_lm_time_to_first_token_seconds",
            "From entering the queue to the first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("moe_lm_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._generated = Counter("moe_lm_generated_tokens", "Tokens written.", registry=registry)
        speed = Gauge("moe_lm_tokens_per_second", f"Tokens written in the last {WINDOW:.0f} s.", registry=registry)
        speed.set_function(self._speed)
        self._recent: deque[tuple[float, int]] = deque()

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at every scrape."""
        Gauge(f"moe_lm_{name}", text, registry=self._registry).set_function(value)

    def wrote(self, tokens: int) -> None:
        """Count the tokens of one step."""
        if tokens:
            self._generated.inc(tokens)
            now = time.monotonic()
            self._recent.append((now, tokens))
            while self._recent[0][0] < now - WINDOW:
                self._recent.popleft()

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def _speed(self) -> float:
        since = time.monotonic() - WINDOW
        return sum(tokens for when, tokens in list(self._recent) if when > since) / WINDOW
