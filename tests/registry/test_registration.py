"""Registration: one version per content, whole, without pickles, with its card."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from calibrations import straight
from wording import assert_names, raises_naming

from cappy import registry
from cappy.errors import FolderError, RecordError, RegistryError
from cappy.evaluation.crossfit import read_out_of_fold
from cappy.evaluation.findings import OUT_OF_FOLD
from cappy.records import Manifest, read_manifest
from cappy.records.folder import describe_files, sha256_of, verify, write_manifest
from cappy.scoring.calibration import read_calibration, read_verification_pairs
from cappy.selection import Selector, read_selector
from cappy.selection.linear import SELECTOR, Rule


def test_the_same_scorer_twice_is_one_version_with_the_alias_challenger(env: Any) -> None:
    scorer = env.scorer("a")
    report = env.report("report", scorer)
    first = env.register(scorer, report, pipeline_run="run-1")
    second = env.register(scorer, report, pipeline_run="run-2")
    assert first == second
    assert (first["version"], first["alias"], first["uri"]) == (1, "challenger", "models:/cappy/1")
    assert first["manifest_hash"] == read_manifest(scorer).hash


def test_another_scorer_is_another_version_and_takes_the_alias(env: Any, registered: Any) -> None:
    registered("a", 1.0)
    registered("b", 2.0)
    result = registry.resolve("models:/cappy@challenger", tracking_uri=env.uri)
    assert result.number == 2
    assert registry.resolve("models:/cappy/1", tracking_uri=env.uri).aliases == ()


def test_version_json_says_which_version_it_is(env: Any, registered: Any) -> None:
    registered("a")
    actual = json.loads((env.folder / "version-0" / "version.json").read_text())
    assert actual["uri"] == "models:/cappy/1"
    verify(env.folder / "version-0")


def test_a_champion_that_is_registered_again_stays_champion(env: Any, registered: Any) -> None:
    scorer, report = registered("a")
    env.promote(report)
    assert env.register(scorer, report)["alias"] == "champion"
    assert registry.resolve("models:/cappy@champion", tracking_uri=env.uri).aliases == ("champion",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "deep/extra.pkl", "last.ckpt"])
def test_a_pickle_among_the_files_is_refused(env: Any, name: str) -> None:
    scorer = env.scorer("a")
    (scorer / name).parent.mkdir(exist_ok=True)
    (scorer / name).write_bytes(b"\x80\x04.")
    with pytest.raises(FolderError, match=Path(name).name):
        env.register(scorer, env.report("report", scorer))


def test_a_damaged_scorer_is_refused(env: Any) -> None:
    scorer = env.scorer("a")
    report = env.report("report", scorer)
    (scorer / "model.safetensors").write_bytes(b"other")
    with raises_naming(FolderError, "model.safetensors", "damaged"):
        env.register(scorer, report)


def test_a_report_on_another_scorer_is_refused(env: Any) -> None:
    one, other = env.scorer("a", 1.0), env.scorer("b", 2.0)
    with raises_naming(FolderError, "another scorer", read_manifest(one).hash[:12], read_manifest(other).hash[:12]):
        env.register(one, env.report("report", other))


def test_the_version_has_card_signature_report_and_no_pickle(env: Any, registered: Any) -> None:
    registered("a")
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    card = (source / "MODEL_CARD.md").read_text()
    assert "| selector | 50.0 | 40.0 to 60.0 |" in card
    assert "The scorer beats random choice." in card
    described = (source / "MLmodel").read_text()
    assert all(word in described for word in ("instruction", "response", "score", "model_code_path"))
    names = [path.name for path in source.parent.rglob("*") if path.is_file()]
    assert "report.json" in names
    assert not any(name.endswith((".pkl", ".bin", ".pickle")) for name in names)


def test_a_report_on_a_mixture_of_metrics_is_registered(env: Any) -> None:
    scorer = env.scorer("a")
    report = env.report("report", scorer, metric="0.5*rougeL+0.5*exact_match")
    assert env.register(scorer, report)["version"] == 1


def test_files_that_are_gone_from_the_store_are_put_back(env: Any, registered: Any) -> None:
    scorer, report = registered("a")
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    (source / "artifacts" / "scorer" / "model.safetensors").unlink()
    assert env.register(scorer, report)["version"] == 1
    verify(registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models"))


def test_a_file_that_is_damaged_in_the_store_is_put_there_again(env: Any, registered: Any) -> None:
    scorer, report = registered("a")
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    stored = source / "artifacts" / "scorer" / "model.safetensors"
    whole = stored.read_bytes()
    stored.unlink()  # not written over: the store may have linked it to the scorer's own
    stored.write_bytes(bytes([whole[0] ^ 1, *whole[1:]]))
    with raises_naming(RegistryError, "artifacts/scorer/model.safetensors", "damaged"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    assert env.register(scorer, report)["version"] == 1
    verify(registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models"))


def test_a_scorer_with_a_file_that_its_manifest_does_not_list_is_not_registered(env: Any) -> None:
    scorer = env.scorer("a")
    (scorer / "notes.txt").write_text("private")
    with raises_naming(FolderError, "notes.txt", "manifest.json"):
        env.register(scorer, env.report("report", scorer))


@pytest.mark.parametrize("name", ["special_tokens_map.json", "deep/added_tokens.json"])
def test_a_cached_version_with_a_file_more_is_downloaded_again(env: Any, name: str) -> None:
    scorer = env.scorer("a")
    env.register(scorer, env.report("report", scorer))
    places = {"tracking_uri": env.uri, "cache": env.folder / "models"}
    folder = registry.download("models:/cappy@challenger", **places)
    whole = sorted(path.name for path in folder.iterdir())
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert sorted(path.name for path in registry.download("models:/cappy@challenger", **places).iterdir()) == whole


def test_a_file_that_was_laid_beside_a_version_in_the_store_is_refused(env: Any) -> None:
    scorer = env.scorer("a")
    env.register(scorer, env.report("report", scorer))
    (stored,) = (path.parent for path in env.folder.rglob("artifacts/scorer/manifest.json"))
    (stored / "special_tokens_map.json").write_text("{}")
    with raises_naming(RegistryError, "special_tokens_map.json", "register the scorer again"):
        registry.download("models:/cappy@challenger", tracking_uri=env.uri, cache=env.folder / "models")


def test_files_in_folders_of_the_scorer_are_registered_too(env: Any) -> None:
    scorer = env.scorer("a")
    (scorer / "tokenizer").mkdir()
    (scorer / "tokenizer" / "vocab.json").write_text("{}")
    write_manifest(scorer, Manifest(step="finetuning", files=describe_files(scorer)))
    report = env.report("report", scorer)
    env.register(scorer, report)
    assert env.register(scorer, report)["version"] == 1
    folder = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    assert (folder / "tokenizer" / "vocab.json").read_text() == "{}"


def calibrated(report: Path, top: float = 0.9) -> Path:
    (report / "calibration.json").write_text(straight({1: top}, low=0.1).to_json())
    write_manifest(report, Manifest(step="evaluation", files=describe_files(report)))
    return report


def selecting(report: Path, weight: float) -> Path:
    """The report with a selector of its own."""
    rules = (Rule(features=("score", "mbr"), weights=(1.0, weight)),)
    (report / SELECTOR).write_text(Selector(rules=rules, metric="rougeL", groups=99, evidence="held-out").to_json())
    values = json.loads((report / "report.json").read_text())
    values["selector_hashes"] = {"challenger": sha256_of(report / SELECTOR)}
    (report / "report.json").write_text(json.dumps(values))
    write_manifest(report, Manifest(step="evaluation", files=describe_files(report)))
    return report


def test_the_selector_travels_with_the_scorer_and_another_one_is_another_version(env: Any) -> None:
    scorer = env.scorer("a")
    first = selecting(env.report("report", scorer), 0.5)
    assert env.register(scorer, first)["version"] == 1
    assert env.register(scorer, first)["version"] == 1
    assert env.register(scorer, selecting(env.report("other", scorer), 2.0))["version"] == 2
    for number, weight in ((1, 0.5), (2, 2.0)):
        folder = registry.download(f"models:/cappy/{number}", tracking_uri=env.uri, cache=env.folder / "models")
        assert read_selector(folder).rule(frozenset({"score", "mbr"})).weights == (1.0, weight)
    card = next(env.folder.rglob("MODEL_CARD.md")).read_text()
    assert "## How it picks" in card
    assert "score 1, mbr" in card


def test_a_report_on_another_selector_promotes_nothing(env: Any) -> None:
    scorer = env.scorer("a")
    registered = selecting(env.report("report", scorer), 0.5)
    env.register(scorer, registered)
    assert env.promote(selecting(env.report("other", scorer), 2.0))["decision"] == "hold"
    decision = env.promote(selecting(env.report("third", scorer), 2.0))
    assert_names(decision["reasons"][0], "another selector", "version 1")
    assert env.promote(registered)["decision"] == "promote"


def test_a_calibration_that_an_earlier_evaluation_left_is_not_taken(env: Any) -> None:
    scorer = env.scorer("a")
    report = env.report("report", scorer)
    (report / "calibration.json").write_text("left by another")
    env.register(scorer, report)
    folder = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    assert read_calibration(folder) is None


def expected_label_of_one(env: Any) -> list[float]:
    """What the first version's calibration, as a service downloads it, expects of a score of 1."""
    folder = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    result = read_calibration(folder)
    assert result is not None
    return result.apply([1.0], n=1)


@pytest.mark.parametrize("lost", ["calibration.json", "model.safetensors"])
def test_a_version_that_lost_a_file_is_mended_by_registering_it_again_with_another_report(env: Any, lost: str) -> None:
    scorer = env.scorer("a")
    env.register(scorer, calibrated(env.report("report", scorer)))
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    (source / "artifacts" / "scorer" / lost).unlink()
    env.register(scorer, calibrated(env.report("later", scorer), top=0.7))
    assert expected_label_of_one(env) == [0.7]


def test_the_out_of_fold_scores_of_a_cross_fitted_report_travel_with_the_version(env: Any) -> None:
    scorer = env.scorer("a")
    report = env.report("report", scorer, folds=5)
    (report / OUT_OF_FOLD).write_text('{"metric": "rougeL", "folds": 5, "leaks": 0, "scores": {"ab": [0.5, 1.0]}}')
    write_manifest(report, Manifest(step="evaluation", files=describe_files(report)))
    env.register(scorer, report)
    folder = registry.download("models:/cappy@challenger", tracking_uri=env.uri, cache=env.folder / "models")
    result = read_out_of_fold(folder)
    assert result is not None
    assert result.scores == {"ab": [0.5, 1.0]}
    assert registry.resolve("models:/cappy/1", tracking_uri=env.uri).tags["cappy.evidence"] == "recipe"


def test_a_new_report_on_a_version_replaces_what_the_old_one_left(env: Any) -> None:
    scorer = env.scorer("a")
    env.register(scorer, calibrated(env.report("report", scorer), top=0.9))
    env.register(scorer, calibrated(env.report("later", scorer), top=0.7))
    assert expected_label_of_one(env) == [0.7]


def test_the_calibration_of_the_evaluation_travels_with_the_scorer(env: Any) -> None:
    scorer = env.scorer("a")
    env.register(scorer, calibrated(env.report("report", scorer)))
    cache = env.folder / "models"
    for _ in ("from the store", "from the cache"):
        folder = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=cache)
        result = read_calibration(folder)
        assert result is not None
        assert result.apply([0.5], n=1) == [0.5]


def test_one_scorer_with_two_calibrations_is_kept_twice_and_fetched_once_each(env: Any) -> None:
    scorer, cache = env.scorer("a"), env.folder / "models"
    for name, top in (("careful", 0.7), ("bold", 0.9)):
        env.register(scorer, calibrated(env.report(f"report-{name}", scorer), top=top), name=name)
    env.register(scorer, env.report("report-plain", scorer), name="plain")
    names = ("careful", "bold", "plain")
    first = {name: registry.download(f"models:/{name}/1", tracking_uri=env.uri, cache=cache) for name in names}
    for name in names:
        source = registry.resolve(f"models:/{name}/1", tracking_uri=env.uri).source
        shutil.rmtree(source.removeprefix("file://"))
    again = {name: registry.download(f"models:/{name}/1", tracking_uri=env.uri, cache=cache) for name in names}
    assert again == first
    result = [read_calibration(folder) for folder in again.values()]
    assert [one and one.apply([1.0], n=1) for one in result] == [[0.7], [0.9], None]


def probed(report: Path, score: float = 0.5) -> Path:
    (report / "probe.json").write_text(json.dumps([["who", "a bird", score]]))
    write_manifest(report, Manifest(step="evaluation", files=describe_files(report)))
    return report


def test_the_stored_pairs_of_the_evaluation_travel_with_the_scorer_and_its_calibration(env: Any) -> None:
    scorer = env.scorer("a")
    report = probed(calibrated(env.report("report", scorer)))
    assert env.register(scorer, report)["version"] == 1
    assert env.register(scorer, report)["version"] == 1
    folder = registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")
    assert read_verification_pairs(folder) == [("who", "a bird", 0.5)]
    assert read_calibration(folder) is not None
    assert read_manifest(folder).hash == read_manifest(scorer).hash


def test_one_scorer_with_two_evaluations_keeps_the_stored_pairs_of_each(env: Any) -> None:
    scorer, cache = env.scorer("a"), env.folder / "models"
    for name, score in (("one", 0.25), ("other", 0.75)):
        env.register(scorer, probed(env.report(f"report-{name}", scorer), score), name=name)
    result = [registry.download(f"models:/{name}/1", tracking_uri=env.uri, cache=cache) for name in ("one", "other")]
    assert [read_verification_pairs(folder)[0][2] for folder in result] == [0.25, 0.75]


@pytest.mark.parametrize("text", ["[]", None], ids=["changed", "gone"])
def test_other_stored_pairs_than_were_registered_are_refused(env: Any, text: str | None) -> None:
    scorer = env.scorer("a")
    env.register(scorer, probed(env.report("report", scorer)))
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    path = source / "artifacts" / "scorer" / "probe.json"
    path.unlink() if text is None else path.write_text(text)
    with raises_naming(RegistryError, "models:/cappy/1", "probe.json", "register it again"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")


@pytest.mark.parametrize("text", ["{", "[[1, 2, 3]]", '[["a", "b"]]', '[["a", "b", "c"]]', "7"])
def test_stored_pairs_that_are_none_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "probe.json").write_text(text)
    with raises_naming(FolderError, "probe.json", "evaluate again", "delete it"):
        read_verification_pairs(tmp_path)


@pytest.mark.parametrize("text", ["{}", None], ids=["changed", "gone"])
def test_another_calibration_than_was_registered_is_refused(env: Any, text: str | None) -> None:
    scorer = env.scorer("a")
    env.register(scorer, calibrated(env.report("report", scorer)))
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    path = source / "artifacts" / "scorer" / "calibration.json"
    path.unlink() if text is None else path.write_text(text)
    with raises_naming(RegistryError, "models:/cappy/1", "calibration.json", "register it again"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")


def test_a_calibration_that_somebody_added_is_refused(env: Any, registered: Any) -> None:
    registered("a")
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    (source / "artifacts" / "scorer" / "calibration.json").write_text("{}")
    with raises_naming(RegistryError, "calibration.json", "registered none", "register it again"):
        registry.download("models:/cappy/1", tracking_uri=env.uri, cache=env.folder / "models")


def test_the_card_says_what_the_scorer_is_for_and_what_nobody_stated(env: Any) -> None:
    scorer = env.scorer("a")
    report = env.report("report", scorer, next="Promote: it is better.", calibration={"raw": {"ece": 0.05}})
    env.register(scorer, report)
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    card = (source / "MODEL_CARD.md").read_text()
    assert_names(card, "not judge truth", "Promote: it is better.", "5.0 uncalibrated", "not stated")
    assert "license: other" in card


def test_a_stated_licence_stands_in_the_card(env: Any) -> None:
    scorer = env.scorer("a")
    env.register(scorer, env.report("report", scorer), licence="mit")
    source = Path(registry.resolve("models:/cappy/1", tracking_uri=env.uri).source.removeprefix("file://"))
    assert "license: mit" in (source / "MODEL_CARD.md").read_text()


def test_a_report_of_a_newer_schema_registers_nothing(env: Any) -> None:
    scorer = env.scorer("a")
    with raises_naming(RecordError, "schema 99", "update cappy"):
        env.register(scorer, env.report("report", scorer, schema=99))
    with pytest.raises(RegistryError, match="no such model"):
        registry.resolve("models:/cappy/1", tracking_uri=env.uri)


def test_a_version_that_another_tool_made_with_our_tag_does_not_stand_for_ours(env: Any) -> None:
    from cappy.records import read_manifest
    from cappy.registry.client import connect

    scorer = env.scorer("a")
    with connect(env.uri) as client:
        client.create_registered_model("cappy")
        tags = {"cappy.manifest": read_manifest(scorer).hash}
        client.create_model_version("cappy", source="file:///elsewhere/model", tags=tags)
    assert env.register(scorer, env.report("report", scorer))["version"] == 2
