"""The regression set: what an annotated instance is to training, one row per response."""

from collections.abc import Iterator
from dataclasses import dataclass

from cappy.errors import RecordError, shown
from cappy.records import Instance
from cappy.records.instance import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An (instruction, response, label) of the regression set, with where the response came from.

    `source` (reference, choice, mismatch, llm), `generator` and `decoding` make every ablation of the paper a filter.
    """

    instance_id: str
    instruction: str
    response: str
    label: float
    source: Source
    generator: str = ""
    decoding: str = ""


def regression_rows(instance: Instance, metric: str) -> Iterator[Row]:
    """The instance's rows, duplicates dropped by response: the first one stands, so the order of candidates decides.

    References are all kept: those that stand twice were written so by the `paper` recipe. RecordError where a
    candidate has no label of this metric.
    """
    seen: set[str] = set()
    for candidate in instance.candidates:
        if metric not in candidate.labels:
            remedy = "run cappy annotation on this folder first"
            raise RecordError(f"instance {shown(instance.instance_id)}: a candidate has no label {metric!r}; {remedy}")
        if candidate.response in seen and candidate.source != "reference":
            continue
        seen.add(candidate.response)
        yield Row(
            instance_id=instance.instance_id,
            instruction=instance.instruction,
            response=candidate.response,
            label=candidate.labels[metric],
            source=candidate.source,
            generator=candidate.generator,
            decoding=candidate.decoding,
        )
