"""The scorer as MLflow's own server loads it (`mlflow models serve`): code by path, so that nothing is pickled."""

from collections.abc import Mapping
from typing import Protocol

import mlflow
import pandas  # type: ignore[import-untyped]


class _Context(Protocol):
    """What is used of MLflow's `PythonModelContext`: paths of the model's files by name."""

    artifacts: Mapping[str, str]


class CappyModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc] # MLflow is untyped
    """Rows of instruction and response in, one score each out."""

    def load_context(self, context: _Context) -> None:
        """Loads the scorer, its files verified."""
        from cappy.scoring import Scorer

        self.scorer = Scorer.load(context.artifacts["scorer"])

    def predict(
        self, context: _Context, model_input: pandas.DataFrame, params: Mapping[str, object] | None = None
    ) -> list[float]:
        """Scores in the order of the rows."""
        return self.scorer.score(list(zip(model_input["instruction"], model_input["response"], strict=True)))


mlflow.models.set_model(CappyModel())
