"""Prometheus metrics of the gateway; nothing of a request's text and no model's name among the labels."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from serving.gateway.answering import Outcome

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)


class Metrics:
    """Counts what requests took; one registry per application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests for completions, by how they ended", "outcome")
        self._stops = self._counter("stops", "Answered requests by what stopped sampling", "reason")
        self._samples = self._counter("samples", "Candidates sampled")
        self._calls = self._counter("calls", "Calls of LLMs", "result")
        self._tokens = self._counter("tokens", "Tokens as the LLMs' servers counted them", "kind")
        self._cost = self._counter("cost", "Money, by the prices given")
        self._seconds = Histogram(
            "cappy_gateway_seconds", "Seconds of answered requests", buckets=SECONDS, registry=self._registry
        )

    def answered(self, outcome: Outcome) -> None:
        """Counts an answer."""
        ledger = outcome.ledger
        self._requests.labels(outcome.how).inc()
        self._stops.labels(outcome.limit or outcome.stop).inc()
        self._samples.inc(len(outcome.draws))
        self._calls.labels("answered").inc(ledger.calls - ledger.failed)
        self._calls.labels("failed").inc(ledger.failed)
        self._tokens.labels("prompt").inc(ledger.prompt_tokens)
        self._tokens.labels("completion").inc(ledger.completion_tokens)
        self._cost.inc(ledger.cost)
        self._seconds.observe(outcome.seconds)

    def refused(self, status: int) -> None:
        """Counts a request without an answer, one that could not be read included, by its status."""
        self._requests.labels(str(status)).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"cappy_gateway_{name}", text, labels, registry=self._registry)
