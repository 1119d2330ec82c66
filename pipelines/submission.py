"""Makes the arguments of a pipeline run from the settings of each step: checks them, resolves aliases, hashes inputs.

An orchestrator's cache compares strings, not the contents behind them. Therefore each step has a fingerprint parameter:
the digest of the key of its work (`cappy.steps`), which includes the content of every file, folder and model version in
its settings. So the cache is not used after a file was edited, an alias was moved or a step got a new version.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cappy.config import build, encode, fingerprint, result_settings
from cappy.errors import ConfigError, Problems, quote
from cappy.records.folder import MANIFEST, describe_files, sha256_of, verify
from cappy.redaction import has_secret
from cappy.runs import read_record
from cappy.steps import STEP_SPECS, work_key
from cappy.worker import StepConfig, config_class
from pipelines.definitions import MAX_SHARDS, PIPELINES, Settings, StepSettings, shards_of


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready for an orchestrator; `fingerprints` has one entry per step, or per shard."""

    pipeline: str
    arguments: Mapping[str, object]
    fingerprints: Mapping[str, str]
    tracking_uri: str = ""
    shards: int = 1


def prepare(
    pipeline: str,
    steps: Mapping[str, StepSettings],
    *,
    work: Path,
    shards: int = 1,
    tracking_uri: str = "",
    revision: str = "",
    registry: str = "",
    images: Mapping[str, str] | None = None,
) -> Submission:
    """Prepares the submission of a pipeline with these settings by step; raises ConfigError if a setting is invalid.

    Aliases are resolved to versions, and the content of every file is part of a fingerprint. `revision` stands for
    content that this machine cannot see, such as files on a cluster's volume. `registry` is MLflow's address for this
    machine, if it differs from the steps' `tracking_uri`. `images` are the image ids by step.
    """
    if pipeline not in PIPELINES:
        raise ConfigError(f"{quote(pipeline)}: no such pipeline; choose one of {', '.join(PIPELINES)}")
    if not 1 <= shards <= MAX_SHARDS:
        raise ConfigError(f"{pipeline}: {shards} shards; give 1 to {MAX_SHARDS}")
    names = PIPELINES[pipeline].steps_in(shards)
    if unknown := set(steps) - set(names):
        raise ConfigError(f"{pipeline}: has no step {', '.join(sorted(unknown))}")
    refuse_artifacts(pipeline, steps)
    shared = {"work": str(work.absolute())}
    address = str(steps.get("registration", {}).get("tracking_uri", "")) or tracking_uri
    steps = {step: _without_secret(step, values, address) for step, values in steps.items()}
    settings_by_step = {step: {**steps.get(step, {}), **shared} for step in names}
    registry = registry or address
    settings = resolve_settings(settings_by_step, work=work, tracking_uri=registry, revision=revision, images=images)
    digests = fingerprints(settings, tracking_uri=registry, revision=revision, images=images)
    by_shard = _by_shard(digests, shards)
    return Submission(
        pipeline=pipeline,
        arguments=arguments(
            settings, digests, by_shard, {**shared, "tracking_uri": "" if has_secret(address) else address}
        ),
        fingerprints=by_shard,
        tracking_uri=address,
        shards=shards,
    )


def _without_secret(step: str, values: StepSettings, address: str) -> StepSettings:
    """The settings without an MLflow address that contains a password, since arguments are stored in many places.

    Steps get the run's own address in MLFLOW_TRACKING_URI; raises ConfigError for any other address with a password.
    """
    step_address = str(values.get("tracking_uri", ""))
    if not has_secret(step_address):
        return values
    if step_address != address:
        remedy = "give one address for all steps: --tracking-uri, or MLFLOW_TRACKING_URI"
        raise ConfigError(f"{step}: --tracking-uri: holds a password and differs from the run's address; {remedy}")
    return {**values, "tracking_uri": ""}


def refuse_artifacts(pipeline: str, steps: Mapping[str, StepSettings]) -> None:
    """Raises ConfigError for a setting that the pipeline sets itself, since it would be ignored silently."""
    for step, values in steps.items():
        for name in sorted({*STEP_SPECS[step].artifacts, "work"} & set(values)):
            # Evaluation's scorer is an artifact in pipelines that train one, and a setting in `evaluate`.
            if (step, name, pipeline) != ("evaluation", "scorer", "evaluate"):
                raise ConfigError(f"{step}: --{name} is set by the pipeline; leave it out of settings and --set")
        if STEP_SPECS[step].sharded and values.get("shard"):
            remedy = "give the number of shards with shards: in the recipe, or --shards"
            raise ConfigError(f"{step}: --shard is set by the pipeline; {remedy}")


def _by_shard(digests: Mapping[str, str], shards: int) -> dict[str, str]:
    """The fingerprints under which steps and shards write their records; a shard's key is for example `sampling 0/4`.

    Entries are in the order in which they run: shard by shard, each with its steps in order.
    """
    if shards == 1:
        return dict(digests)
    sharded = [step for step in digests if STEP_SPECS[step].sharded]
    by_shard = {f"{step} {shard}": f"{digests[step]}-{shard}" for shard in shards_of(shards) for step in sharded}
    before = list(digests)[: list(digests).index(sharded[0])]
    after = [step for step in digests if step not in (*before, *sharded)]
    return {**{step: digests[step] for step in before}, **by_shard, **{step: digests[step] for step in after}}


def arguments(
    settings: Mapping[str, StepSettings],
    digests: Mapping[str, str],
    by_shard: Mapping[str, str],
    tracking: Mapping[str, str],
) -> dict[str, object]:
    """The arguments of the pipeline function by name; the pipeline itself passes each shard its name."""
    values: dict[str, object] = {}
    for step, step_settings in settings.items():
        for name, parameter in STEP_SPECS[step].parameters.items():
            if name not in step_settings:
                continue
            value = step_settings[name]
            if values.setdefault(parameter, value) != value:
                different_values = f"{quote(values[parameter])} and {quote(value)}"
                raise ConfigError(f"{step}: --{name} must be the same for the whole pipeline, got {different_values}")
        values[f"{step}_settings"] = encode(
            {key: value for key, value in step_settings.items() if key not in STEP_SPECS[step].parameters}
        )
        values[f"{step}_fingerprint"] = digests[step]
    tracking_settings = {name: value for name, value in tracking.items() if value}
    return {**values, "tracking_settings": encode(tracking_settings), "fingerprints": json.dumps(by_shard)}


def fingerprints(
    settings: Mapping[str, StepSettings],
    *,
    tracking_uri: str = "",
    revision: str = "",
    images: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Step -> digest of the key of its work (`cappy.steps`).

    It covers the versions, settings, images and external content of this step and of all steps before it.
    `revision` stands for external content that this machine cannot see, `images` are the image ids by step.
    Raises ConfigError if a setting is invalid, so that a run does not fail only after its training.
    """
    digests: dict[str, str] = {}
    upstream = revision
    for step, config in configs(settings).items():
        values = settings[step]
        external = _hash_external(step, values, tracking_uri)
        image = (images or {}).get(step, "")
        # A fresh run has its own records, so that a cache entry of another run does not match.
        fresh = [config.fresh] if config.fresh else []
        upstream = digests[step] = work_key(step, result_settings(config), [image, external, upstream, *fresh]).digest
    return digests


def configs(settings: Mapping[str, StepSettings]) -> dict[str, StepConfig]:
    """The config of each step, with placeholders for its folders; raises ConfigError if a setting is invalid.

    If several are invalid, it is a ProblemsError with a line for each.
    """
    configs_by_step: dict[str, StepConfig] = {}
    problems = Problems()
    for step, values in settings.items():
        folders: dict[str, object] = {name: Path("artifact") for name in STEP_SPECS[step].artifacts}
        if step == "gathering":
            folders["source"] = (Path("artifact"),)
        with problems.collect():
            configs_by_step[step] = build(config_class(step), {**values, **folders})
    problems.raise_all()
    return configs_by_step


def hash_content(text: str, *, tracking_uri: str = "") -> str:
    """The hash of the content that a spec or path has now; the text itself if its content cannot change."""
    if text in ("builtin", "builtin:tiny"):
        return _hash_builtin_weights()
    if text.startswith("models:/"):
        from cappy.registry import resolve

        return resolve(text, tracking_uri=tracking_uri).content_hash
    path = Path(text)
    if path.is_file():
        return _sha256(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)
    if path.is_dir():
        return _hash_folder(path)
    return text


def external_references(step: str, values: StepSettings) -> Iterator[tuple[str, str]]:
    """Yields (setting, text) of every external path or spec in the settings of a step."""
    from cappy.sampling.strategies import FILES

    for name in STEP_SPECS[step].external_settings if step in STEP_SPECS else ():
        value = values.get(name) or ()
        for text in value if isinstance(value, Iterable) and not isinstance(value, str) else (value,):
            yield name, str(text).removeprefix("vllm:").removeprefix("recorded:")  # Followed by a path.
    if step == "sampling" and str(values.get("strategy", "")).endswith(FILES):
        yield "strategy", str(values["strategy"])


def _hash_external(step: str, values: StepSettings, tracking_uri: str) -> list[list[str]]:
    """[setting, name, hash] of all external content; with the file's name, because preparation names tasks after it."""
    references = external_references(step, values)
    return [[name, Path(text).name, hash_content(text, tracking_uri=tracking_uri)] for name, text in references]


def _hash_folder(path: Path) -> str:
    if (path / MANIFEST).is_file():
        # Verified, because otherwise the cache would be used after a part was edited but not its manifest.
        return verify(path).hash
    return fingerprint([[file.name, file.sha256] for file in describe_files(path)])


@functools.cache
def _sha256(path: Path, modified_ns: int, size: int) -> str:
    """The hash of a file, cached while `modified_ns` and `size` stay the same, since two fingerprints use it."""
    return sha256_of(path)


@functools.cache
def _hash_builtin_weights() -> str:
    from cappy import builtin

    folder = Path(builtin.__file__).parent / "weights"
    return fingerprint([[file.name, file.sha256] for file in describe_files(folder)])


def resolve_settings(
    settings: Mapping[str, StepSettings],
    *,
    work: Path,
    tracking_uri: str = "",
    revision: str = "",
    images: Mapping[str, str] | None = None,
) -> Settings:
    """Replaces every `models:/name@alias` by `models:/name/number`, and adds the champion that evaluation uses.

    `revision` and `images` are used for the fingerprints.
    """
    resolved = {step: {**values, **_pin_versions(step, values, tracking_uri)} for step, values in settings.items()}
    if "promotion" in resolved and not resolved["evaluation"].get("champion"):
        resolved["evaluation"]["champion"] = _champion_to_compare(resolved, work, tracking_uri, revision, images)
    return resolved


def _pin_versions(step: str, values: StepSettings, tracking_uri: str) -> dict[str, str]:
    from cappy.registry import resolve

    return {
        name: resolve(spec, tracking_uri=tracking_uri).uri
        for name in STEP_SPECS[step].external_settings
        if isinstance(spec := values.get(name), str) and spec.startswith("models:/")
    }


def _champion_to_compare(
    settings: Mapping[str, StepSettings], work: Path, tracking_uri: str, revision: str, images: Mapping[str, str] | None
) -> str:
    """The version that evaluation compares with; empty if there is none.

    If an identical earlier run trained the current champion, this is the previous champion, with which that run
    compared. So every step of a second identical run is taken from the cache.
    """
    from cappy.registry import champion

    name = str(settings["registration"].get("name", "cappy"))
    current = champion(name, tracking_uri=tracking_uri)
    if current is None:
        return ""
    steps = list(settings)[: list(settings).index("finetuning") + 1]
    training_settings = {step: settings[step] for step in steps}
    digests = fingerprints(training_settings, tracking_uri=tracking_uri, revision=revision, images=images)
    record = read_record(work, digests["finetuning"])
    if record is not None and record.manifest_hash == current.manifest_hash:
        return f"models:/{name}/{current.former}" if current.former else ""
    return current.uri
