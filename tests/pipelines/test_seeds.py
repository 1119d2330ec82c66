"""Seeds of the split, of sampling and of training: each changes its own step and those after it, nothing before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wording import raises_naming

from cappy.config import build, result_settings
from cappy.errors import ConfigError
from cappy.steps import STEP_SPECS, work_key
from cappy.worker import config_class
from pipelines.builder import build_pipeline
from pipelines.customize import customize_nothing
from pipelines.definitions import PIPELINES, shards_of
from pipelines.planning import plan_settings, settings_of
from pipelines.recipe import check_recipe
from pipelines.submission import Submission, prepare

FIRST = {
    "split_seed": "preparation",
    "sampling_seed": "sampling",
    "training_seed": ("pretraining", "finetuning"),
}
"""Seed -> the first step that may change with it."""
NEEDED: Mapping[str, Mapping[str, Any]] = {
    "adapt": {},
    "pretrain": {},
    "evaluate": {"scorer": "builtin:tiny"},
    "batch_score": {"source": "builtin", "scorer": "builtin:tiny"},
}
PARAMETERS: Mapping[str, set[str]] = {
    "adapt": {
        *("source", "generator", "strategy", "scorer", "champion", "metric", "name", "margin"),
        *("split_seed", "sampling_seed", "training_seed"),
    },
    "pretrain": {
        *("source", "generator", "strategy", "champion", "metric", "name"),
        *("split_seed", "sampling_seed", "training_seed"),
    },
    "evaluate": {"source", "generator", "strategy", "champion", "metric", "split_seed", "sampling_seed"},
    "batch_score": {"source", "scorer", "split_seed"},
}
CASES = [(name, seed) for name in PIPELINES for seed in FIRST if seed in PARAMETERS[name]]


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """submitted("adapt", training_seed=1) -> what a run with these parameters hands to an orchestrator."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def submit(name: str, **parameters: Any) -> Submission:
        steps = plan_settings(name, {**NEEDED[name], **parameters}, {})
        return prepare(name, steps, work=tmp_path / "work")

    return submit


def reached(submission: Submission, step: str) -> dict[str, Any]:
    """All that an orchestrator gives to a step, which is what its cache looks at."""
    names = [*STEP_SPECS[step].parameters.values(), f"{step}_settings", f"{step}_fingerprint"]
    return {name: submission.arguments.get(name) for name in names}


def keys(name: str, **parameters: Any) -> dict[str, str]:
    """The name of the work of each step, its inputs aside."""
    result = {}
    for step, values in plan_settings(name, {**NEEDED[name], **parameters}, {}).items():
        config = build(
            config_class(step), {**values, **{artifact: Path("x") for artifact in STEP_SPECS[step].artifacts}}
        )
        result[step] = work_key(step, result_settings(config)).name
    return result


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_another_seed_does_nothing_again_that_stands_before_its_step(submitted: Any, name: str, seed: str) -> None:
    """Another training seed neither splits nor samples nor labels again; another sampling seed does not split again."""
    one, other = submitted(name), submitted(name, **{seed: 1})
    steps = list(PIPELINES[name].steps)
    changed = next(index for index, step in enumerate(steps) if step in FIRST[seed])
    for step in steps[:changed]:
        assert one.fingerprints[step] == other.fingerprints[step], step
        assert reached(one, step) == reached(other, step), step
        assert keys(name)[step] == keys(name, **{seed: 1})[step], step
    for step in steps[changed:]:
        assert one.fingerprints[step] != other.fingerprints[step], step
    own = steps[changed]
    assert [step for step in steps if keys(name)[step] != keys(name, **{seed: 1})[step]] == [own]


@pytest.mark.parametrize("name", list(PIPELINES))
def test_one_seed_stands_for_every_kind_of_draw_that_has_none_of_its_own(name: str) -> None:
    def seeds(**parameters: Any) -> dict[str, Any]:
        steps = plan_settings(name, {**NEEDED[name], **parameters}, {})
        return {step: values["seed"] for step, values in steps.items() if "seed" in values}

    assert set(seeds().values()) == {0}
    assert set(seeds(seed=7).values()) == {7}
    if name != "batch_score":  # It has one kind of draw: `seed` would be idle.
        assert seeds(seed=7, split_seed=0)["preparation"] == 0
    assert seeds(split_seed=3)["preparation"] == 3
    assert [seed for step, seed in seeds(split_seed=3).items() if step != "preparation"] == [0] * (len(seeds()) - 1)
    assert "evaluation" not in seeds(seed=7), "the bootstrap keeps its own"


@pytest.mark.parametrize("name", ["adapt", "pretrain", "evaluate"])
def test_the_bootstraps_seed_is_evaluations_own(submitted: Any, name: str) -> None:
    own = plan_settings(name, NEEDED[name], {"evaluation": {"seed": 5}})
    assert own["evaluation"]["seed"] == 5
    one, other = submitted(name), prepare(name, own, work=Path("work").absolute())
    changed = [step for step in one.fingerprints if one.fingerprints[step] != other.fingerprints[step]]
    assert changed[0] == "evaluation"


def test_a_recipe_names_each_seed() -> None:
    parameters = {"seed": 1, "training_seed": 2}
    settings = settings_of(check_recipe({"pipeline": "adapt", "parameters": parameters}))
    assert [settings[step]["seed"] for step in ("preparation", "sampling", "finetuning")] == [1, 1, 2]
    with raises_naming(ConfigError, "parameters: evaluate ", "'training_seed'", "sampling_seed"):
        settings_of(check_recipe({"pipeline": "evaluate", "parameters": {"training_seed": 1}}))


@pytest.mark.parametrize("name", list(PIPELINES))
def test_the_parameters_of_a_compiled_pipeline_are_those_that_the_guide_names(name: str) -> None:
    spec = build_pipeline(PIPELINES[name], shards_of(1), customize_nothing).pipeline_spec
    known = spec.root.input_definitions.parameters
    chosen = {one for one in known if not one.endswith(("_settings", "_fingerprint", "fingerprints"))}
    assert chosen == PARAMETERS[name]
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "pipelines.md").read_text()
    (row,) = (line for line in guide.splitlines() if line.startswith(f"| `{name}` | `source`"))
    assert {word for word in row.split("`") if word.isidentifier()} - {name} == chosen


@pytest.mark.parametrize(
    ("name", "parameters", "settings", "idle"),
    [
        ("adapt", {"scorer": "mine"}, {"finetuning": {"scorer": "other"}}, "scorer: 'mine'"),
        ("adapt", {"training_seed": 1}, {"finetuning": {"seed": 2}}, "training_seed: 1"),
        ("adapt", {"seed": 4, "split_seed": 1, "sampling_seed": 2, "training_seed": 3}, {}, "seed: 4"),
        ("evaluate", {"metric": "chrf"}, {"annotation": {"metric": "x"}, "evaluation": {"metric": "x"}}, "metric:"),
        ("batch_score", {"source": "a", "scorer": "b"}, {"scoring": {"scorer": "c"}}, "scorer: 'b'"),
        ("batch_score", {"source": "a"}, {"preparation": {"source": "c"}}, "source: 'a'"),
    ],
)
def test_a_parameter_that_settings_leave_without_effect_is_refused(
    name: str, parameters: dict[str, Any], settings: dict[str, Any], idle: str
) -> None:
    with pytest.raises(ConfigError, match=f"^parameters: {idle}.* no effect"):
        plan_settings(name, parameters, settings)


def test_parameters_that_say_their_default_or_that_settings_change_in_part_are_taken() -> None:
    plan_settings("adapt", {"generator": ["builtin"], "scorer": "builtin"}, {"finetuning": {"scorer": "other"}})
    plan_settings("adapt", {"seed": 3, "metric": "chrf"}, {"finetuning": {"seed": 2, "metric": "rougeL"}})
    plan_settings("adapt", {"margin": 0.1, "name": "mine"}, {"promotion": {"tracking_uri": "x"}})


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_run_started_by_hand_has_the_choices_of_the_pipelines_definition(name: str) -> None:
    """In the interface of Kubeflow: what a person leaves as it is must be what `cappy pipeline run` takes."""
    definition = PIPELINES[name]
    inputs = build_pipeline(definition, shards_of(1), customize_nothing).pipeline_spec.root.input_definitions.parameters
    for choice, default in definition.parameters.items():
        if default in (None, "") or choice not in inputs:
            continue
        value = inputs[choice].default_value
        stated = list(value.list_value) if value.HasField("list_value") else getattr(value, value.WhichOneof("kind"))
        assert stated == default, choice
    needed = {one for one, each in inputs.items() if not each.is_optional}
    assert needed == ({"source"} if name == "batch_score" else set())
