"""Numbers and names as a person reads them."""

_METRIC_NAMES = {
    "rougeL": "Rouge-L",
    "rougeL_unicode": "Rouge-L (all scripts)",
    "exact_match": "exact match",
    "numeric_match": "numeric match",
    "token_f1": "token F1",
    "chrf": "chrF",
    "bleu": "BLEU",
    "given": "given label",
}


def metric_name(metric: str) -> str:
    """How a person writes the metric."""
    return _METRIC_NAMES.get(metric, metric)


def percent(value: float) -> str:
    """A value of 0 to 1, x 100."""
    return f"{100 * value:z.1f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference x 100 with its sign."""
    return f"{100 * value:+z.1f}".replace("-", "−")
