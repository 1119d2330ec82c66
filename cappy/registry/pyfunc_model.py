"""The scorer as MLflow's own server loads it (`mlflow models serve`): code by path, so that nothing is pickled."""

from typing import Any

import mlflow
import pandas  # type: ignore[import-untyped]


class CappyModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc] # MLflow is untyped
    """Rows of instruction and response in, one score each out."""

    def load_context(self, context: Any) -> None:
        """Loads the scorer, its files verified."""
        from cappy.scoring import Scorer

        self.scorer = Scorer.load(context.artifacts["scorer"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> list[float]:
        """Scores in the order of the rows."""
        return self.scorer.score(list(zip(model_input["instruction"], model_input["response"], strict=True)))


mlflow.models.set_model(CappyModel())
