"""The scorer as an MLflow pyfunc model (`mlflow models serve`), loaded from code so that nothing is pickled."""

from collections.abc import Mapping
from typing import Protocol

import mlflow
import pandas  # type: ignore[import-untyped]


class _Context(Protocol):
    """The part of MLflow's `PythonModelContext` that is used here: paths of artifacts by name."""

    artifacts: Mapping[str, str]


class CappyModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc] # MLflow is untyped
    """Scores rows with the columns instruction and response."""

    def load_context(self, context: _Context) -> None:
        """Loads the scorer and verifies its files."""
        from cappy.scoring import Scorer

        self.scorer = Scorer.load(context.artifacts["scorer"])

    def predict(
        self, context: _Context, model_input: pandas.DataFrame, params: Mapping[str, object] | None = None
    ) -> list[float]:
        """One score per row, in order."""
        return self.scorer.score(list(zip(model_input["instruction"], model_input["response"], strict=True)))


mlflow.models.set_model(CappyModel())
