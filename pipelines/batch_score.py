"""The pipeline that scores a dataset with a registered scorer: responses in, the same records with scores out."""

from collections.abc import Mapping, Sequence
from typing import Any

from kfp import dsl

from cappy.errors import ConfigError
from components.gathering import gathering
from components.preparation import preparation
from components.scoring import scoring
from components.tracking import tracking
from pipelines.dressing import Dress, plain
from pipelines.labelling import AT_ONCE, RUN, by_step, seed_of, shared


def plan(
    *,
    source: str = "",
    scorer: str = "models:/cappy@champion",
    seed: int = 0,
    split_seed: int | None = None,
    tracking_uri: str = "",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """The settings of each step for a person's choices; `settings` adds more of them, step by step.

    Rows are taken as they are: nothing is held out, and no reference is needed. `split_seed`, or else `seed`, is
    preparation's, which draws what templates leave to chance.
    """
    chosen: dict[str, dict[str, Any]] = {
        "preparation": {
            "source": source,
            "seed": seed_of(split_seed, seed),
            "unlabelled": True,
            "test": 0.0,
            "validation": 0.0,
        },
        "scoring": {"scorer": scorer},
    }
    found = {step: {**values, **(settings or {}).get(step, {})} for step, values in chosen.items()}
    if not found["preparation"]["source"]:
        remedy = "give source: FILE under parameters, or --set preparation.source=FILE"
        raise ConfigError(f"batch_score: no source: nothing to score; {remedy}")
    return found


def build(shards: Sequence[str] = ("",), dress: Dress = plain) -> Any:
    """The pipeline with its scores computed in these shards (i/N), and each task dressed for a platform."""

    @dsl.pipeline(name="cappy-batch-score", description="A dataset scored by a registered scorer.")  # type: ignore[untyped-decorator]
    def batch_score(
        source: str,
        scorer: str,
        split_seed: int = 0,
        preparation_settings: str = "",
        scoring_settings: str = "",
        gathering_settings: str = "",
        tracking_settings: str = "",
        preparation_fingerprint: str = "",
        scoring_fingerprint: str = "",
        gathering_fingerprint: str = "",
        fingerprints: str = "{}",
    ) -> None:
        """Chains the steps; the exit step tells MLflow what each did, also after a failure."""
        settings, prints = by_step(locals())
        last = tracking(fingerprints=fingerprints, settings=tracking_settings, run=RUN)
        last.set_caching_options(False)
        dress("tracking", last)
        with dsl.ExitHandler(last, name="batch-score"):
            prepared = preparation(source=source, seed=split_seed, **shared("preparation", settings, prints))
            dress("preparation", prepared)

            def one(**part: Any) -> Any:
                scored = scoring(
                    instances=prepared.outputs["instances"],
                    scorer=scorer,
                    **shared("scoring", settings, prints),
                    **part,
                )
                dress("scoring", scored)
                return scored.outputs["scored"]

            if len(shards) == 1:
                one()
                return
            with dsl.ParallelFor(list(shards), name="shards", parallelism=AT_ONCE) as shard:
                found = one(part=shard)
            gathered = gathering(parts=dsl.Collected(found), **shared("gathering", settings, prints))
            dress("gathering", gathered)

    return batch_score


batch_score = build()
