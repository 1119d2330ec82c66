"""What a person should know about the labels of a folder, in sentences that end with what to do."""

from collections.abc import Mapping


def cautions(metrics: Mapping[str, float]) -> list[str]:
    """Sentences from the counts of an annotated folder's manifest (see `cappy.annotation.labels.count`)."""
    found = []
    if reasoning := metrics.get("with_reasoning", 0):
        found.append(
            f"{_share(reasoning, metrics['responses'])} responses hold reasoning such as <think>...</think>, which "
            "the metric compares too; sample with --strip-reasoning"
        )
    instances = metrics.get("instances", 0)
    remedy = "annotate with --metric rougeL_unicode or chrf"
    if unseen := metrics.get("invisible_to_rougeL", 0):
        found.append(f"{_share(unseen, instances)} instances have no reference that Rouge-L can see; {remedy}")
    if partly := metrics.get("partly_invisible_to_rougeL", 0):
        found.append(
            f"{_share(partly, instances)} instances have a reference or response of which Rouge-L sees only a part, "
            f"for it sees [a-z0-9] alone; {remedy}"
        )
    return found


def _share(some: float, of: float) -> str:
    """Such as "3 of 40 (7.5 %)"."""
    return f"{some:,.0f} of {of:,.0f} ({100 * some / max(of, 1):.1f} %)"
