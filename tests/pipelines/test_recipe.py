"""Recipes: what is wrong with one is said with file, key and remedy, before anything is submitted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wording import assert_names, raises_naming

from cappy.config import build, decode
from cappy.deployment.step import KServeSettings
from cappy.errors import ConfigError, UnreachableError
from cappy.training.settings import TrainJobSettings
from pipelines.builder import build as built
from pipelines.builder import compile_pipeline as compiled
from pipelines.definitions import PIPELINES
from pipelines.planning import check, registry_of, settings_of, submission_of, work_of
from pipelines.preview import describe_graph, estimate_steps, to_json, to_text
from pipelines.recipe import Platform, Recipe, check_recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
PLACES = {"tracking_uri": "https://mlflow.example", "kubeflow": {"endpoint": "https://kubeflow.example"}}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_one_that_kubeflow_would_get(path: Path) -> None:
    recipe = read_recipe(path)
    assert len(list(built(recipe, "kubeflow").pipeline_spec.components)) > 3
    if path.stem not in ("adapt", "batch-score", "pretrain-minilm"):  # These are for a person to fill.
        check(recipe, "kubeflow")
        actual = path.read_text()
        assert_names(" ".join(actual.replace("#", " ").split()), "published number", "reproduced")


@pytest.mark.parametrize(
    ("overrides", "initial"),
    [
        ({}, "models:/mine@champion"),
        ({"finetuning": {"scorer": "another"}}, "another"),
        ({"evaluation": {"initial": ""}}, ""),
    ],
)
def test_adapt_reports_the_scorer_that_finetuning_starts_from(overrides: dict[str, Any], initial: str) -> None:
    settings = PIPELINES["adapt"].settings({"source": "tasks.jsonl", "scorer": "models:/mine@champion"}, overrides)
    assert settings["evaluation"]["initial"] == initial


def test_a_missing_scorer_is_one_error(tmp_path: Path) -> None:
    source = tmp_path / "tasks.jsonl"
    source.touch()
    recipe = check_recipe({"pipeline": "adapt", "parameters": {"source": str(source), "scorer": "absent"}})
    with pytest.raises(ConfigError, match="finetuning: --scorer: absent: no such file") as caught:
        check(recipe)
    assert "initial" not in str(caught.value)


def test_the_recipes_of_the_paper_are_those_of_the_paper() -> None:
    names = {path.stem for path in RECIPES.glob("*.yaml")}
    sizes = {f"bigbench45-flan-t5-{size}" for size in ("small", "base", "large", "xl", "xxl")}
    assert {"pretrain-360m", "promptsource11", *sizes} <= names
    for size in sizes:
        settings: Any = settings_of(read_recipe(RECIPES / f"{size}.yaml"))
        assert settings["finetuning"]["preset"] == "paper"
        assert settings["sampling"]["strategy"] == "paper17-leaky"
        assert size.removeprefix("bigbench45-") in settings["sampling"]["generator"][0]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"pipelin": "adapt"}, ("pipelin: ", "did you mean pipeline?")),
        ({"pipeline": "adopt"}, ("pipeline: ", "adapt", "got 'adopt'")),
        ({"pipeline": "adapt", "shards": 65}, ("shards: ", "64", "got 65")),
        ({"pipeline": "adapt", "resources": {"sampling": {"gpus": 1}}}, ("resources.sampling.gpus: ", "key")),
        ({"pipeline": "adapt", "resources": {"sampling": {"memroy": "1Gi"}}}, ("memroy", "did you mean memory?")),
        ({"pipeline": "adapt", "resources": {"sampling": {"memory": "1GB"}}}, ("sampling.memory: ", "'1GB'", "1.5Gi")),
        ({"pipeline": "adapt", "resources": {"sampling": {"cpu": "two"}}}, ("sampling.cpu: ", "'two'", "500m")),
        ({"pipeline": "adapt", "kubeflow": {"shared_memory": "much"}}, ("shared_memory: ", "'much'", "512Mi")),
        ({"pipeline": "adapt", "resources": {"pretraining": {}}}, ("resources.pretraining: adapt ", "step")),
        ({"pipeline": "adapt", "settings": {"tuning": {}}}, ("settings.tuning: adapt ", "did you mean finetuning")),
        ({"pipeline": "adapt", "vertex": {"bucket": "mine"}}, ("vertex.bucket: ", "got 'mine'")),
        ({"pipeline": "adapt", "shards": True}, ("shards: ", "whole number", "got True")),
        ({"pipeline": "adapt", "resources": {"sampling": {"hours": True}}}, ("sampling.hours: ", "number, got True")),
        ({"pipeline": "adapt", "resources": {"sampling": {"count": 2}}}, ("sampling: count: 2 ", "accelerator")),
        ({"pipeline": "adapt", "prices": {"gold": 1.0}}, ("prices.gold: ", "'nvidia-l4'", "got 'gold'")),
        ({"pipeline": "adapt", "prices": {"none": float("inf")}}, ("prices.none: ", "finite", "got inf")),
        ({"pipeline": "adapt", "settings": ["sampling"]}, ("settings: ", "keys", "got ['sampling']")),
    ],
)
def test_a_wrong_key_or_value_is_one_line(values: dict[str, Any], names: tuple[str, ...], tmp_path: Path) -> None:
    with raises_naming(ConfigError, *names) as caught:
        check_recipe(values, where="mine.yaml")
    assert str(caught.value).startswith("mine.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "given", "used"),
    [
        ("cpu", 2, "2"),
        ("cpu", 0.5, "500m"),
        ("cpu", "1.25", "1250m"),
        ("cpu", "3000m", "3"),
        ("memory", "1.5Gi", "1536Mi"),
        ("memory", "1.3Gi", "1332Mi"),
        ("memory", "2048Mi", "2Gi"),
    ],
)
def test_cores_and_memory_are_taken_as_people_write_them(key: str, given: object, used: str) -> None:
    recipe = check_recipe({"pipeline": "adapt", "resources": {"default": {key: given}}})
    assert getattr(recipe.resources_of("sampling"), key) == used
    for settings in (KServeSettings, TrainJobSettings):
        assert getattr(build(settings, {key: given}), key) == used


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a: [", ("not valid YAML",)),
        ("pipeline: adapt\nshards: 2\nshards: 3", ("shards", "twice", "line 3")),
        ("pipeline: adapt\n? [a]\n: 2", ("not valid YAML", "unhashable")),
        ("- a", ("expected keys",)),
        ("", ("expected keys",)),
        (None, ("cannot be read",)),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(text: str | None, names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with raises_naming(ConfigError, "mine.yaml", *names):
        read_recipe(path)


def test_a_wrong_parameter_and_a_wrong_setting_are_refused_without_a_registry() -> None:
    with raises_naming(ConfigError, "parameters: adapt ", "'sauce'", "source"):
        check(check_recipe({"pipeline": "adapt", "parameters": {"sauce": "builtin"}}))
    with pytest.raises(ConfigError, match=r"evaluation: --folds"):
        check(check_recipe({"pipeline": "adapt", "settings": {"evaluation": {"folds": 50}}}))
    with pytest.raises(ConfigError, match=r"sampling: --shard "):
        submission_of(check_recipe({"pipeline": "adapt", "settings": {"sampling": {"shard": "0/2"}}, "shards": 2}))


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"tracking_uri": ""}, ("tracking_uri: ", "cluster")),
        ({"tracking_uri": "sqlite:///mine.db"}, ("tracking_uri: ", "mine.db", "cluster")),
        ({"tracking_uri": "https://me:secret@mlflow.example"}, ("tracking_uri: ", "password")),
        (
            {"settings": {"registration": {"tracking_uri": "https://me:secret@mlflow.example"}}},
            ("settings.registration.tracking_uri: ", "password"),
        ),
        (
            {"settings": {"registration": {"tracking_uri": "sqlite:///mine.db"}}},
            ("settings.registration.tracking_uri: ", "cluster"),
        ),
        (
            {"parameters": {"generator": "vllm:/mine/llm", "strategy": "greedy"}},
            ("sampling: --generator: /mine/llm ", "under /data"),
        ),
        (
            {"parameters": {"generator": "recorded:/mine/samples.jsonl"}},
            ("sampling: --generator: /mine/samples.jsonl ", "under /data"),
        ),
        ({"parameters": {"generator": "recorded:/data/mine.jsonl"}}, ("/data/mine.jsonl", "revision:")),
        ({"parameters": {"source": "mine.jsonl"}}, ("preparation: --source: mine.jsonl ", "under /data")),
        ({"settings": {"preparation": {"templates": "mine"}}}, ("preparation: --templates: mine ", "under /data")),
        ({"parameters": {"source": "/data/mine.jsonl"}}, ("/data/mine.jsonl", "revision:")),
        ({"work": "/elsewhere"}, ("work: /elsewhere ", "under /data")),
    ],
)
def test_what_no_step_of_a_cluster_could_reach_is_refused(changed: dict[str, Any], names: tuple[str, ...]) -> None:
    with raises_naming(ConfigError, *names) as caught:
        submission_of(check_recipe({"pipeline": "pretrain", **PLACES, **changed}), "kubeflow")
    assert "secret@" not in str(caught.value)


def test_a_file_of_decodings_must_lie_where_the_steps_see_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("- greedy")
    recipe = check_recipe({"pipeline": "pretrain", **PLACES, "parameters": {"strategy": str(mine)}})
    with pytest.raises(ConfigError, match=r"sampling: --strategy: .*mine\.yaml .*under /data"):
        check(recipe, "kubeflow")
    check(recipe, "local")


def test_what_the_submitter_cannot_see_changes_the_fingerprints_through_the_revision(tmp_path: Path) -> None:
    values = {"pipeline": "pretrain", "parameters": {"source": "/data/mine.jsonl", "generator": []}, **PLACES}
    result = [
        submission_of(check_recipe({**values, "revision": revision}), "kubeflow").fingerprints
        for revision in ("1", "1", "2")
    ]
    assert result[0] == result[1]
    assert all(result[0][step] != result[2][step] for step in result[0])


def test_work_lies_where_every_step_of_the_platform_sees_it() -> None:
    recipe = check_recipe({"pipeline": "adapt", "vertex": {"bucket": "gs://mine"}, "kubeflow": {"mount": "/data"}})
    assert str(work_of(recipe, "local")) == ".cappy/work"
    assert str(work_of(recipe, "kubeflow")) == "/data/cappy"
    assert str(work_of(recipe, "vertex")) == "/gcs/mine/cappy"


def test_the_preview_adds_up() -> None:
    recipe = check_recipe(
        {
            "pipeline": "pretrain",
            "shards": 4,
            "prices": {"none": 0.1, "nvidia-l4": 2.0},
            "resources": {
                "default": {"hours": 10, "retries": 0},
                "sampling": {"accelerator": "nvidia-l4", "count": 2, "hours": 3, "retries": 1},
                "pretraining": {"accelerator": "nvidia-l4", "count": 8, "nodes": 3, "hours": 5, "retries": 0},
            },
        }
    )
    assert describe_graph(recipe) == (
        "preparation -> 4 x [sampling -> annotation] -> gathering -> pretraining -> evaluation -> registration"
    )
    costs = {line.step: line.cost for line in estimate_steps(recipe)}
    assert costs["sampling"] == pytest.approx(4 * 2 * 3 * 2.0)
    assert costs["annotation"] == pytest.approx(4 * 10 * 0.1)
    assert costs["pretraining"] == pytest.approx(3 * 8 * 5 * 2.0)
    machines = {line.step: line.machines for line in estimate_steps(recipe)}
    assert (machines["sampling"], machines["pretraining"], machines["evaluation"]) == (4, 3, 1)
    result: Any = to_json(recipe, "kubeflow")
    assert result["most_cost"] == pytest.approx(48 + 4 + 240 + 4 * 1.0)
    assert result["most_cost_with_retries"] == pytest.approx(result["most_cost"] + 48)
    assert_names(to_text(recipe, "kubeflow"), "at most 296.00", "344.00 with all retries")
    unpriced = check_recipe({"pipeline": "pretrain"})
    assert to_json(unpriced, "local")["most_cost"] is None
    assert_names(to_text(unpriced, "local"), "no price", "preparation")


def test_a_cluster_is_reported_its_own_address_and_this_machine_asks_at_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    recipe = check_recipe({"pipeline": "adapt", **PLACES})
    assert (registry_of(recipe, "kubeflow"), registry_of(recipe, "local")) == (
        "http://127.0.0.1:9",
        PLACES["tracking_uri"],
    )
    with pytest.raises(UnreachableError, match="127.0.0.1:9"):
        submission_of(recipe, "kubeflow")
    result = submission_of(check_recipe({"pipeline": "pretrain", **PLACES}), "kubeflow").arguments
    assert decode(str(result["registration_settings"]))["tracking_uri"] == PLACES["tracking_uri"]


@pytest.mark.parametrize("platform", ["kubeflow", "vertex"])
def test_training_in_its_own_pod_uses_all_of_its_accelerators(platform: Platform) -> None:
    recipe = {"pipeline": "adapt", "resources": {"finetuning": {"accelerator": "nvidia-l4", "count": 8}}}
    settings = settings_of(check_recipe(recipe), platform)
    assert settings["finetuning"]["devices"] == 8
    assert "launcher" not in settings["finetuning"]
    assert "devices" not in settings_of(check_recipe(recipe))["finetuning"], "this machine has those that it has"
    fewer = check_recipe({**recipe, "settings": {"finetuning": {"devices": 2}}})
    with raises_naming(ConfigError, "finetuning.count: 8", "devices is 2"):
        settings_of(fewer, platform)


def test_buckets_are_where_vertex_mounts_them_and_nowhere_else() -> None:
    recipe = check_recipe(
        {
            "pipeline": "adapt",
            "parameters": {"source": "gs://data/tasks.jsonl", "generator": ["gs://models/llm"]},
            "vertex": {"project": "p", "bucket": "gs://mine"},
            "revision": "1",
            **PLACES,
        }
    )
    settings = settings_of(recipe, "vertex")
    assert settings["preparation"]["source"] == "/gcs/data/tasks.jsonl"
    assert settings["sampling"]["generator"] == ["/gcs/models/llm"]
    check(recipe, "vertex")
    platform: Platform
    for platform in ("kubeflow", "local"):
        with raises_naming(ConfigError, "gs://data/tasks.jsonl", "preparation: --source"):
            check(recipe, platform)
    stored = check_recipe({"pipeline": "adapt", "parameters": {"source": "s3://data/tasks.jsonl"}})
    with raises_naming(ConfigError, "s3://data/tasks.jsonl", "/gcs/mine"):
        check(replace(recipe, parameters=stored.parameters), "vertex")


def test_two_registries_with_the_same_digest_share_work(tmp_path: Path) -> None:
    def fingerprints(image: str) -> object:
        place = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "work": str(tmp_path)}
        recipe = {"pipeline": "adapt", "images": {"worker": image, "trainer": image}, **place}
        return submission_of(check_recipe(recipe)).fingerprints

    digest = "sha256:" + "0" * 64
    assert fingerprints(f"one.example/worker@{digest}") == fingerprints(f"two.example/team/worker@{digest}")
    assert fingerprints("one.example/worker:1") != fingerprints("two.example/worker:1")


def test_training_on_several_nodes_is_a_job_of_the_platform_and_the_step_itself_has_no_accelerator() -> None:
    needs: dict[str, Any] = {"accelerator": "nvidia-h100-80gb", "count": 8, "nodes": 4, "hours": 48.0, "retries": 7}
    needs |= {"image": "mine:1", "machine_type": "a3-highgpu-8g"}
    cloud = {"project": "p", "region": "europe-west4", "bucket": "gs://mine", "service_account": "me@p"}
    cluster = {**PLACES["kubeflow"], "namespace": "team"}  # type: ignore[dict-item]
    places = {**PLACES, "vertex": {**cloud, "network": "projects/1/global/networks/n"}, "kubeflow": cluster}
    vertex = check_recipe({"pipeline": "adapt", "resources": {"finetuning": {**needs, "spot": True}}, **places})
    check(vertex, "vertex")
    actual = settings_of(vertex, "vertex")["finetuning"]
    job = {"nodes": 4, "devices": 8, "image": "mine:1", "max_restarts": 7, "timeout_hours": pytest.approx(45.6)}
    expected = {
        "launcher": "customjob",
        **job,
        "service_account": "me@p",
        "customjob": {
            "accelerator": "NVIDIA_H100_80GB",
            "project": "p",
            "region": "europe-west4",
            "bucket": "gs://mine",
            "network": "projects/1/global/networks/n",
            "machine": "a3-highgpu-8g",
            "spot": True,
        },
    }
    assert {name: actual[name] for name in expected} == expected
    del needs["machine_type"]
    needs |= {"cpu": "64", "memory": "512Gi"}
    kubeflow = check_recipe({"pipeline": "adapt", "resources": {"finetuning": needs}, **places})
    check(kubeflow, "kubeflow")
    actual = settings_of(kubeflow, "kubeflow")["finetuning"]
    expected = {
        "launcher": "trainjob",
        **job,
        "trainjob": {
            "cpu": "64",
            "memory": "512Gi",
            "volume": "cappy-work:/data",
            "accelerator": "nvidia.com/gpu",
            "namespace": "team",
            "runtime": "cappy-torch",
        },
    }
    assert {name: actual[name] for name in expected} == expected
    assert "launcher" not in settings_of(kubeflow, "local")["finetuning"]
    both: tuple[tuple[Recipe, Platform], ...] = ((vertex, "vertex"), (kubeflow, "kubeflow"))
    for recipe, platform in both:
        spec = compiled(recipe, platform)
        assert "H100" not in spec
        assert "nvidia.com/gpu" not in spec
    chosen = check_recipe(
        {
            "pipeline": "adapt",
            "settings": {"finetuning": {"runtime": "mine"}},
            "resources": {"finetuning": needs},
            **places,
        }
    )
    assert settings_of(chosen, "kubeflow")["finetuning"]["runtime"] == "mine"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"parameters": {"generator": 3}}, ("generator: ", "list", "got 3")),
        ({"parameters": {"source": "missing.jsonl"}}, ("preparation: --source: missing.jsonl: ",)),
        ({"settings": {"preparation": {"against": ["missing"]}}}, ("preparation: --against: missing: ",)),
        (
            {"settings": {"preparation": {"mixture": "t0", "local": "missing"}}},
            ("preparation: --local: missing: ",),
        ),
        ({"settings": {"sampling": {"target": "x"}}}, ("sampling: --target ", "leave it out")),
        ({"settings": {"evaluation": {"scorer": "builtin:tiny"}}}, ("evaluation: --scorer ", "leave it out")),
        ({"settings": {"annotation": {"work": "x"}}}, ("annotation: --work ", "leave it out")),
    ],
)
def test_what_the_pipeline_gives_and_what_is_not_there_are_refused(
    values: dict[str, Any], names: tuple[str, ...]
) -> None:
    with raises_naming(ConfigError, *names):
        check(check_recipe({"pipeline": "adapt", **values}))


def test_a_dataset_to_score_must_be_named() -> None:
    for values in ({}, {"parameters": {"source": ""}}):
        with raises_naming(ConfigError, "batch_score: ", "source", "--set preparation.source=FILE"):
            settings_of(check_recipe({"pipeline": "batch_score", **values}))
    named = check_recipe({"pipeline": "batch_score", "settings": {"preparation": {"source": "mine.jsonl"}}})
    assert settings_of(named)["preparation"]["source"] == "mine.jsonl"


def test_one_generator_may_be_named_without_a_list() -> None:
    settings = settings_of(check_recipe({"pipeline": "adapt", "parameters": {"generator": "builtin"}}))
    assert settings["sampling"]["generator"] == ["builtin"]


def test_a_recipe_that_does_not_say_where_the_platform_is_is_no_submission() -> None:
    with pytest.raises(ConfigError, match="kubeflow: .*endpoint"):
        check(check_recipe({"pipeline": "pretrain", "tracking_uri": "https://mlflow.example"}), "kubeflow")
    with raises_naming(ConfigError, "vertex: ", "project", "bucket"):
        check(check_recipe({"pipeline": "pretrain", "tracking_uri": "https://mlflow.example"}), "vertex")
