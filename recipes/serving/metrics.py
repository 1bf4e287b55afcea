"""What a server counts, as Prometheus reads it; all of it belongs to the event loop.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from ..rollout import Stats

OUTCOMES = (
    *("completed", "disconnected", "stalled", "stopped", "failed"),  # of accepted requests
    *("invalid", "busy", "unavailable", "unauthorised"),  # of others
)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Histogram:
    """How often values were at most each bound.

    Args:
        bounds: Ascending.
    """

    def __init__(self, bounds: Sequence[float] = _SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the samples of the text format."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of a server.

    Attributes:
        received: Requests for text that have come.
        accepted: Those of them that the engine was given.
        outcomes: Those of them that have ended, by how.
        prompt_tokens: Tokens of accepted prompts.
        tokens: Tokens that were drawn.
        first_token: Seconds from acceptance to a request's first token.
        token: Seconds from a token of a text to the next one.
        request: Seconds from acceptance to the end.
    """

    def __init__(self) -> None:
        self.received = self.accepted = self.prompt_tokens = self.tokens = 0
        self.outcomes: Counter[str] = Counter()
        self.first_token, self.token, self.request = Histogram(), Histogram(), Histogram()

    @property
    def in_progress(self) -> int:
        """Requests that have come and not ended."""
        return self.received - self.outcomes.total()

    def text(self, stats: Stats, waiting: int) -> str:
        """Return the page that Prometheus reads.

        Args:
            stats: Of the engine.
            waiting: Texts that were accepted and do not run.
        """
        rows: list[tuple[str, str, str, float]] = [
            ("requests_accepted_total", "counter", "Requests that were queued.", self.accepted),
            ("requests_in_progress", "gauge", "Requests that have not ended.", self.in_progress),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens that were drawn.", self.tokens),
            (
                *("found_tokens_total", "counter"),
                *("Tokens of prompts that were in pages already.", stats.found_tokens),
            ),
            ("samples_running", "gauge", "Texts that are computed.", stats.running),
            ("samples_waiting", "gauge", "Texts that wait to be computed.", waiting),
            ("samples_put_back_total", "counter", "Texts that lost their pages.", stats.put_back),
            ("cache_pages", "gauge", "Pages of the cache.", stats.pages),
            ("cache_pages_free", "gauge", "Pages that a text could take.", stats.pages_free),
            ("steps_total", "counter", "Passes of the model.", stats.steps),
        ]
        lines = [*_head("requests_total", "counter", "Requests for text that have ended.")]
        lines += [
            f'warploom_requests_total{{outcome="{name}"}} {self.outcomes[name]}'
            for name in OUTCOMES
        ]
        for name, kind, said, value in rows:
            lines += [*_head(name, kind, said), f"warploom_{name} {value}"]
        for name, histogram, said in (
            ("time_to_first_token_seconds", self.first_token, "From acceptance to a token."),
            ("time_per_token_seconds", self.token, "From a token to the next of its text."),
            ("request_seconds", self.request, "From acceptance to the end of a request."),
        ):
            lines += [*_head(name, "histogram", said), *histogram.lines(f"warploom_{name}")]
        return "\n".join([*lines, ""])


def _head(name: str, kind: str, said: str) -> tuple[str, str]:
    return f"# HELP warploom_{name} {said}", f"# TYPE warploom_{name} {kind}"
