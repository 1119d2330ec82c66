"""From the settings of each step to the arguments of a pipeline run: validated, aliases resolved, fingerprinted.

An orchestrator's cache keys see strings, not what they point to. So each step has a fingerprint among its parameters:
the digest of the key of its work (`cappy.keys`), with the content of every file, folder and registered version that its
settings name. An edited file, a moved alias or another version of a step is never answered from the cache.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cappy.config import build, encode, fingerprint, identity
from cappy.errors import ConfigError, quote
from cappy.keys import work_key
from cappy.records.folder import MANIFEST, describe_files, sha256_of, verify
from cappy.redaction import has_secret
from cappy.runs import read_record
from cappy.steps import STEP_SPECS
from cappy.worker import StepConfig, config_class
from pipelines.definitions import MAX_SHARDS, PIPELINES, Settings, StepSettings, shards_of


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run that is ready to be handed to an orchestrator; `fingerprints` by step, and by shard of a sharded one."""

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
    """The submission of a pipeline with these settings per step; ConfigError if a setting is wrong.

    Nothing that moves is left in it: aliases have become versions, and every file stands in a fingerprint. `revision`
    stands for content that this machine cannot see, such as files of a cluster's volume; `registry` is MLflow's address
    from here, where the steps' own `tracking_uri` leads there from inside a cluster alone; `images` are those of steps
    that run in one, by what pins them.
    """
    if pipeline not in PIPELINES:
        raise ConfigError(f"{quote(pipeline)}: no such pipeline; there are {', '.join(PIPELINES)}")
    if not 1 <= shards <= MAX_SHARDS:
        raise ConfigError(f"{pipeline}: {shards} shards; give 1 to {MAX_SHARDS}")
    names = PIPELINES[pipeline].steps_in(shards)
    if unknown := set(steps) - set(names):
        raise ConfigError(f"{pipeline}: has no step {', '.join(sorted(unknown))}")
    refuse_artifacts(pipeline, steps)
    shared = {"work": str(work.absolute())}
    address = str(steps.get("registration", {}).get("tracking_uri", "")) or tracking_uri
    steps = {step: _without_secret(step, values, address) for step, values in steps.items()}
    shared_out = {step: {**steps.get(step, {}), **shared} for step in names}
    registry = registry or address
    settings = resolve_settings(shared_out, work=work, tracking_uri=registry, revision=revision, images=images)
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
    """The settings without an address of MLflow that holds a password: arguments stand in many places.

    The run's own reaches the steps by MLFLOW_TRACKING_URI; ConfigError for another one, which nothing would bring.
    """
    own = str(values.get("tracking_uri", ""))
    if not has_secret(own):
        return values
    if own != address:
        remedy = "give one address for all steps: --tracking-uri, or MLFLOW_TRACKING_URI"
        raise ConfigError(f"{step}: --tracking-uri: holds a password, and is not that of the run; {remedy}")
    return {**values, "tracking_uri": ""}


def refuse_artifacts(pipeline: str, steps: Mapping[str, StepSettings]) -> None:
    """ConfigError for a setting that the pipeline fills: it would be passed over in silence."""
    for step, values in steps.items():
        for name in sorted({*STEP_SPECS[step].artifacts, "work"} & set(values)):
            # Evaluation's scorer is an artifact in the pipelines that train one, and named in the one that does not.
            if (step, name, pipeline) != ("evaluation", "scorer", "evaluate"):
                raise ConfigError(f"{step}: --{name} is what the pipeline gives it; leave it out of settings and --set")
        if STEP_SPECS[step].sharded and values.get("shard"):
            raise ConfigError(f"{step}: --shard is what the pipeline gives each; say how many: shards, or --shards")


def _by_shard(digests: Mapping[str, str], shards: int) -> dict[str, str]:
    """The fingerprints under which steps and shards leave their records: `sampling 0/4` and so on in place of a step.

    Shards stand one after the other, each with its steps in order, which is how they run.
    """
    if shards == 1:
        return dict(digests)
    sharded = [step for step in digests if STEP_SPECS[step].sharded]
    spread = {f"{step} {shard}": f"{digests[step]}-{shard}" for shard in shards_of(shards) for step in sharded}
    before = list(digests)[: list(digests).index(sharded[0])]
    after = [step for step in digests if step not in (*before, *sharded)]
    return {**{step: digests[step] for step in before}, **spread, **{step: digests[step] for step in after}}


def arguments(
    settings: Mapping[str, StepSettings],
    digests: Mapping[str, str],
    by_shard: Mapping[str, str],
    tracking: Mapping[str, str],
) -> dict[str, object]:
    """The parameters of the pipeline function; the pipeline itself says to each shard which one it is."""
    values: dict[str, object] = {}
    for step, chosen in settings.items():
        for name, parameter in STEP_SPECS[step].parameters.items():
            if name in chosen and values.setdefault(parameter, chosen[name]) != chosen[name]:
                both = f"{quote(values[parameter])} and {quote(chosen[name])}"
                raise ConfigError(f"{step}: --{name} is one for the whole pipeline, got {both}")
        values[f"{step}_settings"] = encode(
            {key: chosen[key] for key in chosen if key not in STEP_SPECS[step].parameters}
        )
        values[f"{step}_fingerprint"] = digests[step]
    given = {name: value for name, value in tracking.items() if value}
    return {**values, "tracking_settings": encode(given), "fingerprints": json.dumps(by_shard)}


def fingerprints(
    settings: Mapping[str, StepSettings],
    *,
    tracking_uri: str = "",
    revision: str = "",
    images: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Step -> digest of the key of its work (`cappy.keys`).

    It holds the versions, the settings, the images and the outside content of this step and all before it.

    `revision` stands for content outside that this machine cannot see, `images` are those of steps that run in one.
    ConfigError if a setting is wrong: it costs milliseconds here and a training run later.
    """
    digests: dict[str, str] = {}
    before = revision
    for step, config in configs(settings).items():
        values = settings[step]
        outside = _hash_external(step, values, tracking_uri)
        image = (images or {}).get(step, "")
        # A run that does everything again has records of its own: what a cache keeps of another run is not theirs.
        own = [config.fresh] if config.fresh else []
        before = digests[step] = work_key(step, identity(config), [image, outside, before, *own]).digest
    return digests


def configs(settings: Mapping[str, StepSettings]) -> dict[str, StepConfig]:
    """The config of each step, its folders not yet known; ConfigError if a setting is wrong."""
    configs_by_step: dict[str, StepConfig] = {}
    for step, values in settings.items():
        folders: dict[str, object] = {name: Path("artifact") for name in STEP_SPECS[step].artifacts}
        if step == "gathering":
            folders["source"] = (Path("artifact"),)
        configs_by_step[step] = build(config_class(step), {**values, **folders})
    return configs_by_step


def hash_content(text: str, *, tracking_uri: str = "") -> str:
    """What a spec or path points to at this moment, as a hash; the text itself where it pins what it names."""
    if text == "builtin":
        return _hash_builtin_weights()
    if text.startswith("models:/"):
        from cappy.registry import resolve

        return resolve(text, tracking_uri=tracking_uri).manifest_hash
    path = Path(text)
    if path.is_file():
        return _sha256(path.absolute(), path.stat().st_mtime_ns, path.stat().st_size)
    if path.is_dir():
        return _hash_folder(path)
    return text


def external_names(step: str, values: StepSettings) -> Iterator[tuple[str, str]]:
    """Setting and path or spec of everything outside that the settings of a step name."""
    from cappy.sampling.strategies import FILES

    for name in STEP_SPECS[step].outside if step in STEP_SPECS else ():
        given = values.get(name) or ()
        for text in given if isinstance(given, Iterable) and not isinstance(given, str) else (given,):
            yield name, str(text).removeprefix("vllm:")  # Who runs a folder changes nothing of what it holds.
    if step == "sampling" and str(values.get("strategy", "")).endswith(FILES):
        yield "strategy", str(values["strategy"])


def _hash_external(step: str, values: StepSettings, tracking_uri: str) -> list[list[str]]:
    """Setting, name and content of everything outside; a file's name counts, because preparation names a task by it."""
    references = external_names(step, values)
    return [[name, Path(text).name, hash_content(text, tracking_uri=tracking_uri)] for name, text in references]


def _hash_folder(path: Path) -> str:
    if (path / MANIFEST).is_file():
        # Verified, or an edited part under its old manifest would be answered from the cache.
        return verify(path).hash
    return fingerprint([[file.name, file.sha256] for file in describe_files(path)])


@functools.cache
def _sha256(path: Path, changed: int, size: int) -> str:
    """A big file is read once, although two fingerprints ask for it; `changed` and `size` tell another content."""
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
    """The settings with every `models:/name@alias` as `models:/name/number`, and the champion to compare with.

    `revision` and `images` are what else goes into the fingerprints.
    """
    numbered = {step: {**values, **_pin_versions(step, values, tracking_uri)} for step, values in settings.items()}
    if "promotion" in numbered and not numbered["evaluation"].get("champion"):
        numbered["evaluation"]["champion"] = _champion_to_compare(numbered, work, tracking_uri, revision, images)
    return numbered


def _pin_versions(step: str, values: StepSettings, tracking_uri: str) -> dict[str, str]:
    from cappy.registry import resolve

    return {
        name: resolve(spec, tracking_uri=tracking_uri).uri
        for name in STEP_SPECS[step].outside
        if isinstance(spec := values.get(name), str) and spec.startswith("models:/")
    }


def _champion_to_compare(
    settings: Mapping[str, StepSettings], work: Path, tracking_uri: str, revision: str, images: Mapping[str, str] | None
) -> str:
    """The version that evaluation compares with; empty if there is none.

    A champion that this very finetuning made is not compared with itself but with its predecessor, as it was when it
    was promoted: so a second identical run is answered wholly from the cache.
    """
    from cappy.registry import champion

    name = str(settings["registration"].get("name", "cappy"))
    present = champion(name, tracking_uri=tracking_uri)
    if present is None:
        return ""
    until = list(settings)[: list(settings).index("finetuning") + 1]
    trained = {step: settings[step] for step in until}
    digests = fingerprints(trained, tracking_uri=tracking_uri, revision=revision, images=images)
    record = read_record(work, digests["finetuning"])
    if record is not None and record.manifest_hash == present.manifest_hash:
        return f"models:/{name}/{present.former}" if present.former else ""
    return present.uri
