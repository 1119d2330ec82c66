"""The scorer as an MLflow pyfunc model (`mlflow models serve`), loaded from code so that nothing is pickled."""

from collections.abc import Mapping
from typing import Protocol

import mlflow
import pandas  # type: ignore[import-untyped]


class _Context(Protocol):
    """The part of MLflow's `PythonModelContext` that is used here: paths of artifacts by name."""

    artifacts: Mapping[str, str]


class CappyModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc] # MLflow is untyped
    """Scores rows with the columns instruction and response, or marks the row that is picked for each instruction."""

    def load_context(self, context: _Context) -> None:
        """Loads the scorer and verifies its files."""
        from cappy.scoring import Scorer

        self.scorer = Scorer.load(context.artifacts["scorer"])

    def predict(
        self, context: _Context, model_input: pandas.DataFrame, params: Mapping[str, object] | None = None
    ) -> list[float]:
        """One score per row, in order; with the parameter `select`, 1 for the picked row of each instruction, else 0.

        The rows of an instruction are one pool; with `closed_choices` they are all possible answers. The selector also
        uses the optional columns `likelihood` (per token), if every row of the pool has one, `greedy` (true for the
        greedy response) and `truncated` (true for a response that a length limit cut off).
        """
        if not (params or {}).get("select"):
            return self.scorer.score(list(zip(model_input["instruction"], model_input["response"], strict=True)))
        from cappy.selection import Candidates

        picked = [0.0] * len(model_input)
        groups = model_input.reset_index(drop=True).groupby("instruction", sort=False)
        pools = [(instruction, rows) for instruction, rows in groups]
        candidates = [
            Candidates(
                responses=list(rows["response"]),
                likelihoods=_likelihoods(rows),
                greedy=next(iter(_marked(rows, "greedy")), None),
                truncated=_marked(rows, "truncated"),
                closed_choices=bool((params or {}).get("closed_choices")),
            )
            for _, rows in pools
        ]
        requests = zip((instruction for instruction, _ in pools), candidates, strict=True)
        for (_, rows), pick in zip(pools, self.scorer.select_stream(requests), strict=True):
            picked[rows.index[pick.index]] = 1.0
        return picked


def _likelihoods(rows: pandas.DataFrame) -> list[float] | None:
    """The likelihoods of a pool; None if one is missing or not finite, as in an evaluation."""
    from cappy.records.instance import MAX_LOGPROB

    if "likelihood" not in rows:
        return None
    values = pandas.to_numeric(rows["likelihood"], errors="coerce").astype("float64").tolist()
    return values if all(abs(value) <= MAX_LOGPROB for value in values) else None


def _marked(rows: pandas.DataFrame, column: str) -> list[int]:
    """The indices of the rows of a pool that are marked as true or 1 in a column."""
    values = rows[column].fillna(False).tolist() if column in rows else []
    return [index for index, value in enumerate(values) if value is True or value == 1]


mlflow.models.set_model(CappyModel())
